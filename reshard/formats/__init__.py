"""Folders: which files each framework expects, how its ranks are named, and how to recognise one.

A format reads a folder into ``Contents`` (which tensors lie where, on which mesh) and lays an output folder out as
``OutFile``s, sizes and headers known, no tensor byte touched. What the tensors mean is the descriptors' business.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module

from reshard.errors import FormatError, LayoutError, PlanError
from reshard.foreign import quote
from reshard.formats.pieces import Piece
from reshard.geometry.block import Stored
from reshard.layout import PLATFORMS, Layout, Mesh, Placement, Rank, Rules, Section, parse_version
from reshard.registry import FORMATS
from reshard.stores import FileImage
from reshard.stores.files import AnyPath


@dataclass(frozen=True)
class States:
    """What a trainer saved beside the model. `pieces` bear torch's names, ``…state.PARAMETER.exp_avg``; `others` are the bytes of what is no
    tensor, by name; `paths` are the keys of the saved state by which a name is reached, where that is known; `key` is what the weights'
    names are to begin with beside it, where they have no such key themselves; `lost` says what of it no format here can keep."""

    pieces: list[Piece]
    others: Mapping[str, bytes] = field(default_factory=dict)
    paths: Mapping[str, tuple[str | int, ...]] = field(default_factory=dict)
    key: str = ""
    lost: str | None = None


@dataclass
class Contents:
    """What a folder holds, as its headers say: every tensor in its files as a piece of what a rank of `mesh` stores.

    `stages` is the layers of each pipeline stage where the files show them. `settings` is what each file says of the model's
    sizes. `nested`: names may stand below keys of a larger state, beside what is no model's.
    `writer`: the program that wrote the files, where they show it. `masters` reads the same tensors as an optimizer holds them, in
    fp32, where the folder has both.
    """

    mesh: Mesh
    pieces: list[Piece]
    layout: str | None = None
    engine_version: str | None = None
    engine_platform: str | None = None
    stages: list[list[int]] | None = None
    settings: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    nested: bool = False
    writer: str | None = None
    states: Callable[[], States] | None = None  # of an optimizer, read when they are asked for
    masters: "Callable[[], Contents] | None" = None


@dataclass(frozen=True)
class OutFile:
    """A weight file to write: its path in the folder, all of it but its tensors, and the rank whose file it is (0 in formats
    without ranks)."""

    path: str
    image: FileImage
    rank: int = 0


@dataclass(frozen=True)
class Folder:
    """An output folder: weight files, what lies where in them, and small files whose content is known at once."""

    files: list[OutFile]
    pieces: list[Piece]
    small: dict[str, bytes]


@dataclass(frozen=True)
class Format:
    """One kind of folder. `section` names the descriptors' table that it follows."""

    name: str
    section: str
    rules: Rules
    recognise: Callable[[AnyPath, set[str]], bool]
    read: Callable[[AnyPath], Contents]
    write: Callable[["Target", list[Stored]], Folder] | None  # None: read only
    newest: str | None = None  # release of the engine whose files it writes, the newest known
    oldest: str | None = None  # the oldest whose names are known
    disagreements: Callable[[Layout, Contents], list[str]] | None = None  # of a folder's own settings with config.json
    others: tuple[str, ...] = ()  # tables whose names its files may bear as well
    whole: bool = False  # cuts whole tensors itself, over as many ranks as the mesh's tp, where others have each rank placed
    forms: tuple[str, ...] = ()  # of the descriptors' alternatives, those that it writes: the names of a model in memory
    stacks: bool = False  # all layers of a name may be one tensor, and are where they are alike
    usage: str = ""  # a command or Python that loads a folder of it: {folder}, {repo}, {id}, {tp}, {pp}
    holds: tuple[str, ...] = ("model",)  # what its folders may be: whole models, LoRA adapters
    states: bool = False  # whether its folders may hold an optimizer's state, too
    settings: tuple[str, Callable[[AnyPath], dict[str, object]]] | None = None  # its own config: the file, and that as a config.json
    platforms: bool = False  # its engine wants other tensors on other platforms
    small: tuple[
        str, ...
    ] = ()  # names (or patterns of names) of files beside the weights without which a folder of this format is not whole

    def section_of(self, layout: Layout, name: str | None = None) -> Section:
        """The table of `layout` that its files follow (`name`: another of those whose names they may bear), in all its spellings."""
        section = layout.section(name or self.section)
        every = (section, *section.prefixes)
        return replace(section, prefixes=(*every[1:], *(each.stacked() for each in every))) if self.stacks else section

    def release(self, version: str) -> tuple[int, ...]:
        """The engine's release that `version` names, if its tensors' names are known. Raises PlanError or LayoutError."""
        if self.newest is None:
            raise PlanError(
                [f"--engine-version {quote(version)} has no meaning for format {self.name}"],
                "it goes with --to vllm, --to sglang and --to meta",
            )
        release, oldest, newest = parse_version(version), parse_version(self.oldest), parse_version(self.newest)
        if release[: len(newest)] > newest or release < oldest[: len(release)]:
            raise PlanError([f"--engine-version {quote(version)}: of {self.name}, names are known for {self.oldest} to {self.newest}"],
                            f"use --engine-version {self.newest if release > newest else self.oldest}, if its tensors are still named so")  # fmt: skip
        return release

    def check_platform(self, platform: str | None) -> None:
        """Raises PlanError for a platform that no engine runs on, or where none matters."""
        if platform is not None and not (self.platforms and platform in PLATFORMS):
            raise PlanError(
                [f"--engine-platform {quote(platform)} has no meaning for format {self.name}"],
                f"it is {', '.join(PLATFORMS[:-1])} or {PLATFORMS[-1]}, with --to vllm and --to sglang",
            )


@dataclass(frozen=True)
class Target:
    """What to write: the placement, which of its ranks, and what the files should say of it."""

    placement: Placement
    ranks: list[Rank]
    engine_version: str | None = None
    max_file: int | None = None  # bytes; None: what is usual for the format
    over: Mesh | None = None  # whose ranks the files are, of a format that cuts whole tensors itself
    beside: States | None = None  # of an optimizer's state: what is no tensor, and its paths

    def by_rank(self, stored: list[Stored]) -> list[tuple[Rank, dict[str, Stored]]]:
        """Each rank that is written, with its tensors by name."""
        own: dict[int, dict[str, Stored]] = {rank.number: {} for rank in self.ranks}
        for s in stored:
            if s.name in own[s.rank]:
                labels = " and ".join(f"{other.entry.label} ({', '.join(other.entry.of)})" for other in (own[s.rank][s.name], s))
                raise LayoutError(
                    f"layout {self.placement.layout.name}: two entries store {s.name}: {labels}",
                    "give them different names, or conditions of which one holds",
                )
            own[s.rank][s.name] = s
        return [(rank, own[rank.number]) for rank in self.ranks]

    @property
    def mesh(self) -> Mesh:
        return self.over or self.placement.mesh


def get(name: str) -> Format:
    if name not in FORMATS:
        raise FormatError(f"unknown format {name!r}", f"formats: {', '.join(FORMATS)}")
    module, attribute = FORMATS[name].split(".")
    return getattr(import_module(f"reshard.formats.{module}"), attribute)


def recognise(folder: AnyPath, manifest: Mapping[str, object] | None) -> Format:
    """The format of `folder`, by its manifest, if it has one, or the names of its files. Raises FormatError."""
    from reshard.formats.unsupported import refuse_file, refuse_folder

    if not folder.is_dir():
        hint = None
        if not folder.exists() and not folder.is_absolute() and len(folder.parts) == 2:
            hint = f"did you mean hf://{folder}?"
        raise refuse_file(folder) if folder.exists() else FormatError(f"{folder} does not exist", hint)
    if manifest:
        if manifest["format"] not in FORMATS:
            raise FormatError(f"{folder}: reshard.json names the unknown format {quote(repr(manifest['format']))}",
                              f"formats: {', '.join(FORMATS)}")  # fmt: skip
        return get(manifest["format"])
    names = {path.name for path in folder.iterdir()}
    for format in map(get, FORMATS):
        if format.recognise(folder, names):
            return format
    raise refuse_folder(folder, names)


def parts(stored: list[tuple[str, int]], max_file: int | None) -> list[list[str]]:
    """Names cut greedily into files of at most `max_file` bytes (5 GiB where None); a tensor is never cut."""
    max_file = max_file or 5 << 30
    out: list[list[str]] = [[]]
    total = 0
    for name, size in stored:
        if out[-1] and total + size > max_file:
            out.append([])
            total = 0
        out[-1].append(name)
        total += size
    return out
