"""Pieces: the boxes of one tensor that go from one set of holders to one set of takers. Pure; computed once per pattern.

All layers of a model, and most experts, have the same boxes on the same members: a pattern. ``pieces`` intersects one
pattern; who sends a piece is chosen in ``plan.py``, tensor by tensor.
"""

from dataclasses import dataclass
from functools import lru_cache

from reshard.geometry.block import Box, overlap, volume
from reshard.geometry.pieces import disjoint

#: (member, box) of each stored block of one tensor, in the order of the side's members
Pattern = tuple[tuple[int, Box], ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A box that lies in one source block and one destination block.

    `sources` and `takers` are positions in the patterns: every source block that holds it, every destination block that wants it.
    """

    box: Box
    size: int
    sources: tuple[int, ...]
    takers: tuple[int, ...]


@lru_cache(maxsize=65536)
def pieces(source: Pattern, destination: Pattern) -> tuple[tuple[Piece, ...], str]:
    """The pieces that fill `destination` from `source`; and a problem in words, or ``""``."""
    held, wanted = _by_box(source), _by_box(destination)
    if not disjoint(list(held)):
        return (), "ranks of the source hold overlapping parts of it, and not the same ones"
    out = []
    for box, takers in wanted.items():
        filled = 0
        for other, sources in held.items():
            meet = overlap(box, other)
            if meet is not None:
                size = volume(meet)
                filled += size
                out.append(Piece(meet, size, sources, takers))
        if filled != volume(box):
            return (), f"{volume(box) - filled} of {volume(box)} elements that the destination wants are on no source rank"
    return tuple(out), ""


def _by_box(pattern: Pattern) -> dict[Box, tuple[int, ...]]:
    found: dict[Box, list[int]] = {}
    for position, (_, box) in enumerate(pattern):
        found.setdefault(box, []).append(position)
    return {box: tuple(positions) for box, positions in found.items()}


def halved(box: Box, limit: int) -> list[Box]:
    """`box` cut along its leading axes into boxes of at most `limit` elements, as few as that takes on each axis."""
    if volume(box) <= limit:
        return [box]
    axis = next((a for a, (start, stop) in enumerate(box) if stop - start > 1), None)
    if axis is None:
        return [box]
    start, stop = box[axis]
    row = volume(box) // (stop - start)
    step = max(1, limit // row)
    parts = [box[:axis] + ((low, min(low + step, stop)),) + box[axis + 1 :] for low in range(start, stop, step)]
    return [small for part in parts for small in halved(part, limit)]
