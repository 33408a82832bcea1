"""Axes, boxes, blocks, stored tensors: integers only, no files, no torch.

The picture: a *tensor* of the model has named axes. A *box* is a half-open range per axis, always in the tensor's own
axes. A *block* says where a box lies in one stored tensor: the element offset of the box's first element and one
element stride per axis. A *stored tensor* is what a rank's file (or memory) holds: blocks, and padding where none lies.
Whatever two formats are, their blocks share axes, so the join of two is an intersection of ranges.
"""

from collections.abc import Iterable, Iterator
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple, Protocol

# Blocks, parts and stored tensors are named tuples: a model of 671 B on 64 ranks has 288,000, and a frozen dataclass takes four
# times as long to make.

#: half-open range per axis, in the tensor's own axes
Box = tuple[tuple[int, int], ...]
#: a tensor of the model: its name in the descriptor, then its layer and expert numbers where it has them
Key = tuple[Any, ...]
#: what names a stored tensor on its side: rank, name, file, byte; a rank may hold several pieces of one tensor
Id = tuple[int, str, str, int]


class Block(NamedTuple):
    """A box (in the tensor's axes) and where it lies in a stored tensor (in elements of that stored tensor)."""

    box: Box
    offset: int
    strides: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.box)

    @property
    def size(self) -> int:
        return volume(self.box)

    def clip(self, box: Box) -> "Block | None":
        """The part of this block inside `box` (the tensor's axes); None when they do not meet."""
        offset = self.offset
        meet = []
        for (start, stop), (low, high), stride in zip(self.box, box, self.strides):
            lower, upper = max(start, low), min(stop, high)
            if lower >= upper:
                return None
            offset += (lower - start) * stride
            meet.append((lower, upper))
        return Block(tuple(meet), offset, self.strides)

    def part(self, box: Box) -> "Block":
        """The part of this block in `box`, which lies in it."""
        found = self.clip(box)
        if found is None:
            raise ValueError(f"{box} does not meet {self.box}")
        return found

    def moved(self, elements: int) -> "Block":
        return Block(self.box, self.offset + elements, self.strides)


class Placed(Protocol):
    """What placed a stored tensor (a layout's Entry), as far as plans ask: the tensors in it, and the dtype its engine wants, if any."""

    @property
    def of(self) -> tuple[str, ...]: ...

    @property
    def dtype(self) -> str | None: ...


class Part(NamedTuple):
    """Tensors of the model that lie in a stored tensor alike, at equal steps: `first` and those that count up from its last number."""

    first: Key
    block: Block  # where the first of them lies
    count: int = 1  # type: ignore[assignment]  # tuples have a method of that name, which nothing here asks for
    step: int = 0  # elements from one to the next

    def each(self) -> Iterator[tuple[Key, Block]]:
        yield self.first, self.block
        for i in range(1, self.count):
            yield (*self.first[:-1], self.first[-1] + i), self.block.moved(i * self.step)


def singles(blocks: Iterable[tuple[Key, Block]]) -> tuple[Part, ...]:
    """Each block as a part of its own."""
    return tuple([Part(key, block) for key, block in blocks])


class Stored(NamedTuple):
    """A tensor as rank `rank`'s file or memory holds it.

    `parts` say which tensors of the model lie in it, and where; elements under no block are padding, which is zero.
    `rank` is a number in the format's own order of ranks. `dtype` is safetensors' word. Placed by a layout it has neither
    dtype nor file yet; a store or a plan gives a copy that has.
    """

    rank: int
    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    entry: "Placed | None" = None  # the layout's Entry that it was placed by
    file: str = ""  # path within the checkpoint's folder, and the byte at which the first element lies in it
    start: int = 0
    pad: int = 0  # elements that the layout declares to be padding

    @property
    def id(self) -> Id:
        return self.rank, self.name, self.file, self.start

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def blocks(self) -> tuple[tuple[Key, Block], ...]:
        """Each tensor of the model that lies in it, with the block where it lies."""
        return tuple([pair for part in self.parts for pair in part.each()])

    @property
    def interleaved(self) -> bool:
        """Whether its parts take turns along their leading axis, as Megatron's queries, keys and values do."""
        blocks = [part.block for part in self.parts if part.block.strides]
        periods, offsets = {block.strides[0] for block in blocks}, [block.offset for block in blocks]
        return len(blocks) > 1 and len(periods) == 1 and max(offsets) - min(offsets) < periods.pop()

    @property
    def padding(self) -> int:
        """Elements under no block."""
        return self.size - sum(part.block.size * part.count for part in self.parts)


def chunk(size: int, parts: int, index: int) -> tuple[int, int]:
    """The range that part `index` of `parts` gets of `size` units, by torch.chunk's rule: ceil(size/parts) each, the
    last ones shorter or empty."""
    step = -(-size // parts)
    return min(index * step, size), min((index + 1) * step, size)


def end(offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Past the last element of a strided box that begins at `offset`."""
    return offset + sum((n - 1) * s for n, s in zip(shape, strides)) + 1


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Element strides of a contiguous tensor of `shape`."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def cut(block: Block, axes: tuple[int, ...], low: int, high: int) -> list[Block]:
    """The parts of `block` whose position along `axes` lies in [low, high).

    Position means the sum of (index - start) * stride over `axes` alone, in elements and relative to the block's
    offset. `axes` are ordered from the slowest. A flat range over several axes is up to 2·len(axes)-1 boxes; this is how
    a plain chunk of fused rows, a flat partition or a DCP chunk becomes boxes. The parts are in order of position, and
    together they hold each such element once. Offsets stay those of the uncut tensor.
    """
    spans = [0] * (len(axes) + 1)  # spans[i]: distance from the first to past the last element along axes[i:]
    spans[-1] = 1
    for i in reversed(range(len(axes))):
        start, stop = block.box[axes[i]]
        spans[i] = (stop - start - 1) * block.strides[axes[i]] + spans[i + 1]
    out: list[Block] = []

    def visit(box: Box, depth: int, base: int) -> None:
        span = spans[depth]
        if base >= high or base + span <= low:
            return
        if low <= base and base + span <= high:
            out.append(block.part(box))
            return
        if depth == len(axes):
            raise ValueError("a cut must fall between elements")
        axis = axes[depth]
        start, stop = box[axis]
        stride, count, inner = block.strides[axis], stop - start, spans[depth + 1]
        if stride:  # indices that the range touches, and those that lie inside it whole; a range may begin or end in a gap
            touched = max(0, (low - base - inner) // stride + 1), min(count, -(-(high - base) // stride))
            whole = max(0, -(-(low - base) // stride)), min(count, (high - base - inner) // stride + 1)
        else:
            touched, whole = (0, count), (0, 0)
        if whole[0] >= whole[1]:
            whole = touched[1], touched[1]
        for i in range(touched[0], whole[0]):
            visit(_with(box, axis, (start + i, start + i + 1)), depth + 1, base + i * stride)
        if whole[0] < whole[1]:
            out.append(block.part(_with(box, axis, (start + whole[0], start + whole[1]))))
        for i in range(whole[1], touched[1]):
            visit(_with(box, axis, (start + i, start + i + 1)), depth + 1, base + i * stride)

    visit(block.box, 0, 0)
    return out


def _with(box: Box, axis: int, extent: tuple[int, int]) -> Box:
    return box[:axis] + (extent,) + box[axis + 1 :]


def restride(block: Block, shape: tuple[int, ...], strides: tuple[int, ...]) -> Block:
    """`block`, made for a row-major tensor of `shape`, in one whose dimensions have `strides` instead."""
    steps = row_major(shape)

    def there(flat: int) -> int:
        total = 0
        for step, stride in zip(steps, strides):
            digit, flat = divmod(flat, step) if step else (0, flat)
            total += digit * stride
        return total

    return Block(block.box, there(block.offset), tuple(there(stride) for stride in block.strides))


@lru_cache(maxsize=65536)
def overlap(a: Box, b: Box) -> Box | None:
    """The intersection of two boxes of one tensor; None when they do not meet."""
    meet = tuple((max(s, t), min(e, f)) for (s, e), (t, f) in zip(a, b))
    return meet if all(start < stop for start, stop in meet) else None


def volume(box: Box) -> int:
    """Elements in `box`."""
    total = 1
    for start, stop in box:  # a plain loop: this is called for each of a million boxes
        total *= stop - start
    return total


def contiguous_from(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """The first dimension from which on elements lie in one piece."""
    depth, step = len(shape), 1
    while depth and (shape[depth - 1] == 1 or strides[depth - 1] == step):
        depth -= 1
        step *= shape[depth]
    return depth
