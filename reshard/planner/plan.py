"""The plan of a job that fills stored tensors from a source (``make`` makes it). Pure.

A plan is a join with the files' choice on top: of several holders of a piece the first is read, and the others are compared
with it. It stays in patterns × instances until it runs: sums cost by the pattern, and ``tile`` spells out the copies of one
group of tensors at a time.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from reshard.dtypes import DTYPE_SIZE
from reshard.geometry.block import Block, Box, Key, Stored, overlap, volume
from reshard.geometry.pieces import union_volume
from reshard.planner.copies import Computed, Copy, Lying, Move
from reshard.planner.join import Join, Pattern, Run, Slot, join
from reshard.planner.values import bare, operand_key


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
