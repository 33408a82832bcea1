"""diff: the join of two checkpoints, with comparing in the place of copying. One bounded pass over both."""

import threading
from collections import deque
from collections.abc import Callable
from contextlib import closing

import numpy as np

from reshard.api import Difference, DiffReport
from reshard.block import Box, Key, Stored, end
from reshard.checkpoint import Checkpoint
from reshard.execute import Source, Workspace, in_threads
from reshard.fetch import JOBS, Batch, batches, of_pair, workers
from reshard.join import Copy, Plan, holders, label, move_between
from reshard.layout import Mesh, Placement
from reshard.rearrange import cast, mapped, strided
from reshard.stores import DTYPE_SIZE
from reshard.tiles import BUFFER, Tile, tiles

_INTEGERS = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")


def pair(a: Checkpoint, b: Checkpoint) -> tuple[Plan, list[Key], list[Key], dict[Key, str]]:
    """Copies that line up every box of `b` (dst) with every box of `a` (src) of the same tensor, all replicas included;
    the tensors that only `b` has, that only `a` has, and those whose sizes differ."""
    left, right = sides = [holders(checkpoint.stored) for checkpoint in (a, b)]
    copies, unequal = [], {}
    for key in left.keys() & right.keys():
        bounds = [[max(block.box[x][1] for _, block in side[key]) for x in range(len(side[key][0][1].box))] for side in sides]
        if bounds[0] != bounds[1]:
            unequal[key] = f"{bounds[0]} and {bounds[1]}"
            continue
        for stored, block in right[key]:
            for source, other in left[key]:
                move = move_between(other, block)
                if move is not None:
                    copies.append(Copy(key, source, stored, move))
    return Plan([], copies), sorted(right.keys() - left.keys(), key=str), sorted(left.keys() - right.keys(), key=str), unequal


def compare(a: Checkpoint, b: Checkpoint, progress: Callable[[int], None] = lambda size: None) -> DiffReport:
    """See ``api.diff``."""
    plan, only_b, only_a, unequal = pair(a, b)
    names = hf_names(a) | hf_names(b)
    keys = {key for side in (a, b) for stored in side.stored for key, _ in stored.blocks}
    report = DiffReport(len(keys), [], [names.get(k, label(k)) for k in only_b], [names.get(k, label(k)) for k in only_a])
    found: dict[Key, Difference] = {}
    for key, sizes in unequal.items():
        found[key] = Difference(f"{names.get(key, label(key))} (sizes {sizes})")
    lock = threading.Lock()

    def look(tile: Tile, left: Source, right: Source) -> None:
        for copy in tile.copies:
            move = copy.move
            mine = _view(left, copy.src, move.box, move.src_offset, move.src_strides)
            other = _view(right, copy.dst, move.box, move.dst_offset, move.dst_strides)
            if copy.src.dtype != copy.dst.dtype and (copy.src.entry.dtype or copy.dst.entry.dtype):  # an engine's own dtype: values count
                same = np.array_equal(cast(mine, copy.src.dtype, "F32"), cast(other, copy.dst.dtype, "F32"))
            else:
                same = copy.src.dtype == copy.dst.dtype and np.array_equal(mine, other)
            with lock:
                if not same:
                    _differ(found, names.get(copy.key, label(copy.key)), copy, mine, other)
                progress(move.size * (DTYPE_SIZE[copy.src.dtype] + DTYPE_SIZE[copy.dst.dtype]))

    with closing(a.source()) as left, closing(b.source()) as right:
        if left.remote or right.remote:
            _look_from_afar(plan, left, right, look)
        else:
            for tile in tiles(plan):
                look(tile, left, right)
    report.differing = [found[key] for key in sorted(found, key=str)]
    return report


def _look_from_afar(plan: Plan, left: Source, right: Source, look: Callable[[Tile, Source, Source], None]) -> None:
    """`look` at every tile of `plan`, on threads, each batch of them fetched together."""
    queue = deque(batches(plan, of_pair))

    def work(batch: Batch, space: Workspace, stop: threading.Event) -> None:
        space.reset()
        mine, other = (side.hold(ranges, space, lambda size: None) for side, ranges in zip((left, right), batch.ranges))
        for tile in batch.tiles:
            look(tile, mine, other)

    def stopped() -> None:
        left.stop()
        right.stop()

    in_threads(workers(JOBS, BUFFER), lambda number: queue.popleft(), work, stopped)


def _view(source: Source, stored: Stored, box: Box, offset: int, strides: tuple[int, ...]) -> np.ndarray:
    """One box of a stored tensor, mapped for as long as the array lives."""
    shape = tuple(stop - start for start, stop in box)
    return strided(mapped(source, stored, offset, end(offset, shape, strides)), box, strides)


def _differ(found: dict[Key, Difference], name: str, copy: Copy, mine: np.ndarray, other: np.ndarray) -> None:
    entry = found.setdefault(copy.key, Difference(name))
    if copy.src.dtype == copy.dst.dtype:
        entry.elements += int(np.count_nonzero(mine != other))
    x, y = _values(mine, copy.src.dtype), _values(other, copy.dst.dtype)
    if copy.src.dtype != copy.dst.dtype:
        entry.name = f"{name} ({copy.src.dtype} and {copy.dst.dtype})"
        entry.elements += mine.size
    with np.errstate(invalid="ignore"):
        gap = np.abs(x - y)
    largest = float(np.nanmax(gap)) if gap.size and not np.all(np.isnan(gap)) else float("nan")
    entry.max_abs_diff = max(entry.max_abs_diff, 0.0 if np.isnan(largest) else largest)


def _values(words: np.ndarray, dtype: str) -> np.ndarray:
    """The numbers that `words` of `dtype` stand for, as float64."""
    if dtype in _INTEGERS:
        return words.astype(np.float64)
    if dtype.startswith("F8") or dtype == "C64":
        return words.astype(np.float64)  # compared by their codes: only whether they differ is meant
    wide = words if dtype == "F32" else cast(words, dtype, "F32")
    return np.ascontiguousarray(wide).view(np.float32).astype(np.float64)


def hf_names(checkpoint: Checkpoint) -> dict[Key, str]:
    """Each tensor's name in the Hugging Face format, for people."""
    from reshard import formats

    section = checkpoint.layout.section("hf")
    stored = Placement(checkpoint.layout, section, formats.get("hf").rules, Mesh()).stored()
    return {key: s.name for s in stored for key, _ in s.blocks}
