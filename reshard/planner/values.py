"""Values: tensors that are computed from others, and which elements of each operand a box of the result needs. Pure.

A copy moves elements as they are; a value is a function of several tensors' elements: codes and block scales give a weight,
a weight gives its codes. The planner knows no function by name (``executor/values.py`` does): a value says what it is called, and
per operand how its axes lie over the axes of the result. From that follow which boxes must be read, that they are there, where
a tile may be cut so that nothing is read twice, and what it all costs.
"""

from collections.abc import Container, Iterator
from dataclasses import dataclass
from functools import cache
from math import gcd, lcm, prod

from reshard.geometry.block import Box, Key


@dataclass(frozen=True, slots=True)
class Over:
    """How one axis of an operand lies over axes of the result.

    `axes` of the result, the slowest first, are one flat range; `sizes` are theirs. `grain` of its elements share one element of
    the operand (a scale of 128 rows); an element of the result takes `times` of them (the scale *of* 128 rows); what is taken is
    rounded out to whole multiples of `closed` (a code depends on all of its block). Without axes every element of the result
    takes the whole axis. `size` is the operand's own.
    """

    axes: tuple[int, ...]
    sizes: tuple[int, ...]
    size: int
    grain: int = 1
    times: int = 1
    closed: int = 1

    def extent(self, box: Box) -> tuple[int, int]:
        """What of the operand's axis `box`, of the result, takes."""
        if not self.axes:
            return 0, self.size
        low = high = 0
        for axis, size in zip(self.axes, self.sizes):
            start, stop = box[axis]
            low, high = low * size + start, high * size + stop - 1
        low, high = low * self.times, (high + 1) * self.times
        low, high = low - low % self.closed, high + -high % self.closed
        return low // self.grain, min(-(-high // self.grain), self.size)

    def whole(self, box: Box) -> bool:
        """Whether `box` takes elements of the operand that nothing outside of it takes."""
        if not self.axes or self.grain == 1:
            return True
        flat, inside, total = 0, True, prod(self.sizes)
        for axis, size in zip(self.axes, self.sizes):
            start, stop = box[axis]
            if not inside and (start, stop) != (0, size):
                return False  # not one range
            flat, inside = flat * size + start, inside and stop - start == 1
        low = flat
        high = low + prod(box[axis][1] - box[axis][0] for axis in self.axes)
        return low % self.grain == 0 and (high % self.grain == 0 or high == total)

    def step(self, box: Box, axis: int) -> tuple[int, int]:
        """Where `box` may be cut along `axis` so that no element of the operand is on both sides: at (the first place, and every so many)."""
        if axis not in self.axes:
            return 0, 1
        at = self.axes.index(axis)
        before = 0
        for other, size in zip(self.axes[:at], self.sizes[:at]):
            start, stop = box[other]
            if stop - start > 1:  # the cut would run through every one of them
                return 0, 0
            before = before * size + start
        inner, whole = prod(self.sizes[at + 1 :]) * self.times, lcm(self.grain, self.closed)
        unit = whole // gcd(whole, inner)
        base = before * self.sizes[at] * inner
        first = next((p for p in range(unit) if (base + p * inner) % whole == 0), None)
        return (0, 0) if first is None else (first, unit)


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor that a value is computed from, by its name in the model; its numbers (layer, expert) are the result's."""

    name: str
    axes: tuple[Over, ...]
    grain: str = ""  # how many elements of each dimension share one, for people

    @property
    def label(self) -> str:
        return self.name.rpartition(".")[2]

    @classmethod
    def alike(cls, name: str, shape: tuple[int, ...]) -> "Operand":
        """One whose elements stand where those of the result do."""
        return cls(name, tuple(Over((axis,), (size,), size) for axis, size in enumerate(shape)))

    def box(self, box: Box) -> Box:
        """What of it `box`, of the result, takes: in the operand's own axes."""
        return tuple([over.extent(box) for over in self.axes])


@dataclass(frozen=True, slots=True)
class Value:
    """How a tensor is computed: a function's name, its operands, and what else it needs. `dtype` of the result; None: the first operand's."""

    function: str
    operands: tuple[Operand, ...]
    dtype: str | None = None
    settings: tuple[tuple[str, int | float | str], ...] = ()

    def cuts(self, box: Box, axis: int) -> tuple[int, int] | None:
        """Where `box` may be cut along `axis` so that no element of any operand is read for both sides: at (the first place, every
        so many); None where nowhere. An operand that the axis does not touch is the same on both sides."""
        places = {over.step(box, axis) for operand in self.operands for over in operand.axes}
        if any(unit == 0 for _, unit in places):
            return None
        whole = lcm(*(unit for _, unit in places))
        start = box[axis][0]
        fitting = (p for p in range(start + 1, start + 1 + whole) if all((p - first) % unit == 0 for first, unit in places))
        first = next(fitting, None)
        return None if first is None or first >= box[axis][1] else (first, whole)

    def pieces(self, box: Box, limit: int, order: tuple[int, ...]) -> Iterator[Box]:
        """`box` cut along one axis into boxes of about `limit` elements; axes are tried in `order`."""
        size = prod(stop - start for start, stop in box)
        if size > limit:
            for axis in order:
                start, stop = box[axis]
                if stop - start > 1 and (found := self.cuts(box, axis)):
                    first, unit = found
                    step = max(1, limit * (stop - start) // size // unit) * unit
                    marks = [start, *range(first + max(0, step - unit), stop, step), stop]
                    yield from (box[:axis] + ((low, high),) + box[axis + 1 :] for low, high in zip(marks, marks[1:]))
                    return
        yield box


#: how a tensor is computed; where its operands differ from layer to layer, each of the ways
Ways = Value | tuple[Value, ...]


def ways_of(ways: Ways) -> tuple[Value, ...]:
    return ways if isinstance(ways, tuple) else (ways,)


def way_by(ways: Ways, operands: Container[str]) -> Value:
    """The way of which most `operands` are there."""
    return max(ways_of(ways), key=lambda value: sum(operand.name in operands for operand in value.operands))


@dataclass(frozen=True, slots=True)
class Need:
    """A box of the result, who takes it (positions among a pattern's destinations), and what it takes of each operand."""

    box: Box
    takers: tuple[int, ...]
    operands: tuple[Box, ...]


def operand_key(operand: str, key: Key) -> Key:
    """The operand of the instance `key` of a result."""
    return (operand, *key[1:])


def formed(name: str, transform: str | None) -> str:
    """What a tensor is called where `transform` of it is held."""
    return f"{transform}({name})" if transform else name


@cache
def bare(name: str) -> str:
    """The tensor that ``formed`` made `name` of."""
    return name.partition("(")[2].removesuffix(")") if name.endswith(")") else name
