"""Folders: which files each framework expects, how its ranks are named, and how to recognise one.

A format reads a folder into ``Contents`` (which tensors lie where, on which mesh) and lays an output folder out as
``OutFile``s, sizes and headers known, no tensor byte touched. What the tensors mean is the descriptors' business.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from reshard.block import Stored
from reshard.errors import FormatError
from reshard.layout import Mesh, Placement, Rank, Rules
from reshard.stores import FileImage, TensorInfo
from reshard.stores.foreign import quote


@dataclass
class Contents:
    """What a folder holds, as its headers say: per rank, name → (file within the folder, where its bytes lie).

    `boxes` holds, for formats that cut whole HF tensors into arbitrary boxes, the offsets of each rank's pieces.
    `stages` is the layers of each pipeline stage where the files show them. `ignore` are name patterns that every
    model of this format may have and that are no weights.
    """

    mesh: Mesh
    tensors: list[dict[str, tuple[str, TensorInfo]]]
    layout: str | None = None
    engine_version: str | None = None
    stages: list[list[int]] | None = None
    boxes: list[dict[str, tuple[int, ...]]] | None = None
    ignore: tuple[str, ...] = ()


@dataclass
class OutFile:
    """A weight file to write: its path in the folder, its skeleton, the stored tensors in it, and constants' bytes."""

    path: str
    image: FileImage
    tensors: dict[str, Stored]
    constants: dict[str, bytes] = field(default_factory=dict)


@dataclass
class Folder:
    """An output folder: weight files, and small files whose content is known at once."""

    files: list[OutFile]
    small: dict[str, bytes]


@dataclass(frozen=True)
class Format:
    """One kind of folder. `section` names the descriptors' table that it follows."""

    name: str
    section: str
    rules: Rules
    recognise: Callable[[Path, set[str]], bool]
    read: Callable[[Path], Contents]
    write: Callable[["Target", list[Stored]], Folder]
    summary: str
    newest: str | None = None  # release of the engine whose files it writes, the newest known


@dataclass(frozen=True)
class Target:
    """What to write: the placement, which of its ranks, and what the files should say of it."""

    placement: Placement
    ranks: list[Rank]
    engine_version: str | None = None
    max_file: int | None = None  # bytes; None: what is usual for the format

    def by_rank(self, stored: list[Stored]) -> list[tuple[Rank, dict[str, Stored]]]:
        """Each rank that is written, with its tensors by name."""
        own: dict[int, dict[str, Stored]] = {rank.number: {} for rank in self.ranks}
        for s in stored:
            own[s.rank][s.name] = s
        return [(rank, own[rank.number]) for rank in self.ranks]

    @property
    def mesh(self) -> Mesh:
        return self.placement.mesh


def formats() -> dict[str, Format]:
    """All formats, in the order in which a folder is asked whether it is one."""
    from reshard.formats import engine, hf, megatron, rank_pt, tp

    known = (tp.FORMAT, engine.VLLM, engine.SGLANG, megatron.FORMAT, rank_pt.FORMAT, hf.FORMAT)
    return {format.name: format for format in known}


def get(name: str) -> Format:
    known = formats()
    if name not in known:
        raise FormatError(f"unknown format {name!r}", f"formats: {', '.join(known)}")
    return known[name]


def recognise(folder: Path) -> Format:
    """The format of `folder`, by its manifest or the names of its files. Raises FormatError."""
    from reshard.formats.manifest import read_manifest

    if not folder.is_dir():
        hint = None
        if not folder.exists() and not folder.is_absolute() and len(folder.parts) == 2:
            hint = f"did you mean hf://{folder}?"
        raise FormatError(f"{folder} is not a folder" if folder.exists() else f"{folder} does not exist", hint)
    manifest = read_manifest(folder)
    if manifest:
        return get(manifest["format"])
    names = {path.name for path in folder.iterdir()}
    for format in formats().values():
        if format.recognise(folder, names):
            return format
    some = ", ".join(sorted(names)[:5]) or "nothing"
    raise FormatError(f"{folder} holds no checkpoint that reshard knows (it holds {some})", "say which with --from, or see `reshard convert --help`")


def safe_join(folder: Path, name: str) -> Path:
    """`folder`/`name`, refusing a name from a file that would lead out of the folder."""
    if not name or name.startswith(("/", "\\")) or ".." in Path(name).parts or "\x00" in name:
        raise FormatError(f"{folder}: file name {quote(repr(name))} leads out of the folder")
    return folder / name


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
