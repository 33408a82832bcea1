"""The join: two sides of stored tensors lined up, in patterns × instances. Pure: no files, no torch, no clock.

Layers of a model, and experts of a layer, mostly lie alike: the same boxes of the same dtype on the same ranks, with the
same strides. A *pattern* is that likeness, worked out once: its slots on both sides and the pieces they share. A *run* is
consecutive instances of a pattern (experts of a layer; otherwise one tensor): which stored tensor fills each slot, and at
which element the slot begins there. All are values: no object's identity is a key, so a join can be compared, pickled,
divided and hashed.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from reshard.geometry.block import Box, Key, Part, Stored, overlap, volume
from reshard.geometry.pieces import Piece, by_box, disjoint, pieces, union_volume
from reshard.planner.values import Need, Value, Ways, operand_key, way_by, ways_of


@dataclass(frozen=True, slots=True)
class Slot:
    """How the tensors of a pattern lie on one rank: their box, its dtype and strides there. Where it begins, a run says.
    `operand` names the tensor where it is not the pattern's own but one that those are computed from."""

    rank: int
    dtype: str
    box: Box
    strides: tuple[int, ...]
    operand: str = ""

    @property
    def size(self) -> int:
        return volume(self.box)


#: what tells slots apart: rank, dtype, box, strides, operand
SlotShape = tuple[int, str, Box, tuple[int, ...], str]


@dataclass(frozen=True)
class Pattern:
    """Slots on both sides, and the pieces that they share; where there is a `value`, the boxes that are computed instead."""

    sources: tuple[Slot, ...]
    destinations: tuple[Slot, ...]
    value: Value | None = None

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        if self.value is not None:
            return ()
        return pieces([slot.box for slot in self.sources], [slot.box for slot in self.destinations])

    @cached_property
    def needs(self) -> tuple[Need, ...]:
        """What is computed: each box that a destination holds, once."""
        if self.value is None:
            return ()
        wanted = by_box([slot.box for slot in self.destinations])
        return tuple(Need(box, takers, tuple(operand.box(box) for operand in self.value.operands)) for box, takers in wanted.items())

    @cached_property
    def holders(self) -> tuple[dict[Box, tuple[int, ...]], ...]:
        """Per operand, the boxes of it that sources hold, each with the positions of its holders."""
        if self.value is None:
            return ()
        own = [[i for i, slot in enumerate(self.sources) if slot.operand == operand.name] for operand in self.value.operands]
        return tuple({box: tuple(mine[i] for i in at) for box, at in by_box([self.sources[i].box for i in mine]).items()} for mine in own)

    @cached_property
    def overlapping(self) -> bool:
        """Whether sources hold parts that meet without being the same."""
        if self.value is not None:
            return not all(disjoint(list(held)) for held in self.holders)
        return not disjoint(list({slot.box for slot in self.sources}))

    @cached_property
    def lacking(self) -> tuple[tuple[int, str, int, int], ...]:
        """What computing lacks: destination slot, operand, elements of it that no source holds, and how many are needed."""
        out = []
        for need in self.needs:
            for operand, box, held in zip(self.value.operands if self.value else (), need.operands, self.holders):
                found = [meet for other in held if (meet := overlap(box, other)) is not None]
                left = volume(box) - (union_volume(found) if found else 0)
                if left:
                    out += [(taker, operand.name, left, volume(box)) for taker in need.takers]
        return tuple(out)

    @cached_property
    def missing(self) -> tuple[tuple[int, int], ...]:
        """Destination slots that pieces do not fill, each with the number of elements that no source holds."""
        if self.value is not None:
            return ()
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
    values: tuple[tuple[str, Ways], ...] = ()  # how tensors are computed that the sources lack, by name

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """How many instances each pattern has."""
        found = [0] * len(self.patterns)
        for run in self.runs:
            found[run.pattern] += run.count
        return tuple(found)


def join(sources: Iterable[Stored], destinations: Iterable[Stored], values: Mapping[str, Ways] = {}) -> Join:
    """Line up the tensors of `sources` with those of `destinations`. `values` tell how tensors that the sources lack are computed
    from those that the destinations do not want."""
    sources, destinations = tuple(sources), tuple(destinations)
    slots: dict[SlotShape, int] = {}
    users = _users(values, {part.first[0] for s in destinations for part in s.parts} if values else set())
    held, wanted = _Side(sources, slots, users), _Side(destinations, slots)
    table = [Slot(*shape) for shape in slots]
    numbers: dict[tuple[tuple[int, ...], tuple[int, ...], Value | None], int] = {}
    runs: list[Run] = []
    only: tuple[list[Key], list[Key]] = [], []
    used: set[Key] = set()
    for family in wanted.families | held.families:
        for first, count, here, there in _lined_up(held.stretches(family), wanted.stretches(family)):
            operands = {table[i].operand for i in here.slots} if here else set()
            if here is None or there is None:
                keys = [_key(family, first + i) for i in range(count)]
                only[here is None].extend(operand_key(name, key) if name else key for name in operands or {""} for key in keys)
                continue
            value = way_by(values[family[0]], operands) if operands and "" not in operands else None
            if value or family[0] in users:
                names = operands if value else {family[0]}
                used.update(operand_key(name, _key(family, first + i)) for name in names for i in range(count))
            number = numbers.setdefault((here.slots, there.slots, value), len(numbers))
            runs.append(Run(_key(family, first), count, number, here.columns, there.columns))
    patterns = tuple(Pattern(tuple(table[i] for i in a), tuple(table[i] for i in b), value) for a, b, value in numbers)
    unused = tuple(key for key in dict.fromkeys(only[0]) if key not in used)
    return Join(sources, destinations, patterns, tuple(runs), unused, tuple(only[1]), tuple(sorted(values.items())))


def _users(values: Mapping[str, Ways], wanted: set[str]) -> dict[str, tuple[str, ...]]:
    """Per operand, the tensors of `wanted` that are computed from it, and itself where it is wanted, too."""
    out: dict[str, tuple[str, ...]] = {}
    for name in sorted(wanted & values.keys()):
        for operand in dict.fromkeys(operand.name for value in ways_of(values[name]) for operand in value.operands):
            out[operand] = (*out.get(operand, (operand,) if operand in wanted else ()), name)
    return out


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

    def __init__(self, stored: Sequence[Stored], slots: dict[SlotShape, int], users: Mapping[str, tuple[str, ...]] = {}):
        """`users`: of tensors that others are computed from, which those are: it is filed under each of them."""
        self.families: dict[Key, list[tuple[Part, int, int]]] = {}  # part, its slot, its stored tensor
        like: SlotShape | None = None
        slot = 0
        for number, s in enumerate(stored):
            for part in s.parts:
                block, key = part.block, part.first
                if users and key[0] in users:
                    self._file_operand(part, number, s, users[key[0]], slots)
                    continue
                shape = (s.rank, s.dtype, block.box, block.strides, "")
                if shape != like:  # experts follow each other and lie alike: comparing is cheaper than hashing
                    slot, like = slots.setdefault(shape, len(slots)), shape
                family = key if len(key) == 1 else key[:-1]
                found = self.families.get(family)
                if found is None:
                    found = self.families[family] = []
                found.append((part, slot, number))

    def _file_operand(self, part: Part, number: int, s: Stored, results: tuple[str, ...], slots: dict[SlotShape, int]) -> None:
        for result in results:
            key = (result, *part.first[1:])
            operand = part.first[0] if result != part.first[0] else ""
            slot = slots.setdefault((s.rank, s.dtype, part.block.box, part.block.strides, operand), len(slots))
            self.families.setdefault(key if len(key) == 1 else key[:-1], []).append((part, slot, number))

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
    numbers, alike = [part.first[-1] for part, _, _ in parts], {(part.block.offset, part.count, slot) for part, slot, _ in parts}
    if len(alike) == 1 and numbers == list(range(numbers[0], numbers[0] + len(numbers))):  # nearly always: each on one rank, in order
        ((offset, count, slot),) = alike
        if count == 1:
            return [_Stretch(numbers[0], len(parts), (slot,), (Column(tuple([number for _, _, number in parts]), offset),))]
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
