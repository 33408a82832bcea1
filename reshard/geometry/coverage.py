"""Whether blocks fill a stored tensor, and boxes a tensor of the model: no element outside, twice, or forgotten. Pure.

Nothing here knows how a block came about: it counts. A cutter that drops, repeats or moves elements is found by it,
whatever the format, before a byte is written.
"""

from collections.abc import Iterable, Iterator
from functools import lru_cache
from math import prod
from typing import Any

from reshard.geometry.block import Key, Stored

Axes = tuple[tuple[int, int], ...]  # (stride, size) of a block's axes, the longest stride first

_MOST_STEPS = 1 << 20  # positions of one axis that two blocks are compared at; what no format has is taken for an overlap


def unlike(stored: Iterable[Stored]) -> Iterator[Stored]:
    """`stored` without those that lie just like the one before, as the experts of a layer do: what holds for one holds for all."""
    shape, block, pad = None, None, 0
    for s in stored:
        if s.shape is shape and s.pad == pad and len(s.parts) == 1 and s.parts[0].block is block and s.parts[0].count == 1:
            continue
        yield s
        shape, pad, block = s.shape, s.pad, s.parts[0].block if len(s.parts) == 1 and s.parts[0].count == 1 else None


def faults_of(stored: Stored) -> list[str]:
    """What is wrong with the blocks of one stored tensor: every element must lie under one of them or be declared padding."""
    shapes = tuple([(part.block.box, part.block.offset, part.block.strides, part.count, part.step) for part in stored.parts])
    found = _faults(stored.size, stored.pad, shapes)
    return [text.format(*(label(stored.parts[i].first) for i in which)) for text, which in found]


@lru_cache(maxsize=65536)
def _faults(size: int, pad: int, shapes: tuple[tuple[Any, ...], ...]) -> list[tuple[str, tuple[int, ...]]]:
    """(text, parts named in it) of each fault. Layers and experts that lie alike are looked at once."""
    spread = [
        (offset, axes((*strides, step), (*(stop - start for start, stop in box), count))) for box, offset, strides, count, step in shapes
    ]
    faults: list[tuple[str, tuple[int, ...]]] = []
    for i, (offset, own) in enumerate(spread):
        stop = offset + span(own)
        if offset < 0 or stop > size:
            faults.append((f"{{}} would lie at elements {offset} to {stop} of {size}", (i,)))
        elif not nested(own):
            faults.append(("{} would lie on elements of its own", (i,)))
    if faults:
        return faults
    both = overlapping(spread)
    if both:
        return [("{} and {} would lie on the same elements", both)]
    empty = size - sum(prod(n for _, n in own) for _, own in spread)
    if empty != pad:
        return [(f"{empty} of {size} elements are under no tensor, {pad} are declared to be padding", ())]
    return []


def overlapping(spread: list[tuple[int, Axes]]) -> tuple[int, int] | None:
    """The numbers of two (offset, axes) that share an element of their stored tensor; None where no two do."""
    order = sorted(range(len(spread)), key=lambda i: spread[i][0])
    open_: list[tuple[int, int, Axes]] = []  # (number, end, axes) of earlier ones that reach this far
    for i in order:
        offset, own = spread[i]
        open_ = [other for other in open_ if other[1] > offset]
        for other, _, held in open_:
            if meet(offset - spread[other][0], held, own):
                return other, i
        open_.append((i, offset + span(own), own))
    return None


@lru_cache(maxsize=4096)
def axes(strides: tuple[int, ...], shape: tuple[int, ...]) -> Axes:
    """Axes by stride, the longest first; those that run on into each other made one."""
    out: list[tuple[int, int]] = []
    for stride, size in sorted(((s, n) for s, n in zip(strides, shape) if n > 1), reverse=True):
        if out and out[-1][0] == stride * size:
            out[-1] = stride, out[-1][1] * size
        else:
            out.append((stride, size))
    return tuple(out)


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


def label(key: Key) -> str:
    """A tensor's name for people: ``q of layer 3``, ``gate of layer 3, expert 7``."""
    name, *numbers = key
    words = [f"{axis} {number}" for axis, number in zip(("layer", "expert"), numbers)]
    return f"{name} of {', '.join(words)}" if words else name


def where(stored: Stored) -> str:
    return f"{stored.name} (rank {stored.rank})" if not stored.file else f"{stored.name} ({stored.file})"
