"""Pieces: what the boxes of one tensor on one side share with its boxes on the other, with all holders and all takers. Pure."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from reshard.geometry.block import Box, overlap, volume


@dataclass(frozen=True, slots=True)
class Piece:
    """A box, in the tensor's own axes, that lies in one box of the source and one of the destination.

    `sources` and `destinations` are positions: every source box that holds it, every destination box that wants it.
    """

    box: Box
    size: int
    sources: tuple[int, ...]
    destinations: tuple[int, ...]


def pieces(sources: Sequence[Box], destinations: Sequence[Box]) -> tuple[Piece, ...]:
    """The pieces that `sources` and `destinations` share, in order of the destinations. Equal boxes on a side are replicas."""
    held, wanted = by_box(sources), by_box(destinations)
    out = []
    for box, takers in wanted.items():
        for other, holders in held.items():
            meet = overlap(box, other)
            if meet is not None:
                out.append(Piece(meet, volume(meet), holders, takers))
    return tuple(out)


def by_box(boxes: Sequence[Box]) -> dict[Box, tuple[int, ...]]:
    """Positions of each distinct box."""
    found: dict[Box, list[int]] = {}
    for position, box in enumerate(boxes):
        found.setdefault(box, []).append(position)
    return {box: tuple(positions) for box, positions in found.items()}


def halved(box: Box, limit: int, grain: Callable[[Box], tuple[int, ...]] | None = None) -> list[Box]:
    """`box` cut along its leading axes into boxes of at most `limit` elements, as few as that takes on each axis.

    `grain` gives, for a box, after how many indices of each axis it may be cut, counted from where it begins; a box that has no more
    than these of any axis stays as it is.
    """
    if volume(box) <= limit:
        return [box]
    grains = grain(box) if grain else (1,) * len(box)
    axis = next((a for a, (start, stop) in enumerate(box) if stop - start > grains[a]), None)
    if axis is None:
        return [box]
    start, stop = box[axis]
    row = volume(box) // (stop - start)
    step = max(1, limit // row // grains[axis]) * grains[axis]
    parts = [box[:axis] + ((low, min(low + step, stop)),) + box[axis + 1 :] for low in range(start, stop, step)]
    return [small for part in parts for small in halved(part, limit, grain)]


def union_volume(boxes: Iterable[Box]) -> int:
    """Elements covered by any of `boxes`."""
    distinct = frozenset(boxes)
    return volume(next(iter(distinct))) if len(distinct) == 1 else _union_volume(distinct)


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
            total += union_volume(tuple(inside))
    return total


def disjoint(boxes: Sequence[Box]) -> bool:
    """Whether no two of `boxes` meet: a sweep along the axis on which they differ most."""
    if len(boxes) < 2:
        return True
    axis = max(range(len(boxes[0])), key=lambda a: len({box[a] for box in boxes}), default=None)
    if axis is None:  # scalars
        return False
    ordered = sorted(boxes, key=lambda box: box[axis])
    for i, box in enumerate(ordered):
        for other in ordered[i + 1 :]:
            if other[axis][0] >= box[axis][1]:
                break
            if overlap(box, other):
                return False
    return True
