"""Elements that do not lie in long runs: read what a tile needs, order it in a buffer with numpy's strides, write that.

Words are moved as integers of their width, never as numbers; only ``cast`` looks at values.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from reshard.block import Box, Stored, end
from reshard.errors import FormatError
from reshard.execute import Source, Workspace, contiguous_from
from reshard.fetch import _split as cut_until
from reshard.fetch import runs
from reshard.join import Copy, label, where
from reshard.stores import DTYPE_SIZE
from reshard.tiles import Tile, between, sides, source_bytes, spans

GAP = 16 << 10  # bytes between runs of a file that are rather read than left out


def rearrange(tile: Tile, source: Source, write: Callable[[Stored, int, memoryview], None], space: Workspace) -> int:
    """Read all that the tile needs, put each destination together in a buffer, and write that.

    One rank's columns lie far apart: a tile that spans much more than it needs is cut, so that its span fits in its own bytes.
    """
    if not source.in_memory and between(tile) > (most := max(source_bytes(tile), 1 << 20)):
        parts = list(cut_until(tile, most, between))
        if len(parts) > 1:
            mark, read = space.mark(), 0
            for part in parts:
                read += rearrange(part, source, write, space)
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
    by_target: dict[int, list[Copy]] = defaultdict(list)
    for copy in tile.copies:
        by_target[id(copy.dst)].append(copy)
    mark = space.mark()
    for copies in by_target.values():
        _fill(copies, windows, write, space)
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


def mapped(source: Source, stored: Stored, low: int, high: int, runs: Iterable[tuple[int, int]] | None = None) -> np.ndarray:
    """Elements [low, high) of a stored tensor as words; if `runs` are given, only the elements in these are read.

    Never a mapping of the file: one that becomes shorter kills whoever touches it.
    """
    width = DTYPE_SIZE[stored.dtype]
    if source.in_memory:
        raw = np.frombuffer(source.map(stored, low, high), np.uint8)
        if (stored.start + low * width) % width:
            raw = raw.copy()  # torch's files align tensors, third parties' need not
    else:
        raw = np.empty((high - low) * width, np.uint8)  # pages that nothing is read into take no memory
        _read_runs(source, stored, low, runs or [(low, high)], memoryview(raw))
    return raw.view(_word(width))


def _read_runs(source: Source, stored: Stored, low: int, runs: Iterable[tuple[int, int]], into: memoryview) -> None:
    """Read runs of elements into `into`, which begins at element `low`; those that overlap or touch, once."""
    width = DTYPE_SIZE[stored.dtype]
    start = stop = None
    for a, b in [*sorted(runs), (None, None)]:
        if a is not None and stop is not None and a <= stop:
            stop = max(stop, b)
            continue
        if stop is not None:
            source.read(stored, start, into[(start - low) * width : (stop - low) * width])
        start, stop = a, b


def _windows(tile: Tile, source: Source, space: Workspace) -> tuple[Windows, int]:
    """Read what a tile needs, each source once. And count it."""
    needed: dict[int, set] = defaultdict(set)
    windows, total = Windows(), 0
    found = spans(tile)
    for stored, copy, offset, strides in sides(tile):
        _, low, high, used = found[id(stored)]
        if used != high - low and not source.in_memory:
            needed[id(stored)].update(runs(offset, copy.move.shape, strides, GAP // DTYPE_SIZE[stored.dtype]))
    for at, (stored, low, high, used) in found.items():
        width = DTYPE_SIZE[stored.dtype]
        total += used * width
        if source.in_memory:
            words = mapped(source, stored, low, high)
        else:
            buffer = space.take((high - low) * width)
            _read_runs(source, stored, low, needed[at] or [(low, high)], buffer)
            words = np.frombuffer(buffer, _word(width))
        windows.words[at] = low, words
    return windows, total


def _fill(copies: list[Copy], windows: Windows, write: Callable[[Stored, int, memoryview], None], space: Workspace) -> None:
    """Write the copies of one tile into one stored tensor."""
    dst = copies[0].dst
    width = DTYPE_SIZE[dst.dtype]
    low = min(c.move.dst_offset for c in copies)
    high = max(end(c.move.dst_offset, c.move.shape, c.move.dst_strides) for c in copies)
    views = [cast(windows.view(c.src, c.move.box, c.move.src_offset, c.move.src_strides), c.src.dtype, dst.dtype) for c in copies]
    if sum(c.move.size for c in copies) < high - low:  # holes between them: each by itself, in runs
        for copy, view in zip(copies, views):
            _scatter(view, copy.move.dst_offset, copy.move.dst_strides, dst, write)
        return
    buffer = np.frombuffer(space.take((high - low) * width), _word(width))
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


def cast(view: np.ndarray, src: str, dst: str) -> np.ndarray:
    """`view`'s words of dtype `src` as words of dtype `dst`, rounded to nearest even as torch does."""
    if src == dst:
        return view
    import torch

    kinds = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    writable = np.require(view, requirements=["C", "W"])  # torch takes no array that it may not write to
    flat = torch.from_numpy(writable.view(f"i{view.itemsize}").reshape(-1))
    out = flat.view(kinds[src]).to(kinds[dst]).view(words[DTYPE_SIZE[dst]]).numpy()
    return out.view(_word(DTYPE_SIZE[dst])).reshape(view.shape)


def _word(width: int) -> np.dtype:
    """A dtype that carries `width` bytes untouched."""
    return np.dtype(f"u{width}") if width in (1, 2, 4, 8) else np.dtype(("V", width))


