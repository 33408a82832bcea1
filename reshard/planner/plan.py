"""The plan of a job that fills stored tensors from a source: dtypes decided, every element counted, all problems together. Pure.

A plan is a join with the files' choice on top: of several holders of a piece the first is read, and the others are compared
with it. It stays in patterns × instances until it runs: sums cost by the pattern, and ``tile`` spells out the copies of one
group of tensors at a time.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

from reshard.dtypes import DTYPE_SIZE, FLOATS, INTEGERS
from reshard.errors import PlanError
from reshard.geometry.block import Block, Box, Key, Stored, end, overlap, volume
from reshard.geometry.coverage import faults_of, label, unlike
from reshard.geometry.pieces import union_volume
from reshard.planner.copies import Computed, Copy, Lying, Move
from reshard.planner.join import Join, Pattern, Run, Slot, join
from reshard.planner.values import Value, bare, operand_key


def move_between(source: Slot, destination: Slot, box: Box) -> Move:
    """The move of `box`, which both slots hold, relative to where they begin."""
    src = sum((b[0] - own[0]) * stride for b, own, stride in zip(box, source.box, source.strides))
    dst = sum((b[0] - own[0]) * stride for b, own, stride in zip(box, destination.box, destination.strides))
    return Move(box, volume(box), src, source.strides, dst, destination.strides)


@dataclass(frozen=True)
class Work:
    """What a pattern comes to when the first holder of each piece is read: moves between slots, and replicas to compare."""

    copies: tuple[tuple[int, int, Move], ...]  # source slot, destination slot
    checks: tuple[tuple[int, int, Move], ...]  # source slot, another source slot that holds the same box

    @classmethod
    def every_pair(cls, pattern: Pattern) -> "Work":
        """Every holder of each piece with everyone who wants it."""
        copies = [
            (holder, taker, move_between(pattern.sources[holder], pattern.destinations[taker], piece.box))
            for piece in pattern.pieces
            for holder in piece.sources
            for taker in piece.destinations
        ]
        return cls(tuple(copies), ())

    @classmethod
    def of(cls, pattern: Pattern, compare: bool) -> "Work":
        """The first holder of each piece; `compare` it with the others."""
        copies = [
            (piece.sources[0], taker, move_between(pattern.sources[piece.sources[0]], pattern.destinations[taker], piece.box))
            for piece in pattern.pieces
            for taker in piece.destinations
        ]
        checks: dict[tuple[int, int], Move] = {}
        held = [piece.sources for piece in pattern.pieces] + [at for operand in pattern.holders for at in operand.values()]
        for first, *others in held if compare else ():
            for other in others:
                slot = pattern.sources[first]
                checks[first, other] = move_between(slot, pattern.sources[other], slot.box)
        return cls(tuple(copies), tuple((a, b, move) for (a, b), move in checks.items()))

    def read(self, pattern: Pattern, checks: bool, rank: int | None = None) -> int:
        """Source bytes of one instance, each element once: for one destination rank alone, where that is given."""
        boxes: dict[int, list[Box]] = defaultdict(list)
        for source, taker, move in self.copies:
            if rank is None or pattern.destinations[taker].rank == rank:
                boxes[source].append(move.box)
        for first, other, move in self.checks if checks else ():
            boxes[first].append(move.box)
            boxes[other].append(move.box)
        total = sum(union_volume(held) * DTYPE_SIZE[pattern.sources[slot].dtype] for slot, held in boxes.items())
        for need in pattern.needs:  # every box that is computed takes its operands by itself
            if rank is None or any(pattern.destinations[taker].rank == rank for taker in need.takers):
                for box, holders in zip(need.operands, pattern.holders):
                    total += sum(
                        volume(meet) * DTYPE_SIZE[pattern.sources[at[0]].dtype]
                        for other, at in holders.items()
                        if (meet := overlap(box, other)) is not None
                    )
        return total


@dataclass(frozen=True)
class Plan:
    """All copies that fill the destinations of `join`; `compare`: replicas in the source are compared with what is used.

    `every_pair`: not one holder of each piece, but all of them, as a comparison of two sides wants.
    """

    join: Join
    compare: bool = True
    every_pair: bool = False

    @property
    def destinations(self) -> tuple[Stored, ...]:
        return self.join.destinations

    @cached_property
    def work(self) -> tuple[Work, ...]:
        """Per pattern, its copies and checks."""
        return tuple(Work.every_pair(p) if self.every_pair else Work.of(p, self.compare) for p in self.join.patterns)

    def spelled(self, run: Run, i: int) -> tuple[list[Copy], list[Copy]]:
        """The copies and checks of one instance of a run."""
        key, work = run.key(i), self.work[run.pattern]
        here = [(self.join.sources[n], start) for n, start in (column.at(i) for column in run.sources)]
        there = [(self.join.destinations[n], start) for n, start in (column.at(i) for column in run.destinations)]
        copies = [copy_at(key, here[a], there[b], move) for a, b, move in work.copies]
        slots = self.join.patterns[run.pattern].sources
        keys = [operand_key(slots[a].operand, key) if slots[a].operand else key for a, _, _ in work.checks]
        return copies, [copy_at(own, here[a], here[b], move) for own, (a, b, move) in zip(keys, work.checks)]

    def computed(self, run: Run, i: int) -> list[Computed]:
        """The boxes that are computed of one instance of a run."""
        pattern = self.join.patterns[run.pattern]
        if pattern.value is None:
            return []

        def lying(side: tuple[Stored, ...], column: tuple[int, int], slot: Slot) -> Lying:
            return Lying(side[column[0]], Block(slot.box, column[1], slot.strides))

        here = [lying(self.join.sources, column.at(i), slot) for column, slot in zip(run.sources, pattern.sources)]
        there = [lying(self.join.destinations, column.at(i), slot) for column, slot in zip(run.destinations, pattern.destinations)]
        sources = tuple(tuple(here[at[0]] for at in held.values()) for held in pattern.holders)
        return [Computed(run.key(i), pattern.value, need.box, tuple(there[t] for t in need.takers), sources) for need in pattern.needs]

    @property
    def copies(self) -> list[Copy]:
        """All of them, spelled out: as many objects as the model has pieces."""
        return [copy for run in self.join.runs for i in range(run.count) for copy in self.spelled(run, i)[0]]

    @property
    def checks(self) -> list[Copy]:
        return [
            copy for run in self.join.runs if self.work[run.pattern].checks for i in range(run.count) for copy in self.spelled(run, i)[1]
        ]

    @cached_property
    def bytes_read(self) -> int:
        """Bytes taken from the sources: each source element that some rank needs, once, and replicas to compare."""
        return self._sum(self.bytes_of_one)

    @cached_property
    def least_bytes_read(self) -> int:
        """Bytes that any way of filling `destinations` must read: each source element that some rank needs, once."""
        return self._sum(work.read(pattern, checks=False) for pattern, work in zip(self.join.patterns, self.work))

    @cached_property
    def bytes_of_one(self) -> tuple[int, ...]:
        """Per pattern, source bytes that one instance takes, replicas to compare among them."""
        return tuple(work.read(pattern, checks=True) for pattern, work in zip(self.join.patterns, self.work))

    def _sum(self, of_one: Iterable[int]) -> int:
        return sum(size * count for size, count in zip(of_one, self.join.counts))

    @cached_property
    def bytes_held(self) -> int:
        """Bytes of all destination tensors, padding included."""
        return sum(stored.size * DTYPE_SIZE[stored.dtype] for stored in self.destinations)

    @property
    def padding(self) -> list[Stored]:
        """Destinations with elements that no tensor fills."""
        return [stored for stored in self.destinations if stored.padding]

    @property
    def padded(self) -> list[str]:
        return sorted({stored.name for stored in self.padding})

    def per_rank(self) -> list[dict[str, int]]:
        """What each destination rank reads if it reads alone, and holds, in bytes."""
        held: dict[int, int] = defaultdict(int)
        for stored in self.destinations:
            held[stored.rank] += stored.size * DTYPE_SIZE[stored.dtype]
        read = dict.fromkeys(held, 0)
        for pattern, work, count in zip(self.join.patterns, self.work, self.join.counts):
            for rank in {slot.rank for slot in pattern.destinations}:
                read[rank] += work.read(pattern, checks=False, rank=rank) * count
        return [{"rank": rank, "bytes_read": read[rank], "bytes_held": held[rank]} for rank in sorted(held)]

    @property
    def computes(self) -> dict[str, str]:
        """The tensors that are computed, of whatever layer, each with its function."""
        found = {
            bare(run.first[0]): value.function for run in self.join.runs if (value := self.join.patterns[run.pattern].value) is not None
        }
        return dict(sorted(found.items()))

    @cached_property
    def fingerprint(self) -> str:
        """A digest of every stored tensor of both sides, every block in them, and what is compared: equal plans, and only they, share one."""
        return hashlib.sha256(
            repr((self.compare, self.every_pair, digest(self.join.sources), digest(self.join.destinations), self.join.values)).encode()
        ).hexdigest()

    def only(self, files: Iterable[str]) -> "Plan":
        """What of the plan fills these output files."""
        wanted = set(files)
        return replace(self, join=join(self.join.sources, [s for s in self.destinations if s.file in wanted], dict(self.join.values)))

    def located(self, destinations: Iterable[Stored]) -> "Plan":
        """The plan with its destinations, in the same order, at their places in files."""
        return replace(self, join=replace(self.join, destinations=tuple(destinations)))


def digest(side: Iterable[Stored]) -> str:
    """sha256 over stored tensors: name, place and every block of each."""
    out = hashlib.sha256()
    for s in side:
        parts = [(p.first, p.block.box, p.block.offset, p.block.strides, p.count, p.step) for p in s.parts]
        out.update(repr((s.rank, s.name, s.dtype, s.shape, s.file, s.start, s.pad, parts)).encode())
    return out.hexdigest()


def copy_at(key: Key, here: tuple[Stored, int], there: tuple[Stored, int], move: Move) -> Copy:
    """The copy whose `move` is relative to an element of each side: the stored tensor, and where in it the slot begins."""
    (src, a), (dst, b) = here, there
    return Copy(key, src, dst, Move(move.box, move.size, a + move.src_offset, move.src_strides, b + move.dst_offset, move.dst_strides))


def plan(
    sources: Iterable[Stored],
    destinations: Iterable[Stored],
    *,
    cast: str | None = None,
    keep: Iterable[str] = (),
    native: Mapping[str, str] = {},
    sizes: Callable[[Key], tuple[int, ...]] | None = None,
    omitted: Container[Key] = frozenset(),
    complete: bool = True,
    check: bool = True,
    values: Mapping[str, Value] = {},
) -> Plan:
    """The plan that fills `destinations` from `sources`; gives the destinations their dtypes.

    `cast`: store floats as this dtype, but narrow none of the tensors named in `keep`. `native`: the model's own dtype
    of tensors that the source's engine wanted in another. `sizes`: of a tensor of the model, its size along each axis.
    `complete`: every element of every source must have a place (off when only some ranks are asked for; needs `sizes`),
    but for those tensors that the destination is declared to do without, `omitted`.
    `check`: compare replicas. `values`: how tensors are computed that the source lacks. Raises PlanError with all problems.
    """
    sources = tuple(sources)
    destinations, problems = typed(sources, tuple(destinations), cast, set(keep), native, values)
    joined = join(sources, destinations, values)
    problems += faults(joined.destinations)
    problems += _unmatched(joined, complete, omitted)
    problems += _counted(joined, sizes if complete else None, check)
    if problems:
        raise PlanError(list(dict.fromkeys(problems)))
    return Plan(joined, check)


def target_dtype(source: str, *, cast: str | None = None, keep: bool = False, wanted: str | None = None) -> str:
    """The dtype that a tensor of `source` is stored in: the one its engine wants, else floats follow `cast`, which
    never narrows those to `keep`. Whole numbers stay whole numbers."""
    if source not in FLOATS:
        return wanted if wanted in INTEGERS and source in INTEGERS else source
    if wanted or cast is None:
        return wanted or source
    return source if keep and DTYPE_SIZE[cast] < DTYPE_SIZE[source] else cast


def typed(
    sources: Sequence[Stored],
    destinations: Sequence[Stored],
    cast: str | None,
    keep: set[str],
    native: Mapping[str, str],
    values: Mapping[str, Value] = {},
) -> tuple[tuple[Stored, ...], list[str]]:
    """`destinations` with the dtypes that they get from `sources`, and what is wrong with those."""
    held: dict[str, set[str]] = defaultdict(set)  # of all layers and experts
    for s in sources:
        for part in s.parts:
            held[part.first[0]].add(s.dtype)
    computed = {
        name: value.dtype or next(iter(held[value.operands[0].name])) for name, value in values.items() if value.operands[0].name in held
    }
    for name, own_dtype in computed.items():
        held[name].add(own_dtype)
    mixed = {name for name, dtypes in held.items() if len(dtypes) > 1}
    own = {key: s.dtype for s in reversed(sources) for key, _ in s.blocks if key[0] in mixed} if mixed else {}
    any_of = {name: next(iter(dtypes)) for name, dtypes in held.items()}

    def dtype_of(stored: Stored, name: str, source: str) -> str:
        wanted = stored.entry.dtype if stored.entry else None
        return target_dtype(native.get(name, source), cast=cast, keep=name in keep, wanted=wanted)

    problems: list[str] = []
    out = []
    sound: dict[tuple[object, ...], str] = {}  # the dtype of what holds these tensors for such an engine, where nothing is wrong with it
    for stored in destinations:
        alike = tuple([part.first[0] for part in stored.parts]), stored.entry and stored.entry.dtype
        dtype = sound.get(alike)
        if dtype is not None:
            out.append(Stored(stored.rank, stored.name, dtype, *stored[3:]))
            continue
        told = len(problems)
        found: dict[str, Key] = {}
        for part in stored.parts:
            name = part.first[0]
            for key, source in (
                ((key, own.get(key, computed.get(name))) for key, _ in part.each()) if name in mixed else ((part.first, any_of.get(name)),)
            ):
                if source is None:
                    continue  # told as missing
                wanted = dtype_of(stored, name, source)
                found.setdefault(wanted, key)
                if wanted != source and not any({source, wanted} <= set(kinds) for kinds in (FLOATS, INTEGERS)):
                    problems.append(
                        f"{where(stored)}: {label(key)} is {source} and cannot become {wanted}: floats become floats, whole numbers whole numbers"
                    )
        if len(found) > 1:
            kinds = ", ".join(f"{label(key)} is {dtype}" for dtype, key in found.items())
            problems.append(f"{where(stored)} fuses tensors of different dtypes: {kinds}")
        name = stored.entry.of[0] if stored.entry else ""
        # all padding on this rank: of the dtype that the tensor has elsewhere
        dtype = next(iter(found), None) or stored.dtype or dtype_of(stored, name, native.get(name) or any_of.get(name, "BF16"))
        out.append(Stored(stored.rank, stored.name, dtype, *stored[3:]))
        if found and len(problems) == told and mixed.isdisjoint(alike[0]):
            sound[alike] = dtype
    return tuple(out), problems


def faults(destinations: Iterable[Stored]) -> list[str]:
    """Names that stand twice, and stored tensors whose elements are not each under one block or declared padding."""
    problems = []
    names: set[tuple[int, str]] = set()
    for stored in destinations:
        at = stored.rank, stored.name
        if at in names:
            problems.append(f"{where(stored)}: two entries of the layout store something under this name")
        names.add(at)
    for stored in unlike(destinations):
        found = faults_of(stored)
        if stored.pad and stored.size - stored.pad != max((end(b.offset, b.shape, b.strides) for _, b in stored.blocks), default=0):
            found.append("its padding would lie between its elements; only the first axis of its first dimension can be padded")
        problems += [f"{where(stored)}: {fault}" for fault in found]
    return problems


def _unmatched(joined: Join, complete: bool, omitted: Container[Key]) -> list[str]:
    """Tensors that one side alone has."""
    holders = _first_holders(joined.destinations, set(joined.only_destination))
    problems = [f"{where(holders[key])} needs {label(key)}, which the source does not have" for key in joined.only_destination]
    if complete:
        lost = [key for key in joined.only_source if key not in omitted]
        holders = _first_holders(joined.sources, set(lost))
        problems += [f"{label(key)} ({where(holders[key])}) has no place in the destination" for key in lost]
    return problems


def _first_holders(side: Sequence[Stored], keys: set[Key]) -> dict[Key, Stored]:
    return {key: s for s in reversed(side) for key, _ in s.blocks if key in keys} if keys else {}


def _counted(joined: Join, sizes: Callable[[Key], tuple[int, ...]] | None, check: bool) -> list[str]:
    """Elements that no source holds, or that the destination has no place for: counted pattern by pattern."""
    problems: list[str] = []
    told = set()
    for run in joined.runs:
        pattern, name = joined.patterns[run.pattern], run.first[0]
        if (run.pattern, name) in told:
            continue
        sources = [joined.sources[column.at(0)[0]] for column in run.sources]
        before = len(problems)
        for i, operand, count, size in pattern.lacking:
            stored = joined.destinations[run.destinations[i].at(0)[0]]
            problems.append(
                f"{where(stored)}: {label(run.first)} is computed from {label(operand_key(operand, run.first))}, of which {count} of {size} elements are in no source file"
            )
        for i, count in pattern.missing:
            stored = joined.destinations[run.destinations[i].at(0)[0]]
            problems.append(
                f"{where(stored)}: {count} of {pattern.destinations[i].size} elements of {label(run.first)} are in no source file"
            )
        if pattern.overlapping:
            problems.append(f"{label(run.first)}: {where(sources[0])} and other ranks hold overlapping parts of it")
        problems += _unlike_dtypes(run, pattern, sources, check)
        for shape in {sizes(run.key(i)) for i in range(run.count)} if sizes else ():
            problems += _uncovered(run, pattern, shape)
        if len(problems) == before:
            told.add((run.pattern, name))  # sound for all of them; faults are told for each tensor
    return problems


def _unlike_dtypes(run: Run, pattern: Pattern, sources: list[Stored], check: bool) -> list[str]:
    """Holders of one tensor must agree on its dtype, replicas too where they are compared."""
    problems = []
    firsts: dict[str, Slot] = {}
    replicas: dict[tuple[str, Box], int] = {}
    for i, slot in enumerate(pattern.sources):
        first = firsts.setdefault(slot.operand, slot)
        other = replicas.setdefault((slot.operand, slot.box), i)
        if other != i and check and pattern.sources[other].dtype != slot.dtype:
            problems.append(
                f"{label(run.first)}: {where(sources[other])} holds it as {pattern.sources[other].dtype}, {where(sources[i])} as {slot.dtype}"
            )
        elif other == i and slot.dtype != first.dtype:
            problems.append(f"{label(run.first)}: {where(sources[0])} is {first.dtype}, {where(sources[i])} is {slot.dtype}")
    return problems


def _uncovered(run: Run, pattern: Pattern, shape: tuple[int, ...]) -> list[str]:
    """Whether the destination has a place for each element of a tensor of `shape`, and none outside of it."""
    boxes = frozenset(slot.box for slot in pattern.destinations)
    whole, count = prod(shape), union_volume(boxes)
    if not all(0 <= start < stop <= size for box in boxes for (start, stop), size in zip(box, shape, strict=True)):
        return [f"{label(run.first)}: the destination has elements of it past its sizes, {list(shape)}"]
    if count != whole:
        return [f"{label(run.first)}: {whole - count} of {whole} elements have no place in the destination"]
    return []


def where(stored: Stored) -> str:
    return f"{stored.name} (rank {stored.rank})" if not stored.file else f"{stored.name} ({stored.file})"
