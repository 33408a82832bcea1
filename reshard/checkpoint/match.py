"""Every tensor in a checkpoint's files matched with its layout: what is missing, does not fit or is not explained, all together."""

from collections.abc import Callable, Set
from dataclasses import replace
from fnmatch import fnmatchcase

from reshard import formats
from reshard.checkpoint.names import spelled
from reshard.checkpoint.opened import Checkpoint
from reshard.errors import PlanError
from reshard.formats.constants import check_constants
from reshard.formats.pieces import SCALED, Filed, Piece, placed
from reshard.geometry.block import Block, Stored, row_major, singles
from reshard.geometry.coverage import faults_of, unlike
from reshard.geometry.regions import Chunk
from reshard.layout import Entry, Layout, Placement, Section
from reshard.layout.carry import carrying, with_entries
from reshard.layout.carry import found as found_carried
from reshard.layout.check import refuse_unheld
from reshard.planner.values import Operand, Value, bare, formed

#: by rank and name, the first of its pieces: a name may be one rank's of the base and another's of a variant, for local layer
#: numbers differ from stage to stage
Held = dict[int, dict[str, Piece]]
#: a section placed on the mesh and the platform that the files are of
OnMesh = Callable[[Layout, Section], Placement]


def match(checkpoint: Checkpoint, kind: formats.Format, contents: formats.Contents) -> None:
    """Fill in `checkpoint.stored` and `.dropped`; raises PlanError with every tensor that is missing or doesn't fit."""
    layout, mesh = checkpoint.layout, contents.mesh
    rules = kind.rules if contents.stages is None else replace(kind.rules, stages=lambda layers, stages: contents.stages)
    if contents.stages is not None and sum(map(len, contents.stages)) != layout.layers:
        raise PlanError([f"{checkpoint.path} holds {sum(map(len, contents.stages))} layers, config.json says {layout.layers}"])
    name, pieces = kind.section, contents.pieces
    scales = {(piece.file, piece.offset): piece.scale for piece in pieces if piece.scale != 1}
    if contents.nested:
        name, pieces, checkpoint.beside, checkpoint.key = spelled(layout, kind, mesh, pieces)
    filed = Filed.of(pieces)
    held = filed.first
    names = frozenset().union(*held.values())

    def on_mesh(layout: Layout, section: Section) -> Placement:
        return Placement(layout, section, rules, mesh, platform=contents.engine_platform)

    section = _as_written(layout, _prefixed(layout, kind.section_of(layout, name), on_mesh, names), on_mesh, held)
    carried = found_carried(section, ((piece.name, _reach(piece), piece.dtype) for piece in pieces))
    section, checkpoint.layout = with_entries(section, carried), carrying(layout, carried)
    layout = checkpoint.layout = _as_found(checkpoint, section, on_mesh, names)
    placement = on_mesh(layout, section)
    refuse_unheld(placement, name)
    placement.pads = _pads(placement, held)
    stored = list(placement.stored(aliases=True))
    faults = [f"{piece}: {fault}" for s in unlike(stored) for fault in faults_of(s) if (piece := held.get(s.rank, {}).get(s.name))]
    found = placed(stored, filed, f" by layout {layout.name}")
    missing = [
        f"{s.name} is missing (rank {s.rank}), expected shape {list(s.shape)}"
        for s in found.missing
        if not s.entry.alias and not copied(layout, s.entry)
    ]
    problems = placement.problems + found.problems + faults + missing
    buffers, omit = layout.buffers(section), layout.omitted(section)
    constants = {name for rank in placement.ranks for name, _ in placement.constants(rank)} if section.constants else set()
    for piece in found.rest:
        computed = piece.name in constants or any(fnmatchcase(piece.name, pattern) for pattern in buffers)
        if not computed and not any(fnmatchcase(piece.name, pattern) for pattern in omit):
            problems.append(f"{piece.name} ({piece.file}) is not in layout {layout.name}")
            continue
        checkpoint.dropped.append(piece.name)
        checkpoint.dropped_bytes += piece.nbytes
        if not computed:
            checkpoint.left_out.append(_by_itself(piece))
    if scales:
        checkpoint.layout = _unscaled(layout, [(s, scales[s.file, s.start]) for s in found.stored if (s.file, s.start) in scales], problems)
    if problems:
        raise PlanError(list(dict.fromkeys(problems)), _what_is_expected(checkpoint))
    check_constants(checkpoint.path, placement, held)
    checkpoint.stored = list({(s.file, s.start, s.name, s.shape): s for s in reversed(found.stored)}.values())[
        ::-1
    ]  # one file of all ranks: once
    if contents.states is not None:
        lacking = {(s.rank, s.name) for s in found.missing}
        checkpoint.states, checkpoint.whole = contents.states, [s for s in stored if (s.rank, s.name) not in lacking]
    checkpoint.dropped = sorted(set(checkpoint.dropped))


def copied(layout: Layout, entry: Entry) -> bool:
    """Whether `entry` repeats tensors of another place (the embedding beside a prediction layer): files may lack it."""
    return entry.copy and all(layout.descriptor.tensors[name].place != entry.place for name in entry.of)


def _unscaled(layout: Layout, held: list[tuple[Stored, float]], problems: list[str]) -> Layout:
    """`layout` with how the tensors are computed that files hold times a number."""
    by: dict[str, tuple[float, tuple[int, ...]]] = {}
    for s, scale in held:
        for key, _ in s.blocks:
            if by.setdefault(bare(key[0]), (scale, layout.shape_of(key)))[0] != scale:
                problems.append(f"{s.name} ({s.file}) is held times {scale:g}, others of its kind times {by[bare(key[0])][0]:g}")
    values = {
        name: Value("divided", (Operand.alike(formed(name, SCALED), shape),), settings=(("by", scale),))
        for name, (scale, shape) in by.items()
    }
    return replace(layout, values={**layout.values, **values}, _cache={})


def _reach(piece: Piece) -> tuple[int, ...] | None:
    """The least shape that a stored tensor may have, by one of its pieces; None where that is not known."""
    if piece.extent is not None:
        return piece.extent
    return tuple(map(sum, zip(piece.region.offsets, piece.shape))) if isinstance(piece.region, Chunk) else None


def _what_is_expected(checkpoint: Checkpoint) -> str:
    own = checkpoint.layout.descriptor.path
    if own:
        return (
            f"`reshard layouts show {own}` tells what {own} expects: is it right, and config.json ({checkpoint.config_path}) this model's?"
        )
    return f"is config.json ({checkpoint.config_path}) this model's? `reshard layouts show {checkpoint.layout.name}` tells what is expected"


def _prefixed(layout: Layout, section: Section, on_mesh: OnMesh, names: Set[str]) -> Section:
    """The section under those prefixes of its places under which the files have most names; the first where none has more."""
    if not section.prefixes:
        return section
    found = [sum(s.name in names for s in on_mesh(layout, each).stored()) for each in (section, *section.prefixes)]
    return (section, *section.prefixes)[found.index(max(found))]


def _as_found(checkpoint: Checkpoint, section: Section, on_mesh: OnMesh, held: Set[str]) -> Layout:
    """The layout with the optional places and without the optional tensors that the files have and lack. A place is there
    with all its tensors or not at all. Raises PlanError."""
    layout, there, problems = checkpoint.layout, set(), []
    for place in sorted(layout.absent):
        entries = tuple(e for e in section.entries if e.place == place and not e.alias and not copied(layout, e))
        names = {s.name for s in on_mesh(layout.present([place]), Section(entries)).stored()}
        if names & held:
            there.add(place)
            problems += [f"{name} is missing, though others of place {place} are there" for name in sorted(names - held)]
    if problems:
        raise PlanError(problems, _what_is_expected(checkpoint))
    layout = layout.present(there) if there else layout
    if not any(tensor.optional for tensor in layout.descriptor.tensors.values()):
        return layout
    placement, lacking = on_mesh(layout, section), []
    for entry in section.entries:
        tensors = [layout.descriptor.tensors[name] for name in entry.of]
        if not entry.omit and all(tensor.optional for tensor in tensors):
            for number in placement.holding(entry):
                probe = on_mesh(layout, Section((entry,))).stored(number=number)
                if all(layout.holds(t.optional, t.place, number) for t in tensors) and not any(s.name in held for s in probe):
                    lacking += [(tensor.name, number) for tensor in tensors]
    return layout.without(tensors=lacking) if lacking else layout


def _as_written(layout: Layout, section: Section, on_mesh: OnMesh, held: Held) -> Section:
    """The section with the entries of those variants whose names (or cuts, where these differ) the files really hold."""
    layout = layout.present(layout.absent)  # of optional places, too
    for _, _, variant in section.variants:
        present = []
        for entry in variant.entries:
            probe = on_mesh(layout, Section((entry,)))
            first = next(probe.stored(), None)
            piece = None if first is None else held.get(first.rank, {}).get(first.name)
            base = next((e for e in section.entries if (e.place, e.label) == (entry.place, entry.label)), None)
            alike = base is not None and base.name == entry.name  # cut otherwise under the same name: shapes tell
            if first is not None and piece is not None and not (alike and piece.extent not in (None, first.shape)):
                present.append(entry)
        if present:
            section = section.overlaid(replace(variant, entries=tuple(present)))
    return section


def _pads(placement: Placement, held: Held) -> dict[str, int]:
    """Padded sizes that the files show where they differ from the layout's rule."""
    pads: dict[str, int] = {}
    entries = tuple(e for e in placement.section.entries if e.pad)
    probe = placement.trial(section=replace(placement.section, entries=entries))
    for s in probe.stored():
        piece = held.get(s.rank, {}).get(s.name)
        extent = piece.extent if piece else None
        entry: Entry = s.entry
        if extent and len(extent) == len(s.shape):
            axis = entry.pad[0][0]
            padded = extent[0] * placement.mesh.tp
            if extent[0] != s.shape[0] and padded >= placement.layout.sizes.get(axis, padded + 1):
                pads[axis] = padded
    return pads


def _by_itself(piece: Piece) -> Stored:
    """A tensor that the layout does not describe, under a key of its own name: equal pieces of other ranks have other keys."""
    own = f" (rank {piece.held_by})" if piece.held_by else ""
    key = (piece.name + own if piece.region is None else f"{piece.name}{own}, {piece.described}",)
    block = Block(tuple((0, size) for size in piece.shape), 0, piece.strides or row_major(piece.shape))
    return Stored(piece.held_by, piece.name, piece.dtype, piece.shape, singles([(key, block)]), file=piece.file, start=piece.offset)
