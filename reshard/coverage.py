"""Whether blocks fill a stored tensor, and boxes a tensor of the model: no element outside, twice, or forgotten. Pure.

Nothing here knows how a block came about: it counts. A cutter that drops, repeats or moves elements is found by it,
whatever the format, before a byte is written.
"""

from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import pairwise

from reshard.block import Block, Box, Key, Stored, overlap, volume

Axes = tuple[tuple[int, int], ...]  # (stride, size) of a block's axes, the longest stride first

_MOST_STEPS = 1 << 20  # positions of one axis that two blocks are compared at; what no format has is taken for an overlap


class Coverage:
    """Checks stored tensors and tensors of the model against their sizes.

    Layers and experts share their blocks, so a pattern (the same block objects, in a tensor of the same shape) is checked
    once. Blocks that were seen are kept, so that no other one gets their identity.
    """

    def __init__(self):
        self._stored: dict[tuple, tuple[list[tuple], object]] = {}
        self._covered: dict[tuple, tuple[int, bool, object]] = {}

    def faults(self, stored: Stored) -> list[str]:
        """What is wrong with the blocks of one stored tensor: every element must lie under one of them or be declared padding."""
        at = (stored.shape, stored.pad, *[id(block) for _, block in stored.blocks])
        if at not in self._stored:
            self._stored[at] = _faults(stored), stored.blocks
        found = self._stored[at][0]
        return [text.format(*(label(stored.blocks[i][0]) for i in which)) for text, which in found] if found else found

    def covered(self, blocks: list[Block], shape: tuple[int, ...]) -> tuple[int, bool]:
        """Elements of a tensor of `shape` that lie in any of `blocks`; and whether none lies outside."""
        at = (shape, *sorted({id(block) for block in blocks}))
        if at not in self._covered:
            boxes = frozenset(block.box for block in blocks)
            inside = all(0 <= start < stop <= size for box in boxes for (start, stop), size in zip(box, shape, strict=True))
            self._covered[at] = union_volume(boxes), inside, tuple(blocks)
        return self._covered[at][:2]

    def lost(self, placed: Mapping[Key, list[Block]], sizes: Mapping[str, tuple[int, ...]], where: str) -> list[str]:
        """Tensors of the model that the blocks `placed` do not cover wholly, and those that reach out of them."""
        problems = []
        for key, blocks in placed.items():
            shape = sizes[key[0]]
            count, inside = self.covered(blocks, shape)
            whole = volume(tuple((0, size) for size in shape))
            if not inside:
                problems.append(f"{label(key)}: the {where} has elements of it past its sizes, {list(shape)}")
            elif count != whole:
                problems.append(f"{label(key)}: {whole - count} of {whole} elements have no place in the {where}")
        return problems


def _faults(stored: Stored) -> list[tuple]:
    """(text, blocks named in it) of each fault."""
    blocks = [block for _, block in stored.blocks]
    faults = []
    for i, block in enumerate(blocks):
        stop = block.offset + span(axes_of(block))
        if block.offset < 0 or stop > stored.size:
            faults.append((f"{{}} would lie at elements {block.offset} to {stop} of {stored.size}", (i,)))
        elif not nested(axes_of(block)):
            faults.append(("{} would lie on elements of its own", (i,)))
    if faults:
        return faults
    both = overlapping(blocks)
    if both:
        return [("{} and {} would lie on the same elements", both)]
    empty = stored.size - sum(block.size for block in blocks)
    if empty != stored.pad:
        return [(f"{empty} of {stored.size} elements are under no tensor, {stored.pad} are declared to be padding", ())]
    return []


def overlapping(blocks: list[Block]) -> tuple[int, int] | None:
    """The numbers of two blocks that share an element of their stored tensor; None where no two do."""
    order = sorted(range(len(blocks)), key=lambda i: blocks[i].offset)
    open_: list[tuple[int, int, Axes]] = []  # (number, end, axes) of earlier blocks that reach this far
    for i in order:
        offset, axes = blocks[i].offset, axes_of(blocks[i])
        open_ = [other for other in open_ if other[1] > offset]
        for other, _, held in open_:
            if meet(offset - blocks[other].offset, held, axes):
                return other, i
        open_.append((i, offset + span(axes), axes))
    return None


@lru_cache(maxsize=4096)
def _axes(strides: tuple[int, ...], shape: tuple[int, ...]) -> Axes:
    out: list[tuple[int, int]] = []
    for stride, size in sorted(((s, n) for s, n in zip(strides, shape) if n > 1), reverse=True):
        if out and out[-1][0] == stride * size:
            out[-1] = stride, out[-1][1] * size
        else:
            out.append((stride, size))
    return tuple(out)


def axes_of(block: Block) -> Axes:
    """A block's axes by stride, those that run on into each other made one."""
    return _axes(block.strides, block.shape)


def span(axes: Axes) -> int:
    """Elements from a block's first to past its last."""
    return 1 + sum(stride * (size - 1) for stride, size in axes)


def nested(axes: Axes) -> bool:
    """Whether each stride passes over all that the shorter ones reach: then no two indices share an element."""
    return all(stride >= span(axes[i + 1 :]) for i, (stride, _) in enumerate(axes))


@lru_cache(maxsize=65536)
def meet(distance: int, a: Axes, b: Axes) -> bool:
    """Whether two nested blocks share an element, `b` beginning `distance` elements after `a`."""
    if distance < 0:
        return meet(-distance, b, a)
    if distance >= span(a):
        return False
    if not a:
        return distance == 0
    stride, size = a[0]
    if not b:  # one element: in which of a's positions could it be?
        index = min(distance // stride, size - 1)
        return meet(distance - index * stride, a[1:], b)
    if b[0][0] == stride:
        index, rest = divmod(distance, stride)
        return (index < size and meet(rest, a[1:], b[1:])) or (index + 1 < size and meet(rest - stride, a[1:], b[1:]))
    if stride > b[0][0]:
        inner = a[1:]
        low, high = max(0, (distance - span(inner)) // stride + 1), min(size, -(-(distance + span(b)) // stride))
        return high - low > _MOST_STEPS or any(meet(distance - i * stride, inner, b) for i in range(low, high))
    stride, size = b[0]
    high = min(size, -(-(span(a) - distance) // stride))
    return high > _MOST_STEPS or any(meet(distance + i * stride, a, b[1:]) for i in range(high))


def union_volume(boxes: Iterable[Box]) -> int:
    """Elements covered by any of `boxes`."""
    boxes = frozenset(boxes)
    return volume(next(iter(boxes))) if len(boxes) == 1 else _union_volume(boxes)


@lru_cache(maxsize=65536)
def _union_volume(boxes: frozenset[Box]) -> int:
    if disjoint(list(boxes)):
        return sum(map(volume, boxes))
    first = next(iter(boxes))
    axis = next(a for a in range(len(first)) if len({box[a] for box in boxes}) > 1)
    marks = sorted({mark for box in boxes for mark in box[axis]})
    total = 0
    for low, high in pairwise(marks):
        inside = {box[:axis] + ((0, high - low),) + box[axis + 1 :] for box in boxes if box[axis][0] <= low and box[axis][1] >= high}
        if inside:
            total += union_volume(inside)
    return total


def disjoint(boxes: list[Box]) -> bool:
    """Whether no two of `boxes` meet: a sweep along the axis on which they differ most."""
    if len(boxes) < 2:
        return True
    axis = max(range(len(boxes[0])), key=lambda a: len({box[a] for box in boxes}))
    ordered = sorted(boxes, key=lambda box: box[axis])
    for i, box in enumerate(ordered):
        for other in ordered[i + 1 :]:
            if other[axis][0] >= box[axis][1]:
                break
            if overlap(box, other):
                return False
    return True


def label(key: Key) -> str:
    """A tensor's name for people: ``q of layer 3``, ``gate of layer 3, expert 7``."""
    name, *numbers = key
    words = [f"{axis} {number}" for axis, number in zip(("layer", "expert"), numbers)]
    return f"{name} of {', '.join(words)}" if words else name
