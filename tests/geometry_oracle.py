"""The geometry once more, the dumb way: every element has a number, arrays of them are fused with numpy's concatenate and
cut with its slices, and what ``block``, ``fusion`` and ``join`` say of the same case must put each number in the same place.

``check(seed)`` draws one small case from a seed and raises AssertionError where the two disagree.
"""

import random
from functools import lru_cache
from math import prod

import numpy as np

from reshard.geometry.block import Block, cut
from reshard.geometry.pieces import disjoint, pieces, union_volume
from reshard.geometry.regions import slice_dim
from reshard.layout.fusion import Group, Item, fuse, parse
from reshard.planner.join import Slot
from reshard.planner.plan import move_between

Boxes = dict[str, tuple[tuple[int, int], int]]  # per axis: the range in the padded tensor, and the true size
Tree = tuple[int, list]


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


def draw_fusion(rng: random.Random, outer: list[str], depth: int = 0, level: int = 0) -> Tree:
    """A fusion of up to three levels, as (how many of the `outer` axes its items share, items); a leaf is such a number alone."""
    deep = rng.randint(depth, len(outer)) if rng.random() < 0.6 else depth
    nested = level < 2 and rng.random() < 0.4
    return deep, [draw_fusion(rng, outer, deep, level + 1) if nested and rng.random() < 0.6 else deep for _ in range(rng.randint(1, 3))]


def draw_items(rng: random.Random) -> tuple[Group, list[Item], int, int, dict[str, int]]:
    """Tensors to be fused, any axis of which may begin late, end early or be padded; the fused dimension, and alignments."""
    names = (f"{letter}{number}" for number in range(9) for letter in "abcdefghijklmnopqrstuvwxyz")
    rank = rng.randint(1, 3)
    dim, outer = rng.randrange(rank), [next(names) for _ in range(rng.randint(0, 3))]
    shared = [tuple(next(names) for _ in range(rng.randint(0, 2))) for _ in range(rank)]
    held: Boxes = {}
    items: list[Item] = []

    def item(depth: int) -> str:
        if items and rng.random() < 0.1 and items[-1].dims[dim][:depth] == tuple(outer[:depth]):
            items.append(items[-1])  # the same tensor twice
            return items[-1].tensor
        rows = (*outer[:depth], *(next(names) for _ in range(rng.randint(0, 2))))
        dims = tuple(rows if d == dim else shared[d] for d in range(rank))
        for axis in (axis for own in dims for axis in own if axis not in held):
            size = rng.randint(1, 3)
            start = rng.choice((0, 0, rng.randrange(size)))
            stop = rng.choice((size, rng.randint(start + 1, size)))
            held[axis] = (start, stop), size - (rng.random() < 0.15 and size > 1)
        axes = [axis for own in dims for axis in own]
        if rng.random() < 0.3:
            rng.shuffle(axes)  # stored in another order of axes than the tensor's own
        items.append(Item(f"t{len(items)}", dims, tuple(axes), {axis: held[axis] for axis in axes}))
        return items[-1].tensor

    def group(tree: Tree, depth: int) -> Group:
        deep, parts = tree
        axis = outer[deep - 1] if deep > depth else None
        return Group(axis, tuple(item(deep) if isinstance(part, int) else group(part, deep) for part in parts))

    fusion = group(draw_fusion(rng, outer), 0)
    aligned = {items[0].tensor: rng.randint(1, 4)} if rng.random() < 0.2 else {}
    return fusion, items, dim, rng.choice((1, 1, 1, 2, 5)), aligned


def fused_numbers(fusion: Group, items: list[Item], dim: int, align: int, aligned: dict[str, int]):
    """The numbers of each tensor's elements, and the array that holds their boxes fused as `fusion` says; padding is 0."""
    numbers: dict[str, np.ndarray] = {}
    queue = list(items)

    def fill(array: np.ndarray, axis: int, unit: int) -> np.ndarray:
        """Zeros behind, to a multiple of `unit` along `axis`."""
        return np.pad(array, [(0, -array.shape[axis] % unit if a == axis else 0) for a in range(array.ndim)])

    def leaf(depth: int) -> np.ndarray:
        item = queue.pop(0)
        true = tuple(item.held[axis][1] for axis in item.axes)
        if item.tensor not in numbers:
            numbers[item.tensor] = _numbers(true) + sum(own.size for own in numbers.values())
        padded = np.zeros([max(item.held[axis][0][1], item.held[axis][1]) for axis in item.axes], int)
        padded[tuple(slice(0, size) for size in true)] = numbers[item.tensor]
        box = padded[tuple(slice(*item.held[axis][0]) for axis in item.axes)]
        rows, others = item.dims[dim], [own for d, own in enumerate(item.dims) if d != dim]
        box = box.transpose([item.axes.index(axis) for own in (rows, *others) for axis in own])
        sizes = [prod(item.extent(axis) for axis in own) for own in others]
        return fill(box.reshape(*box.shape[:depth], prod(box.shape[depth : len(rows)]), *sizes), depth, aligned.get(item.tensor, 1))

    def lay(group: Group, depth: int) -> np.ndarray:
        first = queue[0].dims[dim]
        deep = depth if group.axis is None else first.index(group.axis) + 1
        parts = [lay(item, deep) if isinstance(item, Group) else leaf(deep) for item in group.items]
        whole = np.concatenate(parts, axis=deep)
        return whole.reshape(*whole.shape[:depth], prod(whole.shape[depth : deep + 1]), *whole.shape[deep + 1 :])

    return numbers, np.moveaxis(fill(lay(fusion, 0), 0, align), 0, dim)


def check_fuse_and_slice(rng: random.Random) -> None:
    """``fuse``, then up to two slices by ``slice_dim``, against concatenate and numpy's own slices."""
    fusion, items, dim, align, aligned = case = draw_items(rng)
    numbers, whole = fused_numbers(*case)
    assert parse(str(fusion)) == fusion
    shape, blocks = fuse(fusion, items, dim, align, aligned)
    assert shape == whole.shape, (case, shape, whole.shape)
    assert np.array_equal(painted(prod(shape), blocks, numbers).reshape(shape), whole), case
    if align > 1 or aligned:
        return  # never cut again
    for _ in range(rng.randint(1, 2)):
        at = rng.randrange(len(shape))
        low = rng.randint(0, shape[at] - 1)
        high = rng.randint(low + 1, shape[at])
        shape, blocks = slice_dim(shape, blocks, at, low, high)
        whole = np.ascontiguousarray(whole[(slice(None),) * at + (slice(low, high),)])
        assert shape == whole.shape
        assert np.array_equal(painted(prod(shape), blocks, numbers).reshape(shape), whole), (case, at, low, high)


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
