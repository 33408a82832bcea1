"""Which byte ranges of remote files a plan needs, in batches that a worker fetches, moves and forgets. Pure.

A request costs about as much as a few hundred kilobytes, so ranges that lie closer together than ``GAP`` are one range, and
what is between them is read and thrown away. Batches do not depend on the number of threads or the size of buffers: a
journal can name them by number.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from reshard.dtypes import DTYPE_SIZE
from reshard.geometry.block import Stored
from reshard.planner.copies import Copy, abreast
from reshard.planner.plan import Plan
from reshard.planner.tiles import Tile, groups, tile_limit

GAP = 256 << 10  # bytes
BATCH = 4 << 20  # bytes
JOBS = 8  # threads of which most are waiting
AHEAD = 2  # batches for each worker: how far the fastest may be ahead of the slowest

Reading = tuple[Stored, int, tuple[int, ...], tuple[int, ...]]  # elements of a stored tensor: offset, shape, strides


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes [start, stop) of `file`."""

    file: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Tiles, and the ranges that hold their source bytes: one list for each source."""

    tiles: list[Tile]
    ranges: tuple[list[Range], ...]

    @property
    def size(self) -> int:
        return sum(r.stop - r.start for side in self.ranges for r in side)

    def without(self, finished: set[str]) -> "Batch":
        """What is left when the output files `finished` are."""
        left = [tile.without(finished) for tile in self.tiles]
        return self if left == self.tiles else Batch([tile for tile in left if not tile.idle], self.ranges)


def of_plan(tile: Tile) -> tuple[list[Reading], ...]:
    """What a conversion reads, of its one source."""
    gathered = [copy for each in tile.computed for i in range(len(each.sources)) for copy in each.gathering(i)]
    return ([_source(c) for c in (*tile.copies, *tile.checks, *gathered)] + [_destination(c) for c in tile.checks],)


def of_pair(tile: Tile) -> tuple[list[Reading], ...]:
    """What a comparison reads, of its two sides."""
    return [_source(c) for c in tile.copies], [_destination(c) for c in tile.copies]


def _source(copy: Copy) -> Reading:
    return copy.src, copy.move.src_offset, copy.move.shape, copy.move.src_strides


def _destination(copy: Copy) -> Reading:
    return copy.dst, copy.move.dst_offset, copy.move.shape, copy.move.dst_strides


def batches(plan: Plan, readings: Callable[[Tile], tuple[list[Reading], ...]] = of_plan, gap: int = GAP, limit: int = BATCH) -> list[Batch]:
    """`plan` in batches of about `limit` source bytes, in the order in which these lie in the files."""
    limit = min(limit, tile_limit(plan, 1, 4 * limit))

    def ranges(tile: Tile) -> tuple[list[Range], ...]:
        return tuple(merged([r for reading in side for r in _ranges(reading, gap)], gap) for side in readings(tile))

    out: list[Batch] = []
    for group in groups(plan, sides=("src",)):
        for tile in _split(group.tile(plan), limit, lambda t: Batch([t], ranges(t)).size):
            own = ranges(tile)
            if out:
                last = out[-1]
                both = Batch([*last.tiles, tile], tuple(merged([*a, *b], gap) for a, b in zip(last.ranges, own)))
                if both.size <= limit:
                    out[-1] = both
                    continue
            out.append(Batch([tile], own))
    return out


def _split(tile: Tile, limit: int, size: Callable[[Tile], int]) -> Iterator[Tile]:
    """`tile` cut along the axes that are slowest in the source until `size` of each piece is at most `limit`."""
    if tile.computed:
        if tile.boxes:
            yield from _split(Tile(tile.boxes, tile.copies, tile.checks), limit, size)
        for together in abreast(tile.computed, limit):
            yield Tile({}, [], [], together)
        return
    total = size(tile)
    if total <= limit:
        yield tile
        return
    axis = _slowest(tile)
    if axis is None:
        if len(tile.boxes) == 1:
            yield tile
            return
        for key, box in tile.boxes.items():
            yield from _split(tile.cut({key: box}), limit, size)
        return
    start, stop = next(iter(tile.boxes.values()))[axis]
    step = -(-(stop - start) // min(-(-total // limit), stop - start))
    for low in range(start, stop, step):
        part = (low, min(low + step, stop))
        yield from _split(tile.cut({k: b[:axis] + (part,) + b[axis + 1 :] for k, b in tile.boxes.items()}), limit, size)


def _slowest(tile: Tile) -> int | None:
    """The axis along which to cut; None where there is none, or the tile's tensors don't share it."""
    found = set()
    for key, box in tile.boxes.items():
        strides = next((c.move.src_strides for c in tile.copies if c.key == key), (0,) * len(box))
        axes = [a for a, (start, stop) in enumerate(box) if stop - start > 1]
        axis = max(axes, key=lambda a: strides[a], default=None)
        found.add((axis, axis is not None and box[axis]))
    return next(iter(found))[0] if len(found) == 1 else None


def _ranges(reading: Reading, gap: int) -> list[Range]:
    stored, offset, shape, strides = reading
    width = DTYPE_SIZE[stored.dtype]
    return [Range(stored.file, stored.start + a * width, stored.start + b * width) for a, b in runs(offset, shape, strides, gap // width)]


def runs(offset: int, shape: tuple[int, ...], strides: tuple[int, ...], gap: int) -> list[tuple[int, int]]:
    """The elements of a strided box as ascending runs [start, stop); runs at most `gap` elements apart are one."""
    if 0 in shape:
        return []
    found = [(0, 1)]
    for size, stride in sorted(zip(shape, strides), key=lambda pair: pair[1]):
        if size == 1:
            continue
        if len(found) == 1 and stride - found[0][1] <= gap:
            found = [(0, (size - 1) * stride + found[0][1])]
        else:
            found = [(i * stride + a, i * stride + b) for i in range(size) for a, b in found]
    return [(offset + a, offset + b) for a, b in found]


def merged(ranges: Iterable[Range], gap: int) -> list[Range]:
    """`ranges` by file and place, those at most `gap` bytes apart made one."""
    out: list[Range] = []
    for r in sorted(ranges, key=lambda r: (r.file, r.start)):
        if out and out[-1].file == r.file and r.start - out[-1].stop <= gap:
            out[-1] = Range(r.file, out[-1].start, max(out[-1].stop, r.stop))
        else:
            out.append(r)
    return out


def by_file(all_batches: Iterable[Batch]) -> dict[str, list[Range]]:
    """All ranges of (the first source of) `all_batches`, merged where they touch."""
    found: dict[str, list[Range]] = defaultdict(list)
    for r in merged([r for batch in all_batches for r in batch.ranges[0]], 0):
        found[r.file].append(r)
    return found


def peak(jobs: int) -> int:
    """The most bytes of buffers for `jobs` workers: what came, that put in order and cast, and what waits for its turn in a checksum."""
    return (3 + AHEAD) * jobs * BATCH


def workers(jobs: int, buffer: int) -> int:
    """How many of `jobs` workers `buffer` bytes are enough for; one at least."""
    return max(1, min(jobs, buffer // peak(1)))
