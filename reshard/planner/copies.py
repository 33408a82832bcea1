"""What a worker does: boxes moved from one stored tensor to another as they are, and boxes computed from several."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from reshard.dtypes import DTYPE_SIZE
from reshard.geometry.block import Block, Box, Key, Stored, overlap, row_major, volume
from reshard.planner.values import Value, operand_key


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

    def clip(self, box: Box) -> "Move | None":
        """The part of this move inside `box`; None when they do not meet."""
        src, dst, meet = self.src_offset, self.dst_offset, []
        for (start, stop), (low, high), a, b in zip(self.box, box, self.src_strides, self.dst_strides):
            lower, upper = max(start, low), min(stop, high)
            if lower >= upper:
                return None
            src += (lower - start) * a
            dst += (lower - start) * b
            meet.append((lower, upper))
        return Move(tuple(meet), volume(tuple(meet)), src, self.src_strides, dst, self.dst_strides)


@dataclass(frozen=True, slots=True)
class Copy:
    """One box of tensor `key`, from where `src` holds it to where `dst` holds it."""

    key: Key
    src: Stored
    dst: Stored
    move: Move


class Lying(NamedTuple):
    """A block of a stored tensor."""

    stored: Stored
    block: Block


@dataclass(frozen=True)
class Computed:
    """A box of tensor `key` that is computed: `takers` hold all of it, `sources` hold parts of each operand, each part once."""

    key: Key
    value: Value
    box: Box
    takers: tuple[Lying, ...]
    sources: tuple[tuple[Lying, ...], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.box)

    @cached_property
    def operands(self) -> tuple[Box, ...]:
        return tuple([operand.box(self.box) for operand in self.value.operands])

    @property
    def source_bytes(self) -> int:
        return sum(volume(box) * DTYPE_SIZE[held[0].stored.dtype] for box, held in zip(self.operands, self.sources))

    def gathering(self, number: int) -> list[Copy]:
        """The copies that bring operand `number` into a buffer of its own, where the operand's box lies row by row."""
        box = self.operands[number]
        held = self.sources[number]
        shape = tuple(stop - start for start, stop in box)
        steps = row_major(shape)
        into = Stored(-1, self.value.operands[number].name, held[0].stored.dtype, shape, ())
        key, out = operand_key(into.name, self.key), []
        for stored, block in held:
            meet = overlap(box, block.box)
            if meet is not None:
                at = sum((low - start) * step for (low, _), (start, _), step in zip(meet, box, steps))
                part = block.part(meet)
                out.append(Copy(key, stored, into, Move(meet, volume(meet), part.offset, part.strides, at, steps)))
        return out

    def part(self, box: Box) -> "Computed":
        """What of it lies in `box`, a part of its own."""
        return Computed(self.key, self.value, box, tuple(Lying(s, block.part(box)) for s, block in self.takers), self.sources)

    def parts(self, limit: int) -> "list[Computed]":
        """It in parts of about `limit` elements, along the axis that is slowest where the first taker holds it."""
        strides = self.takers[0].block.strides
        order = tuple(sorted(range(len(self.box)), key=lambda axis: -strides[axis]))
        boxes = list(self.value.pieces(self.box, limit, order))
        return [self] if len(boxes) == 1 else [self.part(box) for box in boxes]

    def without(self, finished: set[str]) -> "Computed | None":
        """What is left when the output files `finished` are; None where nobody wants it any more."""
        left = tuple(taker for taker in self.takers if taker.stored.file not in finished)
        if len(left) == len(self.takers):
            return self
        return Computed(self.key, self.value, self.box, left, self.sources) if left else None


def abreast(computed: list[Computed], limit: int) -> Iterator[list[Computed]]:
    """`computed` in parts of about `limit` elements; those of one box are cut alike and stay together, for a file may interleave them."""
    alike: dict[tuple[Box, ...], list[list[Computed]]] = {}
    for each in computed:
        parts = each.parts(limit)
        alike.setdefault(tuple(part.box for part in parts), []).append(parts)
    for members in alike.values():
        yield from map(list, zip(*members))
