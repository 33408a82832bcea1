"""Elements that do not lie in long runs: read what a tile needs, order it in a buffer with numpy's strides, write that.

Words are moved as integers of their width, never as numbers; only a cast (``casts.py``) looks at values.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from reshard.dtypes import DTYPE_SIZE, words_of
from reshard.errors import FormatError
from reshard.executor.casts import Casts, Counted, Loss
from reshard.executor.sources import InMemory, Source, Workspace
from reshard.geometry.block import Box, Id, Stored, contiguous_from, end
from reshard.geometry.coverage import label, where
from reshard.planner.batches import _split as cut_until
from reshard.planner.batches import runs
from reshard.planner.copies import Copy
from reshard.planner.plan import Plan
from reshard.planner.tiles import Tile, between, groups, sides, spans, split

_LOSS_TILE = 2 << 20  # bytes
GAP = 16 << 10  # bytes between runs of a file that are rather read than left out


def rearrange(
    tile: Tile, source: Source | InMemory, write: Callable[[Stored, int, memoryview], None], space: Workspace, casts: Casts | None = None
) -> int:
    """Read all that the tile needs, put each destination together in a buffer, and write that.

    `casts`: how casts are judged. One rank's columns lie far apart: a tile that spans much more than it needs is cut, so that its span fits in its own bytes.
    """
    if not isinstance(source, InMemory) and between(tile) > (most := max(tile.source_bytes, 1 << 20)):
        parts = list(cut_until(tile, most, between))
        if len(parts) > 1:
            mark, read = space.mark(), 0
            for part in parts:
                read += rearrange(part, source, write, space, casts)
                space.reset(mark)
            return read
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
    by_target: dict[Id, list[Copy]] = defaultdict(list)
    for copy in tile.copies:
        by_target[copy.dst.id].append(copy)
    mark = space.mark()
    casts = casts or Casts()
    counted: set[Counted] = set()
    for copies in by_target.values():
        _fill(copies, windows, write, space, casts, counted)
        space.reset(mark)
    return read


@dataclass
class Windows:
    """The source bytes of one tile: per stored tensor, the element at which its window begins, and the words from there."""

    words: dict[Id, tuple[int, np.ndarray]] = field(default_factory=dict)

    def view(self, stored: Stored, box: Box, offset: int, strides: tuple[int, ...]) -> np.ndarray:
        low, words = self.words[stored.id]
        return strided(words[offset - low :], box, strides)


def strided(words: np.ndarray, box: Box, strides: tuple[int, ...]) -> np.ndarray:
    """The elements of a box, whose first one is the first of `words`."""
    shape = tuple(stop - start for start, stop in box)
    return np.lib.stride_tricks.as_strided(words, shape, [s * words.itemsize for s in strides], writeable=False)


def mapped(source: Source | InMemory, stored: Stored, low: int, high: int, runs: Iterable[tuple[int, int]] | None = None) -> np.ndarray:
    """Elements [low, high) of a stored tensor as words; if `runs` are given, only the elements in these are read.

    Never a mapping of the file: one that becomes shorter kills whoever touches it.
    """
    width = DTYPE_SIZE[stored.dtype]
    if isinstance(source, InMemory):
        raw = np.frombuffer(source.map(stored, low, high), np.uint8)
        if (stored.start + low * width) % width:
            raw = raw.copy()  # torch's files align tensors, third parties' need not
    else:
        raw = np.empty((high - low) * width, np.uint8)  # pages that nothing is read into take no memory
        _read_runs(source, stored, low, runs or [(low, high)], raw.data)
    return raw.view(words_of(width))


def _read_runs(source: Source | InMemory, stored: Stored, low: int, runs: Iterable[tuple[int, int]], into: memoryview) -> None:
    """Read runs of elements into `into`, which begins at element `low`; those that overlap or touch, once."""
    width = DTYPE_SIZE[stored.dtype]
    merged: list[list[int]] = []
    for start, stop in sorted(runs):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], stop)
        else:
            merged.append([start, stop])
    for start, stop in merged:
        source.read(stored, start, into[(start - low) * width : (stop - low) * width])


def _windows(tile: Tile, source: Source | InMemory, space: Workspace) -> tuple[Windows, int]:
    """Read what a tile needs, each source once. And count it."""
    needed: dict[Id, set[tuple[int, int]]] = defaultdict(set)
    windows, total = Windows(), 0
    found = spans(tile)
    for stored, copy, offset, strides in sides(tile):
        _, low, high, used = found[stored.id]
        if used != high - low and not isinstance(source, InMemory):
            needed[stored.id].update(runs(offset, copy.move.shape, strides, GAP // DTYPE_SIZE[stored.dtype]))
    for at, (stored, low, high, used) in found.items():
        width = DTYPE_SIZE[stored.dtype]
        total += used * width
        if isinstance(source, InMemory):
            words = mapped(source, stored, low, high)
        else:
            buffer = space.take((high - low) * width)
            _read_runs(source, stored, low, needed[at] or [(low, high)], buffer)
            words = np.frombuffer(buffer, words_of(width))
        windows.words[at] = low, words
    return windows, total


def _fill(copies: list[Copy], windows: Windows, write: Callable[[Stored, int, memoryview], None], space: Workspace,
          casts: Casts, counted: set[Counted]) -> None:  # fmt: skip
    """Write the copies of one tile into one stored tensor."""
    dst = copies[0].dst
    width = DTYPE_SIZE[dst.dtype]
    low = min(c.move.dst_offset for c in copies)
    high = max(end(c.move.dst_offset, c.move.shape, c.move.dst_strides) for c in copies)
    views = [casts.cast(c, windows.view(c.src, c.move.box, c.move.src_offset, c.move.src_strides), counted) for c in copies]
    if sum(c.move.size for c in copies) < high - low:  # holes between them: each by itself, in runs
        for copy, view in zip(copies, views):
            scatter(view, copy.move.dst_offset, copy.move.dst_strides, dst, write)
        return
    room = getattr(write, "room", None)
    buffer = np.frombuffer(room(dst, low, high - low) if room else space.take((high - low) * width), words_of(width))
    for copy, view in zip(copies, views):
        place = np.lib.stride_tricks.as_strided(
            buffer[copy.move.dst_offset - low :], view.shape, [s * width for s in copy.move.dst_strides]
        )
        np.copyto(place, view)
    if not room:
        write(dst, low, _bytes(buffer))


def _bytes(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def scatter(view: np.ndarray, offset: int, strides: tuple[int, ...], dst: Stored, write: Callable[[Stored, int, memoryview], None]) -> None:
    """Write a view whose destination is not contiguous: one run per position of the outer axes."""
    depth = contiguous_from(view.shape, strides)
    inner = np.ascontiguousarray(view)
    for index in np.ndindex(*view.shape[:depth]):
        at = offset + sum(i * s for i, s in zip(index, strides))
        write(dst, at, _bytes(inner[index]))


def whole_loss(plan: Plan, source: Source, found: Casts) -> list[Loss]:
    """What all of the tensors in `found.lost` lose, of which a tile was enough to refuse them."""
    whole = Casts(allow=True)
    counted: set[Counted] = set()
    lossy = [group for group in groups(plan) if any(plan.join.runs[number].key(i) in found.lost for number, i in group.members)]
    for tile in (tile for group in lossy for tile in split(group.tile(plan), _LOSS_TILE)):
        for copy in tile.copies:
            if copy.key in found.lost:
                move = copy.move
                words = mapped(source, copy.src, move.src_offset, end(move.src_offset, move.shape, move.src_strides))
                whole.cast(copy, strided(words, move.box, move.src_strides), counted)
    computed = [loss for key, loss in found.lost.items() if key not in whole.lost]  # as far as it was computed
    return [*whole.lost.values(), *computed]
