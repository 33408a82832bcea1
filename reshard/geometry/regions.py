"""Regions: which part of a stored tensor a piece of it is, and the blocks of that part. Integers only.

A region is the whole (None), a ``Chunk`` (a box in the stored tensor's own dimensions) or a ``FlatRange`` (of its elements one
after another). Whichever it is, its blocks are cut from those of the whole stored tensor by ``cut``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import TypeVar

from reshard.geometry.block import Block, Box, Key, Part, chunk, cut, overlap, restride, row_major, volume
from reshard.geometry.pieces import disjoint, union_volume

Shape = tuple[int, ...]
Label = TypeVar("Label")


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box: where it begins in each dimension of the stored tensor. Its piece's shape is its size."""

    offsets: Shape


@dataclass(frozen=True, slots=True)
class FlatRange:
    """As many elements as its piece has, from number `first` on, in row-major order over the stored tensor's shape."""

    first: int


Region = Chunk | FlatRange | None


def parts_in(shape: Shape, parts: tuple[Part, ...], region: Region, size: Shape) -> tuple[Part, ...]:
    """What of `parts`, which lie in a stored tensor of `shape`, a region of `size` holds; offsets and strides are the region's own."""
    if region is None:
        return parts
    # a repeated part is a block with one more axis, so that whole stacks of experts are cut at once
    spread = tuple([Block(((0, p.count), *p.block.box), p.block.offset, (p.step, *p.block.strides)) for p in parts])
    out = []
    for i, block in _cut_to(shape, spread, region, size):
        first, (low, high) = parts[i].first, block.box[0]
        key: Key = (*first[:-1], first[-1] + low) if low else first
        step = block.strides[0] if high - low > 1 else 0
        out.append(Part(key, Block(block.box[1:], block.offset, block.strides[1:]), high - low, step))
    return tuple(out)


@lru_cache(maxsize=65536)
def _cut_to(shape: Shape, spread: tuple[Block, ...], region: Chunk | FlatRange, size: Shape) -> list[tuple[int, Block]]:
    """(number of the block, what of it lies in the region). Layers that lie alike are cut once."""
    blocks = list(enumerate(spread))
    if isinstance(region, FlatRange):
        stop = region.first + prod(size)
        return [
            (i, part.moved(-region.first))
            for i, block in blocks
            for part in cut(block, _by_stride(block), region.first - block.offset, stop - block.offset)
        ]
    for dim, (begin, count) in enumerate(zip(region.offsets, size)):
        if (begin, count) != (0, shape[dim]):
            shape, blocks = slice_dim(shape, blocks, dim, begin, begin + count)
    return blocks


def slice_dim(
    shape: Shape, blocks: Sequence[tuple[Label, Block]], dim: int, low: int, high: int
) -> tuple[Shape, list[tuple[Label, Block]]]:
    """Rows [low, high) along `dim` of a stored tensor: its shape and blocks."""
    new = shape[:dim] + (high - low,) + shape[dim + 1 :]
    step = row_major(shape)[dim]
    steps = row_major(new)
    out = []
    for label, block in blocks:
        at = (block.offset // step) % shape[dim] * step  # the block's own place along dim
        axes = tuple([axis for axis in _by_stride(block) if step <= block.strides[axis] < step * shape[dim]])
        for part in cut(block, axes, low * step - at, high * step - at):
            out.append((label, restride(part, shape, steps).moved(-low * steps[dim])))
    return new, out


def _by_stride(block: Block) -> tuple[int, ...]:
    """The axes that have more than one position, from the slowest."""
    return tuple(sorted([i for i, (start, stop) in enumerate(block.box) if stop - start > 1], key=lambda i: -block.strides[i]))


def boxes_of(shape: Shape, region: Region, size: Shape) -> list[Box]:
    """The region in the stored tensor's own dimensions; a flat range is up to 2·dimensions - 1 boxes."""
    if isinstance(region, Chunk):
        boxes = [tuple((begin, begin + count) for begin, count in zip(region.offsets, size))]
    else:
        whole = Block(tuple((0, count) for count in shape), 0, row_major(shape))
        if region is None:
            boxes = [whole.box]
        else:
            boxes = [part.box for part in cut(whole, tuple(range(len(shape))), region.first, region.first + prod(size))]
    return [box for box in boxes if volume(box)]


def outside(shape: Shape, region: Region, size: Shape) -> bool:
    """Whether a region of `size` does not lie in a stored tensor of `shape`."""
    if region is None:
        return size != shape
    if isinstance(region, FlatRange):
        return region.first < 0 or region.first + prod(size) > prod(shape)
    if not len(region.offsets) == len(size) == len(shape):
        return True
    return any(begin < 0 or begin + count > whole for begin, count, whole in zip(region.offsets, size, shape))


@lru_cache(maxsize=65536)
def unsound(shape: Shape, regions: tuple[tuple[Region, Shape], ...]) -> tuple[tuple[int, int] | None, int, Box | None]:
    """Of (region, size)s that lie in a stored tensor of `shape`: the numbers of two that overlap and are not equal, how many
    elements they hold together, and a box that none of them holds."""
    distinct = {each: number for number, each in reversed(list(enumerate(regions)))}
    boxes = {number: boxes_of(shape, *each) for each, number in distinct.items()}
    every = [box for own in boxes.values() for box in own]
    both = None
    if not disjoint(every):
        numbers = sorted(boxes)
        both = next((a, b) for i, a in enumerate(numbers) for b in numbers[i + 1 :] if shared(boxes[a], boxes[b]))
    held = union_volume(every) if every else 0
    return both, held, _hole(tuple((0, count) for count in shape), every) if held < prod(shape) else None


def shared(a: Sequence[Box], b: Sequence[Box]) -> int:
    """Elements that two lists of disjoint boxes have in common."""
    return sum(volume(meet) for one in a for other in b if (meet := overlap(one, other)) is not None)


def _hole(whole: Box, boxes: Sequence[Box], axis: int = 0) -> Box | None:
    """The first part of `whole` that none of `boxes` covers; None where they cover all of it."""
    if not boxes:
        return whole
    if axis == len(whole):
        return None
    marks = sorted({min(max(mark, whole[axis][0]), whole[axis][1]) for box in boxes for mark in box[axis]} | set(whole[axis]))
    for low, high in zip(marks, marks[1:]):
        here = [box for box in boxes if box[axis][0] <= low and high <= box[axis][1]]
        found = _hole(whole[:axis] + ((low, high),) + whole[axis + 1 :], here, axis + 1)
        if found is not None:
            return found
    return None


def intervals(size: int, cuts: Sequence[tuple[int, int, int]]) -> list[tuple[int, int]]:
    """The ranges of a dimension of `size` that lie, one after another, on one place of a mesh.

    `cuts` in order of the mesh's dimensions: (parts, this place's index, split factor; 1 for a plain Shard). A strided
    shard whose factor is the product of the later shards is cut after them (FSDP over TP); another one cuts each of
    `factor` equal runs (packed tensors). torch.chunk's rule throughout.
    """
    held = [(0, size)]
    late: list[tuple[int, int]] = []
    for i, (parts, index, factor) in enumerate(cuts):
        if factor > 1 and factor == prod(n for n, _, f in cuts[i + 1 :] if f == 1):
            late.append((parts, index))
        elif factor > 1:
            total = sum(high - low for low, high in held)
            runs = [chunk(total, factor, run) for run in range(factor)]
            held = [
                r for low, high in runs for start, stop in [chunk(high - low, parts, index)] for r in _within(held, low + start, low + stop)
            ]
        else:
            held = _within(held, *chunk(sum(high - low for low, high in held), parts, index))
    for parts, index in reversed(late):
        held = _within(held, *chunk(sum(high - low for low, high in held), parts, index))
    return held


def _within(held: list[tuple[int, int]], low: int, high: int) -> list[tuple[int, int]]:
    """Positions [low, high) of the ranges `held`, laid one after another."""
    out, at = [], 0
    for start, stop in held:
        first, last = max(low, at), min(high, at + stop - start)
        if first < last:
            out.append((start + first - at, start + last - at))
        at += stop - start
    return out
