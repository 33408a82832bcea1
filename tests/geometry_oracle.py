"""The geometry once more, the dumb way: every element has a number, arrays of them are fused with numpy's concatenate and
cut with its slices, and what ``block``, ``place`` and ``join`` say of the same case must put each number in the same place.

``check(seed)`` draws one small case from a seed and raises AssertionError where the two disagree.
"""

import random
from functools import lru_cache
from math import prod
from types import SimpleNamespace

import numpy as np

from reshard.geometry.block import Block, cut
from reshard.geometry.pieces import disjoint, pieces, union_volume
from reshard.layout import Entry, Tensor
from reshard.place import fuse, slice_dim
from reshard.planner.join import Slot
from reshard.planner.plan import move_between

LAYOUT = SimpleNamespace(name="drawn")
Boxes = dict[str, tuple[tuple[int, int], int]]  # per axis: the range in the padded tensor, and the true size


def check(seed: int) -> str:
    """Draw one case from `seed` and compare; returns which kind it was."""
    rng = random.Random(seed)
    kind = rng.choice(("cut", "cut", "fuse", "fuse", "boxes"))
    {"cut": check_cut, "fuse": check_fuse_and_slice, "boxes": check_boxes}[kind](rng)
    return kind


@lru_cache(maxsize=4096)
def _numbers(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(1, prod(shape) + 1).reshape(shape)


def positions(block: Block) -> np.ndarray:
    """Where each element of a block lies in its stored tensor."""
    total = np.array(block.offset)
    for size, stride in zip(block.shape, block.strides):
        total = total[..., None] + np.arange(size) * stride
    return total


def part_of(numbers: np.ndarray, box) -> np.ndarray:
    return numbers[tuple(slice(start, stop) for start, stop in box)]


def painted(size: int, blocks, numbers: dict[str, np.ndarray]) -> np.ndarray:
    """The numbers that `blocks` put into a stored tensor of `size`; 0 under none. No place is painted twice."""
    out, times = np.zeros(size, int), np.zeros(size, int)
    for name, block in blocks:
        at = positions(block).reshape(-1)
        assert at.size and at.min() >= 0 and at.max() < size, ("out of bounds", name, block, size)
        np.add.at(times, at, 1)
        out[at] = part_of(numbers[name], block.box).reshape(-1)
    assert times.max(initial=0) <= 1, "painted twice"
    return out


def check_cut(rng: random.Random) -> None:
    """``cut`` of a block whose axes are nested, with gaps: the parts hold what lies in the range, once, where it was."""
    sizes = [rng.randint(1, 4) for _ in range(rng.randint(1, 4))]
    strides, span = [], 1
    for size in reversed(sizes):
        strides.insert(0, span + rng.choice((0, 0, 0, 1, 2, 5)))
        span += (size - 1) * strides[0]
    order = list(range(len(sizes)))
    rng.shuffle(order)  # the tensor's axes need not be in order of stride
    axis_of = {level: order.index(level) for level in range(len(sizes))}
    starts = [rng.randint(0, 3) for _ in sizes]
    box = tuple((starts[a], starts[a] + sizes[level]) for a, level in enumerate(order))
    block = Block(box, rng.randint(0, 50), tuple(strides[level] for level in order))
    levels = sorted(rng.sample(range(len(sizes)), rng.randint(1, len(sizes))))
    axes = tuple(axis_of[level] for level in levels)
    along = Block(box, 0, tuple(stride if a in axes else 0 for a, stride in enumerate(block.strides)))
    reach = int(positions(along).max()) + 1
    low = rng.randint(-2, reach + 1)
    high = rng.randint(low, reach + 3)

    here, where = positions(along), positions(block)
    wanted = np.where((here >= low) & (here < high), where, -1)
    got = np.full(block.shape, -1)
    for part in cut(block, axes, low, high):
        inside = tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(part.box, box))
        assert (got[inside] == -1).all(), "an element stands in two parts"
        got[inside] = positions(part)
    assert np.array_equal(got, wanted), (block, axes, low, high)


def draw_entry(rng: random.Random) -> tuple[Entry, list[Tensor], Boxes]:
    """Up to three tensors to be fused, any axis of which may begin late, end early or be padded."""
    parts, rank = rng.randint(1, 3), rng.randint(1, 3)
    fused = rng.randrange(rank)
    names = iter("abcdefghijklmnopqrstuvwxyz")
    shared = [[next(names) for _ in range(rng.randint(1, 2))] for _ in range(rank)]
    outer = shared[fused] if rng.random() < 0.7 else []
    alike = rng.random() < 0.3  # all parts of the same axes, stored in another order of dimensions than their own
    inner = [[next(names) for _ in range(rng.randint(0 if outer else 1, 2))] for _ in range(1 if alike else parts)] * (
        parts if alike else 1
    )
    dims = [tuple(tuple(outer + inner[p]) if d == fused else tuple(shared[d]) for d in range(rank)) for p in range(parts)]
    boxes: Boxes = {}
    for axis in {axis for own in dims for dim in own for axis in dim}:
        size = rng.randint(1, 3)
        start = rng.choice((0, 0, rng.randrange(size)))
        stop = rng.choice((size, rng.randint(start + 1, size)))
        boxes[axis] = (start, stop), size - (rng.random() < 0.15 and size > 1)
    own = dims
    if alike:
        flat = [axis for dim in dims[0] for axis in dim]
        rng.shuffle(flat)
        own = [tuple((axis,) for axis in flat)] * parts
    tensors = [Tensor(f"t{p}", (), own[p], ()) for p in range(parts)]
    within = outer[-1] if outer and rng.random() < 0.6 else None
    return Entry("e", "e", tuple(t.name for t in tensors), within, dims[0] if alike else None, fused), tensors, boxes


def fused_numbers(entry: Entry, tensors: list[Tensor], boxes: Boxes) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The numbers of each tensor's elements, and the array that holds their boxes fused as `entry` says; padding is 0."""
    numbers, arrays, base = {}, [], 0
    for tensor in tensors:
        true = tuple(boxes[axis][1] for axis in tensor.axes)
        numbers[tensor.name] = own = _numbers(true) + base
        base += prod(true)
        padded = np.zeros([boxes[axis][0][1] for axis in tensor.axes], int)
        there = tuple(slice(0, min(a, b)) for a, b in zip(true, padded.shape))
        padded[there] = own[there]
        box = padded[tuple(slice(*boxes[axis][0]) for axis in tensor.axes)]
        dims = entry.dims or tensor.dims
        box = box.transpose([tensor.axes.index(axis) for dim in dims for axis in dim])
        at = sum(map(len, dims[: entry.dim])) + (dims[entry.dim].index(entry.within) + 1 if entry.within else 0)
        shape = box.shape
        stop = sum(map(len, dims[: entry.dim + 1]))
        arrays.append(box.reshape(*shape[:at], prod(shape[at:stop]), *shape[stop:]))
    whole = np.concatenate(arrays, axis=at)
    dims, sizes = entry.dims or tensors[0].dims, []
    for d, axes in enumerate(dims):
        first = sum(map(len, dims[:d]))
        after = first + len(axes) if d < entry.dim else at + 1 if d == entry.dim else None
        if d <= entry.dim:
            sizes.append(prod(whole.shape[first:after]))
        else:
            first -= sum(map(len, dims[: entry.dim + 1])) - (at + 1)
            sizes.append(prod(whole.shape[first : first + len(axes)]))
    return numbers, whole.reshape(sizes)


def check_fuse_and_slice(rng: random.Random) -> None:
    """``fuse``, then up to two slices by ``slice_dim``, against concatenate and numpy's own slices."""
    entry, tensors, boxes = draw_entry(rng)
    numbers, whole = fused_numbers(entry, tensors, boxes)
    shape, blocks = fuse(LAYOUT, entry, tensors, [{axis: boxes[axis] for axis in t.axes} for t in tensors])
    assert shape == whole.shape, (entry, shape, whole.shape)
    assert np.array_equal(painted(prod(shape), blocks, numbers).reshape(shape), whole), entry
    for _ in range(rng.randint(1, 2)):
        dim = rng.randrange(len(shape))
        low = rng.randint(0, shape[dim] - 1)
        high = rng.randint(low + 1, shape[dim])
        axes = {t.name: tuple(t.axes.index(axis) for axis in (entry.dims or t.dims)[dim]) for t in tensors}
        shape, blocks = slice_dim(shape, blocks, dim, low, high, axes)
        whole = np.ascontiguousarray(whole[(slice(None),) * dim + (slice(low, high),)])
        assert shape == whole.shape
        assert np.array_equal(painted(prod(shape), blocks, numbers).reshape(shape), whole), (entry, boxes, dim, low, high)


def check_boxes(rng: random.Random) -> None:
    """Volume, disjointness and the copy between two blocks, against a painted array."""
    rank = rng.randint(1, 3)
    size = (5,) * rank

    def box():
        starts = [rng.randint(0, 4) for _ in range(rank)]
        return tuple((start, rng.randint(start + 1, 5)) for start in starts)

    held = [box() for _ in range(rng.randint(1, 5))]
    times = np.zeros(size, int)
    for one in held:
        part_of(times, one)[...] += 1
    assert union_volume(held) == (times > 0).sum()
    assert disjoint(held) == (times.max() < 2)
    strides = [tuple(rng.randint(1, 9) for _ in range(rank)) for _ in "ab"]
    a, b = (Block(one, rng.randint(0, 9), s) for one, s in zip((held[0], held[-1]), strides))
    shared_piece = pieces([a.box], [b.box])
    slots = [Slot(0, "BF16", side.box, side.strides) for side in (a, b)]
    move = move_between(*slots, shared_piece[0].box) if shared_piece else None
    both = [np.full(size, -1) for _ in "ab"]
    for whole, block in zip(both, (a, b)):
        part_of(whole, block.box)[...] = positions(block)
    shared = (both[0] >= 0) & (both[1] >= 0)
    if move is None:
        assert not shared.any()
    else:
        assert move.size == shared.sum()
        for whole, offset, own in zip(both, (a.offset + move.src_offset, b.offset + move.dst_offset), (move.src_strides, move.dst_strides)):
            assert np.array_equal(part_of(whole, move.box), positions(Block(move.box, offset, own)))
