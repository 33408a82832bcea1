"""Run a plan on files: source bytes in, destination bytes out, each once, in a fixed amount of memory.

Work is cut into *tiles*: a box of one tensor (or of several that are interleaved row by row) small enough for a worker's
buffer, in order of where it lies in the source. A tile's bytes are read once, for all ranks that need a part of them,
rearranged with their strides in a second buffer, and written with one ``pwrite`` per contiguous run. Which worker runs it does not matter: every byte has its
place, so the output is the same bit for bit.
"""

import mmap
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from reshard.block import Block, Box, Stored, overlap, volume
from reshard.errors import FormatError
from reshard.join import Copy, Plan, label, union_volume, where
from reshard.stores import DTYPE_SIZE

_TILE = 8 << 20  # bytes: large enough that system calls cost nothing, small enough to stay in the processor's cache
_RUN = 128 << 10  # bytes: a contiguous run of at least this much is written straight from the source


class Source:
    """A checkpoint's files. `bytes_read` counts what tiles took from them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.bytes_read = 0
        self._files: dict[str, int] = {}
        self._lock = threading.Lock()

    def read(self, stored: Stored, start: int, into: memoryview) -> None:
        """Fill `into` with a stored tensor's bytes, from element `start` on."""
        at = stored.start + start * DTYPE_SIZE[stored.dtype]
        handle = self._open(stored.file)
        while len(into):
            n = os.preadv(handle, [into], at)
            if n == 0:
                raise FormatError(f"{stored.file} ends inside {stored.name}: it became shorter while it was read")
            into, at = into[n:], at + n

    def map(self, stored: Stored, start: int, stop: int) -> tuple[mmap.mmap, np.ndarray]:
        """Elements [start, stop) of a stored tensor, mapped: only the pages that are touched are read."""
        width = DTYPE_SIZE[stored.dtype]
        low, high = stored.start + start * width, stored.start + stop * width
        page = low // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        try:
            mapped = mmap.mmap(self._open(stored.file), high - page, access=mmap.ACCESS_READ, offset=page)
        except ValueError:
            raise FormatError(f"{stored.file} ends inside {stored.name}: it became shorter while it was read") from None
        return mapped, np.frombuffer(mapped, np.uint8)[low - page :]

    def count(self, size: int) -> None:
        with self._lock:
            self.bytes_read += size

    def close(self) -> None:
        for handle in self._files.values():
            os.close(handle)
        self._files.clear()

    def _open(self, file: str) -> int:
        if file not in self._files:
            with self._lock:
                if file not in self._files:
                    self._files[file] = os.open(self.folder / file, os.O_RDONLY)
        return self._files[file]


class Workspace:
    """One worker's buffers, allocated once: fresh memory for every tile would cost a page fault for each 4 KiB."""

    def __init__(self):
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)
        self._outgrown: list[mmap.mmap] = []
        self._used = 0

    def take(self, size: int) -> np.ndarray:
        """`size` bytes, free until ``reset``."""
        if self._used + size > len(self._memory):
            self._outgrown.append(self._memory)  # arrays of this tile still lie in it
            self._memory = mmap.mmap(-1, max(2 * len(self._memory), self._used + size + mmap.PAGESIZE))
            self._used = 0
        start = self._used
        self._used += -(-size // 64) * 64
        return np.frombuffer(self._memory, np.uint8, size, start)

    def mark(self) -> int:
        return self._used

    def reset(self, mark: int = 0) -> None:
        self._used = mark
        if mark == 0:
            self._outgrown.clear()


def _word(width: int) -> np.dtype:
    """A dtype that carries `width` bytes untouched."""
    return np.dtype(f"u{width}") if width in (1, 2, 4, 8) else np.dtype(("V", width))


@dataclass
class Tile:
    """Boxes of one or more tensors that are moved together."""

    boxes: dict[tuple, Box]
    copies: list[Copy]
    checks: list[Copy] = field(default_factory=list)


def tiles(plan: Plan, limit: int = _TILE) -> Iterator[Tile]:
    """The plan cut into tiles of about `limit` source bytes, ordered by where they lie in the sources."""
    groups = _groups(plan)
    order = sorted(groups, key=lambda group: min((c.src.file, c.src.start + c.move.src_offset) for c in group.copies))
    for group in order:
        yield from _split(group, limit)


def _groups(plan: Plan) -> list[Tile]:
    """Copies gathered by tensor; tensors that some file interleaves along their leading axis stay together."""
    leader: dict[tuple, tuple] = {}

    def find(key: tuple) -> tuple:
        while leader.get(key, key) != key:
            key = leader[key]
        return key

    by_key: dict[tuple, list[Copy]] = defaultdict(list)
    for copy in plan.copies:
        by_key[copy.key].append(copy)
    for copies in by_key.values():
        for stored in {id(s): s for c in copies for s in (c.src, c.dst)}.values():
            if getattr(stored.entry, "within", None) and len(stored.blocks) > 1:
                mates = [key for key, block in stored.blocks if key[1:] == copies[0].key[1:]]
                if len({block.strides[0] for key, block in stored.blocks if key in mates}) == 1:
                    for key in mates:
                        if key in by_key and find(key) != find(mates[0]):
                            leader[find(key)] = find(mates[0])
    checks: dict[tuple, list[Copy]] = defaultdict(list)
    for check in plan.checks:
        checks[check.key].append(check)
    groups: dict[tuple, Tile] = {}
    for key, copies in by_key.items():
        group = groups.setdefault(find(key), Tile({}, []))
        boxes = [c.move.box for c in copies] + [c.move.box for c in checks[key]]
        group.boxes[key] = tuple((min(b[a][0] for b in boxes), max(b[a][1] for b in boxes)) for a in range(len(boxes[0])))
        group.copies += copies
        group.checks += checks[key]
    return list(groups.values())


def _split(tile: Tile, limit: int) -> Iterator[Tile]:
    """`tile` halved along the leading axes of its tensors until it fits `limit`."""
    size = _source_bytes(tile)
    if size <= limit:
        yield tile
        return
    shared = {box[0] for box in tile.boxes.values() if box}
    if len(tile.boxes) > 1 and (len(shared) > 1 or next(iter(shared))[1] - next(iter(shared))[0] < 2):
        for key, box in tile.boxes.items():
            yield from _split(_within(tile, {key: box}), limit)
        return
    box = next(iter(tile.boxes.values()))
    axis = next((a for a, (start, stop) in enumerate(box) if stop - start > 1), None)
    if axis is None:
        yield tile
        return
    start, stop = box[axis]
    pieces = min(max(2, -(-size // limit)), stop - start)
    step = -(-(stop - start) // pieces)
    for low in range(start, stop, step):
        cut = (low, min(low + step, stop))
        yield from _split(_within(tile, {k: b[:axis] + (cut,) + b[axis + 1 :] for k, b in tile.boxes.items()}), limit)


def _source_bytes(tile: Tile) -> int:
    """Bytes that a tile takes from its sources, what several destinations want counted once."""
    wanted = {(id(c.src), c.key, c.move.box): c.src_bytes for c in (*tile.copies, *tile.checks)}
    wanted |= {(id(c.dst), c.key, c.move.box): c.src_bytes for c in tile.checks}
    return sum(wanted.values())


def _within(tile: Tile, boxes: dict[tuple, Box]) -> Tile:
    return Tile(boxes, _clip(tile.copies, boxes), _clip(tile.checks, boxes))


def _clip(copies: Iterable[Copy], boxes: dict[tuple, Box]) -> list[Copy]:
    out = []
    for copy in copies:
        bound = boxes.get(copy.key)
        move = copy.move
        box = bound and overlap(move.box, bound)
        if box is None:
            continue
        if box != move.box:
            src = Block(move.box, move.src_offset, move.src_strides).clip(box)
            dst = Block(move.box, move.dst_offset, move.dst_strides).clip(box)
            move = type(move)(box, volume(box), src.offset, src.strides, dst.offset, dst.strides)
        out.append(Copy(copy.key, copy.src, copy.dst, move))
    return out


def run_tile(tile: Tile, source: Source, write: Callable[[Stored, int, memoryview], None], space: Workspace) -> int:
    """Move one tile. `write(stored, element, bytes)` stores a contiguous run. Returns bytes read from the source."""
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
    windows.close()
    space.reset()
    source.count(read)
    return read


@dataclass
class Windows:
    """The source bytes of one tile: per stored tensor, the element at which its window begins, and the words from there."""

    words: dict[int, tuple[int, np.ndarray]] = field(default_factory=dict)
    mapped: list[mmap.mmap] = field(default_factory=list)

    def view(self, stored: Stored, box: Box, offset: int, strides: tuple[int, ...]) -> np.ndarray:
        low, words = self.words[id(stored)]
        shape = tuple(stop - start for start, stop in box)
        return np.lib.stride_tricks.as_strided(words[offset - low :], shape, [s * words.itemsize for s in strides], writeable=False)

    def close(self) -> None:
        self.words.clear()  # the mappings go with the last array that lies in them
        self.mapped.clear()


def _windows(tile: Tile, source: Source, space: Workspace) -> tuple[Windows, int]:
    """Read what a tile needs, each source once: as a whole where all of its span is needed, else mapped. And count it."""
    spans: dict[int, list] = {}
    boxes: dict[tuple[int, tuple], set[Box]] = defaultdict(set)
    sides = [(c.src, c.move.src_offset, c.move.src_strides, c) for c in (*tile.copies, *tile.checks)]
    sides += [(c.dst, c.move.dst_offset, c.move.dst_strides, c) for c in tile.checks]
    for stored, offset, strides, copy in sides:
        stop = offset + sum((n - 1) * s for n, s in zip(copy.move.shape, strides)) + 1
        span = spans.setdefault(id(stored), [stored, offset, stop, 0])
        span[1], span[2] = min(span[1], offset), max(span[2], stop)
        boxes[id(stored), copy.key].add(copy.move.box)
    for (at, _), held in boxes.items():
        spans[at][3] += union_volume(held)
    windows, total = Windows(), 0
    for at, (stored, low, high, used) in spans.items():
        width = DTYPE_SIZE[stored.dtype]
        total += used * width
        if used == high - low:
            raw = space.take((high - low) * width)
            source.read(stored, low, memoryview(raw))
        else:
            mapped, raw = source.map(stored, low, high)
            windows.mapped.append(mapped)
            if (stored.start + low * width) % width:
                raw = raw.copy()  # torch's files align tensors, third parties' need not
        windows.words[at] = low, raw.view(_word(width))
    return windows, total


def _fill(copies: list[Copy], windows: Windows, write: Callable[[Stored, int, memoryview], None], space: Workspace) -> None:
    """Write the copies of one tile into one stored tensor."""
    dst = copies[0].dst
    width = DTYPE_SIZE[dst.dtype]
    ends = [c.move.dst_offset + sum((n - 1) * s for n, s in zip(c.move.shape, c.move.dst_strides)) + 1 for c in copies]
    low, high = min(c.move.dst_offset for c in copies), max(ends)
    views = [cast(windows.view(c.src, c.move.box, c.move.src_offset, c.move.src_strides), c.src.dtype, dst.dtype) for c in copies]
    if sum(volume(c.move.box) for c in copies) < high - low:  # holes between them: each by itself, in runs
        for copy, view in zip(copies, views):
            _runs(view, copy.move.dst_offset, copy.move.dst_strides, dst, write)
        return
    straight = [v.flags.c_contiguous and _contiguous(v.shape, c.move.dst_strides) for c, v in zip(copies, views)]
    if all(straight) and (len(copies) == 1 or min(v.nbytes for v in views) >= _RUN):
        for copy, view in zip(copies, views):
            write(dst, copy.move.dst_offset, _bytes(view))
        return
    buffer = space.take((high - low) * width).view(_word(width))
    for copy, view in zip(copies, views):
        place = np.lib.stride_tricks.as_strided(buffer[copy.move.dst_offset - low :], view.shape, [s * width for s in copy.move.dst_strides])
        np.copyto(place, view)
    write(dst, low, _bytes(buffer))


def _bytes(array: np.ndarray) -> memoryview:
    return memoryview(array.reshape(-1).view(np.uint8))


def _contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides)):
        if size > 1 and stride != step:
            return False
        step *= size
    return True


def _runs(view: np.ndarray, offset: int, strides: tuple[int, ...], dst: Stored, write) -> None:
    """Write a view whose destination is not contiguous: one run per position of the outer axes."""
    depth = next(d for d in range(len(strides) + 1) if _contiguous(view.shape[d:], strides[d:]))
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


def run(
    plan: Plan,
    source: Source,
    write: Callable[[Stored, int, memoryview], None],
    *,
    jobs: int = 2,
    buffer: int = 128 << 20,
    progress: Callable[[int], None] = lambda size: None,
) -> None:
    """Run all of `plan` on `jobs` threads within `buffer` bytes of buffers. `progress` is told source bytes as they go."""
    limit = tile_limit(jobs, buffer)
    work = tiles(plan, limit)
    lock = threading.Lock()
    stop = threading.Event()

    def worker() -> None:
        space = Workspace()
        while not stop.is_set():
            with lock:
                tile = next(work, None)
            if tile is None:
                return
            try:
                read = run_tile(tile, source, write, space)
            except BaseException:
                stop.set()
                raise
            with lock:
                progress(read)

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(worker) for _ in range(jobs)]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        except BaseException:
            stop.set()
            raise
        for future in done:
            future.result()


def tile_limit(jobs: int, buffer: int) -> int:
    """Source bytes of a tile: a worker holds it at most four times over (as read, rearranged, and both for a cast)."""
    return max(64 << 10, min(_TILE, buffer // (4 * jobs)))


def peak_buffer(plan: Plan, jobs: int, buffer: int) -> int:
    """The most bytes that buffers take together while `plan` runs."""
    limit = tile_limit(jobs, buffer)
    if not any(copy.src_bytes >= limit for copy in plan.copies):  # a small model: less than one whole tile
        limit = min(limit, max((_source_bytes(group) for group in _groups(plan)), default=0))
    return 4 * jobs * limit


