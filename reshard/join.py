"""The join: which box of which source goes where in which destination. Pure: no files, no torch, no clock.

``join(sources, destinations)`` intersects the blocks of both sides, checks that every element of every destination is
written exactly once or is padding, and that no element of a source is lost, and reports all problems together. A replica (two
sources that hold the same box) is read once for its bytes and once more to be compared.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain

from reshard.block import Block, Box, Key, Stored, end, overlap, volume
from reshard.coverage import Coverage, disjoint, label, union_volume
from reshard.errors import PlanError
from reshard.stores import DTYPE_SIZE

FLOATS = ("F64", "F32", "BF16", "F16")


@dataclass(frozen=True, slots=True)
class Move:
    """The geometry of a copy: a box (tensor's axes) of `size` elements, and where (elements) it lies on each side."""

    box: Box
    size: int
    src_offset: int
    src_strides: tuple[int, ...]
    dst_offset: int
    dst_strides: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.box)


@dataclass(slots=True)
class Copy:
    """One box of tensor `key`, from where `src` holds it to where `dst` holds it."""

    key: Key
    src: Stored
    dst: Stored
    move: Move

    @property
    def src_bytes(self) -> int:
        return self.move.size * DTYPE_SIZE[self.src.dtype]


@dataclass
class Plan:
    """All copies that fill `destinations`. `checks` compare a replica (dst) with the source that is used (src)."""

    destinations: list[Stored]
    copies: list[Copy]
    checks: list[Copy] = field(default_factory=list)

    @cached_property
    def bytes_read(self) -> int:
        """Bytes taken from the sources: each source element that some rank needs, once, and replicas to compare."""
        return _read_bytes(self.copies, self.checks)

    @cached_property
    def least_bytes_read(self) -> int:
        """Bytes that any way of filling `destinations` must read: each source element that some rank needs, once."""
        return _read_bytes(self.copies) if self.checks else self.bytes_read

    @property
    def bytes_held(self) -> int:
        """Bytes of all destination tensors, padding included."""
        return sum(stored.size * DTYPE_SIZE[stored.dtype] for stored in self.destinations)

    @property
    def padded(self) -> list[str]:
        return sorted({stored.name for stored in self.destinations if stored.padding})

    def per_rank(self) -> list[dict[str, int]]:
        """What each destination rank reads if it reads alone, and holds, in bytes."""
        held: dict[int, int] = defaultdict(int)
        for stored in self.destinations:
            held[stored.rank] += stored.size * DTYPE_SIZE[stored.dtype]
        copies: dict[int, list[Copy]] = {rank: [] for rank in sorted(held)}
        for copy in self.copies:
            copies[copy.dst.rank].append(copy)
        return [{"rank": r, "bytes_read": _read_bytes(own), "bytes_held": held[r]} for r, own in copies.items()]


def _read_bytes(copies: list[Copy], checks: Iterable[Copy] = ()) -> int:
    """Bytes of the sources under `copies` and (on both sides) `checks`; what several of them want counts once."""
    used: dict[tuple[int, Key], set[Box]] = {}
    width: dict[int, int] = {}
    for stored, copy in chain(((c.src, c) for c in copies), ((c.src, c) for c in checks), ((c.dst, c) for c in checks)):
        at = id(stored), copy.key
        boxes = used.get(at)
        if boxes is None:
            used[at] = {copy.move.box}
            width[id(stored)] = DTYPE_SIZE[stored.dtype]
        else:
            boxes.add(copy.move.box)
    return sum(union_volume(boxes) * width[source] for (source, _), boxes in used.items())


def target_dtype(source: str, *, cast: str | None = None, keep: bool = False, wanted: str | None = None) -> str:
    """The dtype that a tensor of `source` is stored in: the one its engine wants, else floats follow `cast`, which
    never narrows those to `keep`."""
    if source not in FLOATS:
        return source
    if wanted or cast is None:
        return wanted or source
    return source if keep and DTYPE_SIZE[cast] < DTYPE_SIZE[source] else cast


def holders(stored: Iterable[Stored]) -> dict[Key, list[tuple[Stored, Block]]]:
    """For each tensor of the model, what holds a part of it and which."""
    found: dict[Key, list[tuple[Stored, Block]]] = defaultdict(list)
    for s in stored:
        for key, block in s.blocks:
            found[key].append((s, block))
    return found


def join(
    sources: Iterable[Stored],
    destinations: Iterable[Stored],
    *,
    cast: str | None = None,
    keep: Iterable[str] = (),
    native: Mapping[str, str] = {},
    sizes: Mapping[str, tuple[int, ...]] = {},
    complete: bool = True,
    check: bool = True,
) -> Plan:
    """The plan that fills `destinations` from `sources`. Fills in the destinations' dtypes.

    `cast`: store floats as this dtype, but narrow none of the tensors named in `keep`. `native`: the model's own dtype
    of tensors that the source's engine wanted in another. `sizes`: per tensor of the model, its size along each axis.
    `complete`: every element of every source must have a place (off when only some ranks are asked for; needs `sizes`).
    `check`: compare replicas. Raises PlanError with all problems.
    """
    keep = set(keep)
    problems: list[str] = []
    held_by = holders(sources)
    moves: dict[tuple[int, int], Move | None] = {}
    distinct: dict[tuple[int, ...], bool] = {}
    dtype_of = {key[0]: held[0][0].dtype for key, held in reversed(held_by.items())} | dict(native)

    def dtype_for(stored: Stored, name: str, source: str) -> str:
        wanted = stored.entry.dtype if stored.entry else None
        return target_dtype(native.get(name, source), cast=cast, keep=name in keep, wanted=wanted)

    plan = Plan([], [])
    primaries: dict[Key, list[tuple[Stored, Block]]] = {}
    for key, held in held_by.items():
        if len(held) > 1:
            first: dict[Box, tuple[Stored, Block]] = {}
            for stored, block in held:
                if block.box not in first:
                    first[block.box] = stored, block
                elif check:
                    source, other = first[block.box]
                    if source.dtype != stored.dtype:
                        problems.append(f"{label(key)}: {where(source)} holds it as {source.dtype}, {where(stored)} as {stored.dtype}")
                    plan.checks.append(Copy(key, source, stored, move_between(other, block)))
            held = list(first.values())
            ids = tuple(id(block) for _, block in held)
            if ids not in distinct:
                distinct[ids] = disjoint([block.box for _, block in held])
            if not distinct[ids]:
                problems.append(f"{label(key)}: {where(held[0][0])} and other ranks hold overlapping parts of it")
        primaries[key] = held
    used: dict[Key, list[Block]] = defaultdict(list)
    coverage, names = Coverage(), set()
    for stored in destinations:
        plan.destinations.append(stored)
        if (stored.rank, stored.name) in names:
            problems.append(f"{where(stored)}: two entries of the layout store something under this name")
        names.add((stored.rank, stored.name))
        problems += [f"{where(stored)}: {fault}" for fault in coverage.faults(stored)]
        if stored.pad and stored.size - stored.pad != max((end(b.offset, b.shape, b.strides) for _, b in stored.blocks), default=0):
            problems.append(f"{where(stored)}: its padding would lie between its elements; only the first axis of its first dimension can be padded")
        dtypes = {}
        for key, block in stored.blocks:
            held = primaries.get(key)
            if held is None:
                problems.append(f"{where(stored)} needs {label(key)}, which the source does not have")
                continue
            used[key].append(block)
            filled = 0
            for source, other in held:
                at = id(other), id(block)
                if at in moves:
                    move = moves[at]
                else:
                    move = moves[at] = move_between(other, block)
                if move is not None:
                    plan.copies.append(Copy(key, source, stored, move))
                    filled += move.size
            if filled != block.size:
                problems.append(f"{where(stored)}: {block.size - filled} of {block.size} elements of {label(key)} are in no source file")
            dtype = held[0][0].dtype
            dtypes[wanted := dtype_for(stored, key[0], dtype)] = key
            if wanted != dtype and wanted not in FLOATS:
                problems.append(f"{where(stored)}: {label(key)} is {dtype} and cannot become {wanted}; only {', '.join(FLOATS)} are cast")
            for source, _ in held[1:]:
                if source.dtype != held[0][0].dtype:
                    problems.append(f"{label(key)}: {where(held[0][0])} is {held[0][0].dtype}, {where(source)} is {source.dtype}")
        if len(dtypes) > 1:
            kinds = ", ".join(f"{label(key)} is {dtype}" for dtype, key in dtypes.items())
            problems.append(f"{where(stored)} fuses tensors of different dtypes: {kinds}")
        if dtypes:
            stored.dtype = next(iter(dtypes))
        elif not stored.dtype:  # all padding on this rank: of the dtype that the tensor has elsewhere
            name = stored.entry.of[0]
            stored.dtype = dtype_for(stored, name, dtype_of.get(name, "BF16"))
    if complete:
        lost = [key for key in primaries if key not in used]
        problems += [f"{label(key)} ({where(primaries[key][0][0])}) has no place in the destination" for key in lost]
        problems += coverage.lost({key: blocks for key, blocks in used.items() if key[0] in sizes}, sizes, "destination")
    if problems:
        raise PlanError(list(dict.fromkeys(problems)))
    if check:
        plan.checks = [c for c in plan.checks if c.key in used]
    return plan


def move_between(source: Block, destination: Block) -> Move | None:
    """The copy of what two blocks of one tensor share; None when they do not meet."""
    box = overlap(source.box, destination.box)
    if box is None:
        return None
    src, dst = source.clip(box), destination.clip(box)
    return Move(box, volume(box), src.offset, src.strides, dst.offset, dst.strides)


def where(stored: Stored) -> str:
    return f"{stored.name} (rank {stored.rank})" if not stored.file else f"{stored.name} ({stored.file})"


