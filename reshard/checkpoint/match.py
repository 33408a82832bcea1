"""Every tensor in a checkpoint's files matched with its layout: what is missing, does not fit or is not explained, all together."""

from dataclasses import replace
from fnmatch import fnmatchcase
from math import prod

from reshard import formats
from reshard.checkpoint.opened import Checkpoint
from reshard.errors import PlanError
from reshard.formats.constants import check_constants
from reshard.geometry.block import Block, Stored, restride, row_major, singles
from reshard.geometry.coverage import faults_of
from reshard.layout import Entry, Layout, Placement, Section
from reshard.layout.check import refuse_unheld
from reshard.layout.fusion import slice_dim


def match(checkpoint: Checkpoint, kind: formats.Format, contents: formats.Contents) -> None:
    """Fill in `checkpoint.stored` and `.dropped`; raises PlanError with every tensor that is missing or doesn't fit."""
    layout, mesh = checkpoint.layout, contents.mesh
    rules = kind.rules if contents.stages is None else replace(kind.rules, stages=lambda layers, stages: contents.stages)
    if contents.stages is not None and sum(map(len, contents.stages)) != layout.layers:
        raise PlanError([f"{checkpoint.path} holds {sum(map(len, contents.stages))} layers, config.json says {layout.layers}"])
    section = _as_written(layout, _prefixed(layout, layout.section(kind.section), rules, contents), rules, contents)
    layout = checkpoint.layout = _as_found(checkpoint, section, rules, contents)
    placement = Placement(layout, section, rules, mesh)
    refuse_unheld(placement, kind.section)
    placement.pads = _pads(placement, contents)
    problems: list[str] = []
    left = [dict(rank) for rank in contents.tensors]
    stored: list[Stored] = []
    for s in _pieces(placement, contents) if contents.boxes is not None else placement.stored(aliases=True):
        found = left[s.rank].pop(s.name, None) if s.rank < len(left) else None
        if found is None:
            if not s.entry.alias:
                problems.append(f"{s.name} is missing (rank {s.rank}), expected shape {list(s.shape)}")
            continue
        file, info = found
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
    check_constants(checkpoint.path, placement, contents.tensors)
    checkpoint.stored = stored
    checkpoint.dropped = sorted(set(checkpoint.dropped))


def _what_is_expected(checkpoint: Checkpoint) -> str:
    own = checkpoint.layout.descriptor.path
    if own:
        return (
            f"`reshard layouts show {own}` tells what {own} expects: is it right, and config.json ({checkpoint.config_path}) this model's?"
        )
    return f"is config.json ({checkpoint.config_path}) this model's? `reshard layouts show {checkpoint.layout.name}` tells what is expected"


def _prefixed(layout: Layout, section: Section, rules, contents: formats.Contents) -> Section:
    """The section under those prefixes of its places under which the files have most names; the first where none has more."""
    if not section.prefixes:
        return section
    held = set().union(*contents.tensors)
    found = [sum(s.name in held for s in Placement(layout, each, rules, contents.mesh).stored()) for each in (section, *section.prefixes)]
    return (section, *section.prefixes)[found.index(max(found))]


def _as_found(checkpoint: Checkpoint, section: Section, rules, contents: formats.Contents) -> Layout:
    """The layout with the optional places and without the optional tensors that the files have and lack. A place is there
    with all its tensors or not at all. Raises PlanError."""
    layout, held = checkpoint.layout, set().union(*contents.tensors)
    there, problems = set(), []
    for place in sorted(layout.absent):
        entries = tuple(entry for entry in section.entries if entry.place == place and not entry.alias)
        names = {s.name for s in Placement(layout.present([place]), Section(entries), rules, contents.mesh).stored()}
        if names & held:
            there.add(place)
            problems += [f"{name} is missing, though others of place {place} are there" for name in sorted(names - held)]
    if problems:
        raise PlanError(problems, _what_is_expected(checkpoint))
    layout = layout.present(there) if there else layout
    if not any(tensor.optional for tensor in layout.descriptor.tensors.values()):
        return layout
    placement, lacking = Placement(layout, section, rules, contents.mesh), []
    for entry in section.entries:
        tensors = [layout.descriptor.tensors[name] for name in entry.of]
        if not entry.omit and all(tensor.optional for tensor in tensors):
            for number in placement.holding(entry):
                probe = Placement(layout, Section((entry,)), rules, contents.mesh).stored(number=number)
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
            probe = Placement(layout, Section((entry,)), rules, contents.mesh)
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
