"""The join: two sides of stored tensors lined up, in patterns × instances. Pure: no files, no torch, no clock.

Layers of a model, and experts of a layer, mostly lie alike: the same boxes of the same dtype on the same ranks, with the
same strides. A *pattern* is that likeness, worked out once: its slots on both sides and the pieces they share. A *run* is
consecutive instances of a pattern (experts of a layer; otherwise one tensor): which stored tensor fills each slot, and at
which element the slot begins there. All are values: no object's identity is a key, so a join can be compared, pickled,
divided and hashed.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from reshard.geometry.block import Box, Key, Part, Stored, volume
from reshard.geometry.pieces import Piece, disjoint, pieces, union_volume


@dataclass(frozen=True, slots=True)
class Slot:
    """How the tensors of a pattern lie on one rank: their box, its dtype and strides there. Where it begins, a run says."""

    rank: int
    dtype: str
    box: Box
    strides: tuple[int, ...]

    @property
    def size(self) -> int:
        return volume(self.box)


#: what tells slots apart: rank, dtype, box, strides
SlotShape = tuple[int, str, Box, tuple[int, ...]]


@dataclass(frozen=True)
class Pattern:
    """Slots on both sides, and the pieces that they share."""

    sources: tuple[Slot, ...]
    destinations: tuple[Slot, ...]

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        return pieces([slot.box for slot in self.sources], [slot.box for slot in self.destinations])

    @cached_property
    def overlapping(self) -> bool:
        """Whether sources hold parts that meet without being the same."""
        return not disjoint(list({slot.box for slot in self.sources}))

    @cached_property
    def missing(self) -> tuple[tuple[int, int], ...]:
        """Destination slots that pieces do not fill, each with the number of elements that no source holds."""
        filled: dict[int, list[Box]] = {}
        for piece in self.pieces:
            for position in piece.destinations:
                filled.setdefault(position, []).append(piece.box)
        left = [slot.size - (union_volume(filled[i]) if i in filled else 0) for i, slot in enumerate(self.destinations)]
        return tuple((i, count) for i, count in enumerate(left) if count)


@dataclass(frozen=True, slots=True)
class Column:
    """The places of one slot over a run: stored tensor `stored[i]` (or always the one), from element `start + i·step` on."""

    stored: tuple[int, ...]
    start: int
    step: int = 0

    def at(self, i: int) -> tuple[int, int]:
        """(number of the stored tensor on its side, element at which the slot begins) of instance `i`."""
        return self.stored[i if len(self.stored) > 1 else 0], self.start + i * self.step


@dataclass(frozen=True, slots=True)
class Run:
    """`count` instances of a pattern: tensors whose keys are `first` and those that count up from its last number."""

    first: Key
    count: int
    pattern: int
    sources: tuple[Column, ...]
    destinations: tuple[Column, ...]

    def key(self, i: int) -> Key:
        return (*self.first[:-1], self.first[-1] + i) if i else self.first


@dataclass(frozen=True)
class Join:
    """All tensors that both sides have. `only_source` and `only_destination` are those that one side lacks."""

    sources: tuple[Stored, ...]
    destinations: tuple[Stored, ...]
    patterns: tuple[Pattern, ...]
    runs: tuple[Run, ...]
    only_source: tuple[Key, ...] = ()
    only_destination: tuple[Key, ...] = ()

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """How many instances each pattern has."""
        found = [0] * len(self.patterns)
        for run in self.runs:
            found[run.pattern] += run.count
        return tuple(found)


def join(sources: Iterable[Stored], destinations: Iterable[Stored]) -> Join:
    """Line up the tensors of `sources` with those of `destinations`."""
    sources, destinations = tuple(sources), tuple(destinations)
    slots: dict[SlotShape, int] = {}
    held, wanted = _Side(sources, slots), _Side(destinations, slots)
    table = [Slot(*shape) for shape in slots]
    numbers: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    runs: list[Run] = []
    only: tuple[list[Key], list[Key]] = [], []
    for family in wanted.families | held.families:
        for first, count, here, there in _lined_up(held.stretches(family), wanted.stretches(family)):
            if here is None or there is None:
                only[here is None].extend(_key(family, first + i) for i in range(count))
                continue
            number = numbers.setdefault((here.slots, there.slots), len(numbers))
            runs.append(Run(_key(family, first), count, number, here.columns, there.columns))
    patterns = tuple(Pattern(tuple(table[i] for i in a), tuple(table[i] for i in b)) for a, b in numbers)
    return Join(sources, destinations, patterns, tuple(runs), tuple(only[0]), tuple(only[1]))


@dataclass(slots=True)
class _Stretch:
    """Consecutive tensors of a family that fill the same slots."""

    first: int  # -1 of a tensor that has no number
    count: int
    slots: tuple[int, ...]
    columns: tuple[Column, ...]


def _key(family: Key, number: int) -> Key:
    return family if number < 0 else (*family, number)


class _Side:
    """One side's stored tensors by family: all of a key but its last number."""

    def __init__(self, stored: Sequence[Stored], slots: dict[SlotShape, int]):
        self.families: dict[Key, list[tuple[Part, int, int]]] = {}  # part, its slot, its stored tensor
        like: SlotShape | None = None
        slot = 0
        for number, s in enumerate(stored):
            for part in s.parts:
                block = part.block
                shape = (s.rank, s.dtype, block.box, block.strides)
                if shape != like:  # experts follow each other and lie alike: comparing is cheaper than hashing
                    slot, like = slots.setdefault(shape, len(slots)), shape
                key = part.first
                family = key if len(key) == 1 else key[:-1]
                found = self.families.get(family)
                if found is None:
                    found = self.families[family] = []
                found.append((part, slot, number))

    def stretches(self, family: Key) -> list[_Stretch]:
        """The family's tensors in order of their numbers, those with the same slots together."""
        parts = self.families.get(family)
        if not parts:
            return []
        if len(family) == 1 and len(parts[0][0].first) == 1:
            return [_Stretch(-1, 1, tuple(slot for _, slot, _ in parts), tuple(Column((n,), p.block.offset) for p, _, n in parts))]
        ranges = {(p.first[-1], p.count) for p, _, _ in parts}
        if len(ranges) == 1:  # all parts run over the same tensors
            ((first, count),) = ranges
            columns = tuple(Column((n,), p.block.offset, p.step if count > 1 else 0) for p, _, n in parts)
            return [_Stretch(first, count, tuple(slot for _, slot, _ in parts), columns)]
        return _merged(parts)


def _merged(parts: list[tuple[Part, int, int]]) -> list[_Stretch]:
    """Stretches of parts that run over different tensors: cut wherever one begins or ends, then joined where only the
    stored tensors differ (experts that are tensors of their own)."""
    marks = sorted({edge for part, _, _ in parts for edge in (part.first[-1], part.first[-1] + part.count)})
    index = {mark: i for i, mark in enumerate(marks)}
    covering: list[list[tuple[Part, int, int]]] = [[] for _ in marks]
    for item in parts:
        part = item[0]
        first = part.first[-1]
        if part.count == 1:
            covering[index[first]].append(item)
            continue
        for i in range(index[first], index[first + part.count]):
            covering[i].append(item)
    out: list[_Stretch] = []
    pending: list[tuple[int, ...]] = []  # stored tensors of the stretch that is being put together, instance by instance
    start: tuple[int, tuple[int, ...], tuple[int, ...]] = (0, (), ())  # its first number, slots and offsets

    def close() -> None:
        if pending:
            columns = tuple(Column(tuple(stored), offset) for stored, offset in zip(zip(*pending), start[2]))
            out.append(_Stretch(start[0], len(pending), start[1], columns))
            pending.clear()

    for low, high, here in zip(marks, [*marks[1:], marks[-1]], covering):
        if not here:
            close()
            continue
        slots = tuple([slot for _, slot, _ in here])
        offsets = tuple([p.block.offset + (low - p.first[-1]) * p.step if p.step else p.block.offset for p, _, _ in here])
        if high - low > 1:
            close()
            columns = tuple(Column((n,), offset, p.step) for (p, _, n), offset in zip(here, offsets))
            out.append(_Stretch(low, high - low, slots, columns))
            continue
        if pending and (start[1:] != (slots, offsets) or low != start[0] + len(pending)):
            close()
        if not pending:
            start = (low, slots, offsets)
        pending.append(tuple([n for _, _, n in here]))
    close()
    return out


def _lined_up(held: list[_Stretch], wanted: list[_Stretch]) -> Iterator[tuple[int, int, _Stretch | None, _Stretch | None]]:
    """The stretches of both sides cut where either begins or ends: (first number, count, held, wanted), None where one has nothing."""
    if len(held) <= 1 and len(wanted) <= 1:
        one, other = held[0] if held else None, wanted[0] if wanted else None
        either = one or other
        if either and (not one or not other or (one.first, one.count) == (other.first, other.count)):
            yield either.first, either.count, one, other
            return
    marks = sorted({edge for s in (*held, *wanted) for edge in (s.first, s.first + s.count)})
    for low, high in zip(marks, marks[1:]):
        a, b = (_within(side, low, high) for side in (held, wanted))
        if a or b:
            yield low, high - low, a, b


def _within(stretches: list[_Stretch], low: int, high: int) -> _Stretch | None:
    """What of `stretches` lies in [low, high), which none of them crosses."""
    for s in stretches:
        if s.first <= low and high <= s.first + s.count:
            skip, count = low - s.first, high - low
            columns = tuple(
                Column(c.stored[skip : skip + count] if len(c.stored) > 1 else c.stored, c.start + skip * c.step, c.step) for c in s.columns
            )
            return _Stretch(low, count, s.slots, columns)
    return None
