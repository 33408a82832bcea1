"""Elements that do not lie in long runs: read what a tile needs, order it in a buffer with numpy's strides, write that.

Words are moved as integers of their width, never as numbers; only a cast (``casts.py``) looks at values.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from reshard.block import Box, Key, Stored, end
from reshard.casts import Casts, Loss, word
from reshard.errors import FormatError
from reshard.execute import Source, Workspace, contiguous_from
from reshard.join import Copy, Plan, label, union_volume, where
from reshard.stores import DTYPE_SIZE
from reshard.tiles import Tile, tiles


def rearrange(tile: Tile, source: Source, write: Callable[[Stored, int, memoryview], None], space: Workspace, casts: Casts | None = None) -> int:
    """Read all that the tile needs, put each destination together in a buffer, and write that. `casts`: how casts are judged."""
    windows, read = _windows(tile, source, space)
    for check in tile.checks:
        move = check.move
        mine = windows.view(check.src, move.box, move.src_offset, move.src_strides)
        other = windows.view(check.dst, move.box, move.dst_offset, move.dst_strides)
        if not np.array_equal(mine, other):
            raise FormatError(
                f"{where(check.src)} and {where(check.dst)} both hold {label(check.key)}, with different values",
                "the ranks are not of one checkpoint, or its replicas drifted apart; take the files of one step",
            )
    by_target: dict[int, list[Copy]] = defaultdict(list)
    for copy in tile.copies:
        by_target[id(copy.dst)].append(copy)
    mark = space.mark()
    casts, counted = casts or Casts(), set()
    for copies in by_target.values():
        _fill(copies, windows, write, space, casts, counted)
        space.reset(mark)
    return read


@dataclass
class Windows:
    """The source bytes of one tile: per stored tensor, the element at which its window begins, and the words from there."""

    words: dict[int, tuple[int, np.ndarray]] = field(default_factory=dict)

    def view(self, stored: Stored, box: Box, offset: int, strides: tuple[int, ...]) -> np.ndarray:
        low, words = self.words[id(stored)]
        return strided(words[offset - low :], box, strides)


def strided(words: np.ndarray, box: Box, strides: tuple[int, ...]) -> np.ndarray:
    """The elements of a box, whose first one is the first of `words`."""
    shape = tuple(stop - start for start, stop in box)
    return np.lib.stride_tricks.as_strided(words, shape, [s * words.itemsize for s in strides], writeable=False)


def mapped(source: Source, stored: Stored, low: int, high: int) -> np.ndarray:
    """Elements [low, high) of a stored tensor as words, mapped for as long as the array lives."""
    width = DTYPE_SIZE[stored.dtype]
    raw = np.frombuffer(source.map(stored, low, high), np.uint8)
    if (stored.start + low * width) % width:
        raw = raw.copy()  # torch's files align tensors, third parties' need not
    return raw.view(word(width))


def _windows(tile: Tile, source: Source, space: Workspace) -> tuple[Windows, int]:
    """Read what a tile needs, each source once: as a whole where all of its span is needed, else mapped. And count it."""
    spans: dict[int, list] = {}
    boxes: dict[tuple[int, tuple], set[Box]] = defaultdict(set)
    sides = [(c.src, c.move.src_offset, c.move.src_strides, c) for c in (*tile.copies, *tile.checks)]
    sides += [(c.dst, c.move.dst_offset, c.move.dst_strides, c) for c in tile.checks]
    for stored, offset, strides, copy in sides:
        stop = end(offset, copy.move.shape, strides)
        span = spans.setdefault(id(stored), [stored, offset, stop, 0])
        span[1], span[2] = min(span[1], offset), max(span[2], stop)
        boxes[id(stored), copy.key].add(copy.move.box)
    for (at, _), held in boxes.items():
        spans[at][3] += union_volume(held)
    windows, total = Windows(), 0
    for at, (stored, low, high, used) in spans.items():
        width = DTYPE_SIZE[stored.dtype]
        total += used * width
        if used == high - low and not source.in_memory:
            buffer = space.take((high - low) * width)
            source.read(stored, low, buffer)
            words = np.frombuffer(buffer, word(width))
        else:
            words = mapped(source, stored, low, high)
        windows.words[at] = low, words
    return windows, total


def _fill(copies: list[Copy], windows: Windows, write: Callable[[Stored, int, memoryview], None], space: Workspace,
          casts: Casts, counted: set[tuple[int, Key, Box]]) -> None:  # fmt: skip
    """Write the copies of one tile into one stored tensor."""
    dst = copies[0].dst
    width = DTYPE_SIZE[dst.dtype]
    low = min(c.move.dst_offset for c in copies)
    high = max(end(c.move.dst_offset, c.move.shape, c.move.dst_strides) for c in copies)
    views = [casts.cast(c, windows.view(c.src, c.move.box, c.move.src_offset, c.move.src_strides), counted) for c in copies]
    if sum(c.move.size for c in copies) < high - low:  # holes between them: each by itself, in runs
        for copy, view in zip(copies, views):
            _scatter(view, copy.move.dst_offset, copy.move.dst_strides, dst, write)
        return
    buffer = np.frombuffer(space.take((high - low) * width), word(width))
    for copy, view in zip(copies, views):
        place = np.lib.stride_tricks.as_strided(buffer[copy.move.dst_offset - low :], view.shape, [s * width for s in copy.move.dst_strides])
        np.copyto(place, view)
    write(dst, low, _bytes(buffer))


def _bytes(array: np.ndarray) -> memoryview:
    return memoryview(array.reshape(-1).view(np.uint8))


def _scatter(view: np.ndarray, offset: int, strides: tuple[int, ...], dst: Stored, write) -> None:
    """Write a view whose destination is not contiguous: one run per position of the outer axes."""
    depth = contiguous_from(view.shape, strides)
    inner = np.ascontiguousarray(view)
    for index in np.ndindex(*view.shape[:depth]):
        at = offset + sum(i * s for i, s in zip(index, strides))
        write(dst, at, _bytes(inner[index]))


def whole_loss(copies: list[Copy], source: Source, found: Casts) -> list[Loss]:
    """What all of the tensors in `found.lost` lose, of which a tile was enough to refuse them."""
    whole, counted = Casts(allow=True), set()
    for tile in tiles(Plan([], [copy for copy in copies if copy.key in found.lost])):
        for copy in tile.copies:
            move = copy.move
            whole.cast(copy, strided(mapped(source, copy.src, move.src_offset, end(move.src_offset, move.shape, move.src_strides)), move.box, move.src_strides), counted)
    return list(whole.lost.values())
