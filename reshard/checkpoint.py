"""Open a checkpoint: recognise its format, find its layout, and match every tensor in its files with that layout.

What comes out is a list of stored tensors with dtypes, files and byte offsets: one side of a join. Headers only.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from reshard import formats
from reshard.dtypes import DTYPE_SIZE
from reshard.errors import FormatError, LayoutError, PlanError
from reshard.foreign import quote
from reshard.formats.manifest import read_manifest
from reshard.formats.quantised import codes_without_scales, refuse, scheme
from reshard.geometry.block import Block, Stored, restride, row_major, singles
from reshard.geometry.coverage import faults_of
from reshard.hub import is_remote
from reshard.layout import (
    Descriptor,
    Entry,
    Layout,
    Mesh,
    Placement,
    Section,
    architectures,
    builtin_descriptors,
    find_descriptor,
    load_descriptor,
)
from reshard.layout.carry import carrying, found, with_entries
from reshard.layout.check import refuse_unheld
from reshard.layout.fusion import slice_dim
from reshard.stores.files import read_json, reading
from reshard.stores.identity import Identity, identity, noting

if TYPE_CHECKING:
    from reshard.executor.sources import Source
    from reshard.planner.batches import Batch


@dataclass
class Checkpoint:
    """An opened checkpoint. `stored` are its tensors.

    `left_out` are weights in its files that the layout declares but does not describe (`omit`: multi-token prediction), each
    under a key of its own name. `dropped` are the names of all that no conversion carries: those, constants that engines
    want, and buffers that can be computed again; `dropped_bytes` is their size in the files.
    """

    path: Path
    format: str
    mesh: Mesh
    layout: Layout
    stored: list[Stored]
    dropped: list[str] = field(default_factory=list)
    dropped_bytes: int = 0
    left_out: list[Stored] = field(default_factory=list)
    engine_version: str | None = None
    config_path: Path | None = None
    origin: Mapping[str, str] | None = None  # repo and revision on the Hub that it comes from, where that is known
    native: Mapping[str, str] = field(default_factory=dict)  # the model's dtype of tensors that this format's engine widened
    identities: Mapping[str, Identity] = field(default_factory=dict)  # of local files, by path, when their headers were read

    @property
    def architecture(self) -> str:
        return quote((self.layout.config.get("architectures") or [self.layout.name])[0])

    @property
    def tensors(self) -> list[Stored]:
        return self.stored

    @property
    def files(self) -> list[str]:
        return sorted({stored.file for stored in self.stored})

    @property
    def bytes(self) -> int:
        return sum(stored.size * DTYPE_SIZE[stored.dtype] for stored in self.stored)

    @property
    def remote(self) -> bool:
        return not isinstance(self.path, Path)

    @property
    def name(self) -> str:
        """What it is called where it must not be confused: links followed, a branch's commit said."""
        return self.path.pinned if self.remote else os.path.realpath(self.path)

    @property
    def revision(self) -> str | None:
        """The commit, of a checkpoint on the Hub."""
        return self.path.revision if self.remote else None

    @property
    def left_out_bytes(self) -> int:
        return sum(stored.size * DTYPE_SIZE[stored.dtype] for stored in self.left_out)

    def source(self, whole: Iterable["Batch"] = (), jobs: int = 8) -> "Source":
        """Its bytes, to be read; of a remote one, `whole` are the batches of a run that fetches everything."""
        from reshard.executor.sources import Source

        if not self.remote:
            return Source(self.path, self.identities)
        from reshard.hub.source import HubSource

        return HubSource(self.path, whole, jobs)


def folder_of(path: str | Path, cache: bool = False):
    """`path` as a pathlib.Path, or as a HubPath if it names a place on the Hub."""
    if not is_remote(path):
        return Path(path)
    from reshard.hub.folder import open_folder

    return open_folder(str(path), cache)


def open_checkpoint(
    path: str | Path,
    *,
    format: str | None = None,
    layout: str | Path | None = None,
    config: str | Path | None = None,
    cache: bool = False,
) -> Checkpoint:
    """Read the headers of the checkpoint in folder `path`, and match them with its layout.

    `format` forces what is otherwise recognised from the files; `layout` is a TOML file of the user's own; `config` is a
    config.json, or the folder of one, for formats that have none. `path` may be hf://ORG/NAME[@REV][/SUBDIR]: ranges of its
    files are read then, unless they are in the Hub's cache; `cache` puts them there first. Raises FormatError, LayoutError,
    PlanError or HubError.
    """
    folder = folder_of(path, cache)
    kind = formats.get(format) if format else formats.recognise(folder)
    config_path = find_config(folder, config)
    with noting() as identities:
        if isinstance(config_path, Path):
            identities[str(config_path)] = identity(config_path.stat())
        settings = read_config(config_path)
        with reading(folder), _naming(folder):
            contents = kind.read(folder)
    with _naming(config_path):
        checkpoint = _matched(folder, kind, contents, config_path, settings, load_descriptor(Path(layout)) if layout else None)
    checkpoint.identities = identities
    return checkpoint


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors of layouts and meshes, which know of no file, with the name of the one that they are about."""
    try:
        yield
    except (LayoutError, PlanError) as error:
        if str(path) in f"{error} {error.hint}":
            raise
        raise (LayoutError if isinstance(error, LayoutError) else FormatError)(f"{path}: {error}", error.hint) from None


def _matched(
    folder: Path,
    kind: formats.Format,
    contents: formats.Contents,
    config_path: Path,
    settings: Mapping[str, object],
    own: Descriptor | None,
) -> Checkpoint:
    """The checkpoint whose files hold `contents`, by the descriptor that is given or, by default, that of its architecture."""
    descriptor = own or find_descriptor(settings)
    quantised_as = scheme(settings, contents)
    if descriptor is None and quantised_as:
        raise refuse(folder, quantised_as, contents)
    if descriptor is None:
        raise unknown_architecture(settings, contents)
    if not own and contents.layout not in (None, descriptor.name):
        raise FormatError(f"{folder} was written by layout {quote(contents.layout)}, {config_path} is a model of layout {descriptor.name}",
                          "pass the layout's file with --layout, or the right config.json with --config")  # fmt: skip
    bound = descriptor.bind(model_config(settings))
    disagreements = kind.disagreements(bound, contents) if kind.disagreements else []
    if disagreements:
        raise PlanError([f"{folder}: {text}" for text in disagreements],
                        f"{config_path} is of another model: name the config.json of the one that was trained, with --config")  # fmt: skip
    checkpoint = Checkpoint(folder, kind.name, contents.mesh, bound, [], engine_version=contents.engine_version, config_path=config_path)
    manifest = read_manifest(folder) or {}
    checkpoint.native = manifest.get("dtypes", {})
    checkpoint.origin = (
        {"repo": folder.repository.location.repo, "revision": folder.revision} if checkpoint.remote else manifest.get("source")
    )
    try:
        _match(checkpoint, kind, contents)
    except PlanError:
        if quantised_as:  # one sentence instead of a line for each scale
            raise refuse(folder, quantised_as, contents) from None
        raise
    without = None if own else codes_without_scales(folder, settings, checkpoint.stored)
    if without:
        raise without
    return checkpoint


def find_config(folder: Path, config: str | Path | None) -> Path:
    if config is not None:
        path = folder_of(config)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise FormatError(f"--config: {path} does not exist")
        return path
    path = folder / "config.json"
    if not path.is_file():
        raise FormatError(f"{folder} has no config.json, which gives the model's sizes", "name the original model's with --config FILE|DIR")
    return path


def read_config(path: Path) -> Mapping[str, object]:
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise FormatError(f"{path} holds a {type(settings).__name__}, expected an object")
    return settings


def model_config(settings: Mapping[str, object]) -> Mapping[str, object]:
    """The language model's numbers: those of text_config laid over the rest where a model nests them."""
    nested = settings.get("text_config")
    return {**settings, **nested, "architectures": settings.get("architectures")} if isinstance(nested, dict) else settings


def unknown_architecture(settings: Mapping[str, object], contents: formats.Contents) -> LayoutError:
    """The error for a model that no descriptor lists: which family comes closest, and what it leaves unexplained."""
    names = {name for rank in contents.tensors for name in rank}
    best: tuple[int, str, list[str]] | None = None
    for family, descriptor in builtin_descriptors().items():
        try:
            bound = descriptor.bind(model_config(settings))
            section = bound.section("hf")
            all_entries = section.entries + tuple(e for _, _, variant in section.variants for e in variant.entries)
            rules = formats.get("hf").rules
            known = {s.name for s in Placement(bound, replace(section, entries=all_entries), rules, Mesh()).stored(aliases=True)}
        except LayoutError:
            continue
        left = sorted(names - known)
        if best is None or len(left) < best[0]:
            best = len(left), family, left
    architecture = quote(", ".join(architectures(settings) or ["(config.json names none)"]))
    text = f"no layout descriptor for architecture {architecture}"
    if contents.layout:
        return LayoutError(f"{text}; its files were written by layout {quote(contents.layout)}", "pass that layout's file with --layout")
    if best is None or best[0] == len(names):
        text += f", and no family explains any of its {len(names)} tensors:\n  {_listed(sorted(names))}"
        return LayoutError(text, "write a descriptor (docs/guides/descriptor.md) and pass it with --layout FILE.toml")
    count, family, left = best
    if count:
        text += f"\nclosest is {family}, which leaves {count} of {len(names)} tensors unexplained:\n  {_listed(left)}"
    else:
        text += f"\n{family} explains the names of all {len(names)} tensors"
    return LayoutError(text, f'write a descriptor that begins with extends = "{family}" and pass it with --layout FILE.toml')


def _listed(names: list[str], shown: int = 12) -> str:
    return "\n  ".join(map(quote, names[:shown])) + (f"\n  … and {len(names) - shown} more" if len(names) > shown else "")


def _match(checkpoint: Checkpoint, kind: formats.Format, contents: formats.Contents) -> None:
    """Fill in `checkpoint.stored` and `.dropped`; raises PlanError with every tensor that is missing or doesn't fit."""
    layout, mesh = checkpoint.layout, contents.mesh
    rules = kind.rules if contents.stages is None else replace(kind.rules, stages=lambda layers, stages: contents.stages)
    if contents.stages is not None and sum(map(len, contents.stages)) != layout.layers:
        raise PlanError([f"{checkpoint.path} holds {sum(map(len, contents.stages))} layers, config.json says {layout.layers}"])
    section = _as_written(layout, _prefixed(layout, layout.section(kind.section), rules, contents), rules, contents)
    carried = found(section, contents.tensors)
    section, checkpoint.layout = with_entries(section, carried), carrying(layout, carried)
    layout = checkpoint.layout = _as_found(checkpoint, section, rules, contents)
    placement = Placement(layout, section, rules, mesh, platform=contents.engine_platform)
    refuse_unheld(placement, kind.section)
    placement.pads = _pads(placement, contents)
    problems: list[str] = []
    left = [dict(rank) for rank in contents.tensors]
    stored: list[Stored] = []
    for s in _pieces(placement, contents) if contents.boxes is not None else placement.stored(aliases=True):
        held = left[s.rank].pop(s.name, None) if s.rank < len(left) else None
        if held is None:
            if not s.entry.alias and not copied(layout, s.entry):
                problems.append(f"{s.name} is missing (rank {s.rank}), expected shape {list(s.shape)}")
            continue
        file, info = held
        if info.shape != s.shape:
            problems.append(f"{s.name} ({file}): shape {list(info.shape)}, expected {list(s.shape)} by layout {layout.name}")
            continue
        problems += [f"{s.name} ({file}): {fault}" for fault in faults_of(s)]
        parts = s.parts
        if info.strides is not None:
            parts = singles((key, restride(block, s.shape, info.strides)) for key, block in s.blocks)
        stored.append(Stored(s.rank, s.name, info.dtype, s.shape, parts, s.entry, file, info.offset, s.pad))
    problems = placement.problems + problems
    ignore, omit = [*layout.filled(section.drop), *contents.ignore], layout.filled(section.omit)
    constants = {name for rank in placement.ranks for name, _ in placement.constants(rank)} if section.constants else set()
    for rank, names in enumerate(left):
        for name, (file, info) in names.items():
            computed = name in constants or any(fnmatchcase(name, pattern) for pattern in ignore)
            if not computed and not any(fnmatchcase(name, pattern) for pattern in omit):
                problems.append(f"{name} ({file}) is not in layout {layout.name}")
                continue
            checkpoint.dropped.append(name)
            checkpoint.dropped_bytes += info.nbytes
            if not computed:
                key = (name if rank == 0 else f"{name} (rank {rank})",)
                block = Block(tuple((0, size) for size in info.shape), 0, info.strides or row_major(info.shape))
                checkpoint.left_out.append(
                    Stored(rank, name, info.dtype, info.shape, singles([(key, block)]), file=file, start=info.offset)
                )
    if problems:
        raise PlanError(list(dict.fromkeys(problems)), _what_is_expected(checkpoint))
    checkpoint.stored = stored
    checkpoint.dropped = sorted(set(checkpoint.dropped))


def _what_is_expected(checkpoint: Checkpoint) -> str:
    own = checkpoint.layout.descriptor.path
    if own:
        return (
            f"`reshard layouts show {own}` tells what {own} expects: is it right, and config.json ({checkpoint.config_path}) this model's?"
        )
    return f"is config.json ({checkpoint.config_path}) this model's? `reshard layouts show {checkpoint.layout.name}` tells what is expected"


def copied(layout: Layout, entry: Entry) -> bool:
    """Whether `entry` repeats tensors of another place (the embedding beside a prediction layer): files may lack it."""
    return entry.copy and all(layout.descriptor.tensors[name].place != entry.place for name in entry.of)


def _prefixed(layout: Layout, section: Section, rules, contents: formats.Contents) -> Section:
    """The section under those prefixes of its places under which the files have most names; the first where none has more."""
    if not section.prefixes:
        return section
    held = set().union(*contents.tensors)
    found = [
        sum(s.name in held for s in Placement(layout, each, rules, contents.mesh, platform=contents.engine_platform).stored())
        for each in (section, *section.prefixes)
    ]
    return (section, *section.prefixes)[found.index(max(found))]


def _as_found(checkpoint: Checkpoint, section: Section, rules, contents: formats.Contents) -> Layout:
    """The layout with the optional places and without the optional tensors that the files have and lack. A place is there
    with all its tensors or not at all. Raises PlanError."""
    layout, held = checkpoint.layout, set().union(*contents.tensors)
    there, problems = set(), []
    for place in sorted(layout.absent):
        entries = tuple(e for e in section.entries if e.place == place and not e.alias and not copied(layout, e))
        names = {
            s.name
            for s in Placement(layout.present([place]), Section(entries), rules, contents.mesh, platform=contents.engine_platform).stored()
        }
        if names & held:
            there.add(place)
            problems += [f"{name} is missing, though others of place {place} are there" for name in sorted(names - held)]
    if problems:
        raise PlanError(problems, _what_is_expected(checkpoint))
    layout = layout.present(there) if there else layout
    if not any(tensor.optional for tensor in layout.descriptor.tensors.values()):
        return layout
    placement, lacking = Placement(layout, section, rules, contents.mesh, platform=contents.engine_platform), []
    for entry in section.entries:
        tensors = [layout.descriptor.tensors[name] for name in entry.of]
        if not entry.omit and all(tensor.optional for tensor in tensors):
            for number in placement.holding(entry):
                probe = Placement(layout, Section((entry,)), rules, contents.mesh, platform=contents.engine_platform).stored(number=number)
                if all(layout.holds(t.optional, t.place, number) for t in tensors) and not any(s.name in held for s in probe):
                    lacking += [(tensor.name, number) for tensor in tensors]
    return layout.without(tensors=lacking) if lacking else layout


def _as_written(layout: Layout, section: Section, rules, contents: formats.Contents) -> Section:
    """The section with the entries of those variants whose names the files really hold."""
    # a name may be one rank's of the base and another's of a variant: local layer numbers differ from stage to stage
    names = contents.tensors if contents.boxes is None else [set().union(*contents.tensors)]
    for _, _, variant in section.variants:
        present = []
        for entry in variant.entries:
            probe = Placement(layout, Section((entry,)), rules, contents.mesh, platform=contents.engine_platform)
            first = next(probe.stored(), None)
            if first is not None and first.rank < len(names) and first.name in names[first.rank]:
                present.append(entry)
        if present:
            section = section.overlaid(replace(variant, entries=tuple(present)))
    return section


def _pads(placement: Placement, contents: formats.Contents) -> dict[str, int]:
    """Padded sizes that the files show where they differ from the layout's rule."""
    pads: dict[str, int] = {}
    entries = tuple(e for e in placement.section.entries if e.pad)
    probe = Placement(placement.layout, replace(placement.section, entries=entries), placement.rules, placement.mesh)
    for s in probe.stored():
        found = contents.tensors[s.rank].get(s.name) if s.rank < len(contents.tensors) else None
        entry: Entry = s.entry
        if found and len(found[1].shape) == len(s.shape):
            axis = entry.pad[0][0]
            padded = found[1].shape[0] * placement.mesh.tp
            if found[1].shape[0] != s.shape[0] and padded >= placement.layout.sizes.get(axis, padded + 1):
                pads[axis] = padded
    return pads


def _pieces(placement: Placement, contents: formats.Contents):
    """Stored tensors of files whose pieces are arbitrary boxes of whole tensors, at the offsets the files state."""
    whole = {s.name: s for s in placement.stored(aliases=True)}
    found = set()
    for rank, (names, offsets) in enumerate(zip(contents.tensors, contents.boxes)):
        for name, (_, info) in names.items():
            s = whole.get(name)
            if s is None:
                continue
            found.add(name)
            shape, blocks = s.shape, [(key, block) for key, block in s.blocks]
            origin = offsets.get(name, (0,) * len(shape))
            if (
                len(origin) != len(shape)
                or len(info.shape) != len(shape)
                or any(o + n > size for o, n, size in zip(origin, info.shape, shape))
            ):
                yield Stored(rank, name, "", shape, s.parts, s.entry)  # does not fit: reported as such
                continue
            for dim, (begin, size) in enumerate(zip(origin, info.shape)):
                shape, blocks = slice_dim(shape, blocks, dim, begin, begin + size, axes_in(placement, s, dim))
            parts = singles(blocks)
            padding = prod(shape) - sum(part.block.size for part in parts) if s.pad else 0
            yield Stored(rank, name, "", shape, parts, s.entry, pad=padding)
    for name, s in whole.items():
        if name not in found:
            yield s


def axes_in(placement: Placement, s: Stored, dim: int) -> dict:
    """Per tensor that lies in `s`, the numbers of its axes that lie in dimension `dim` of it, from the slowest."""
    lead = len(s.shape) - len(s.entry.dims or placement.layout.descriptor.tensors[s.entry.of[0]].dims)
    own = placement.dim_axes(s.entry, dim - lead) if dim >= lead else {}
    return {key: own.get(key[0], ()) for key, _ in s.blocks}
