"""Run a plan on files: source bytes in, destination bytes out, each once, in a fixed amount of memory.

A tile's bytes are read once, for all ranks that need a part of them. Where they lie in long runs on both sides they are
passed on as they are; else ``rearrange.py`` orders them. Which worker runs a tile does not matter: every byte has its
place, so the output is the same bit for bit.
"""

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import TYPE_CHECKING

from reshard.dtypes import DTYPE_SIZE
from reshard.errors import CastError
from reshard.executor.sources import InMemory, Source, Workspace
from reshard.executor.threads import in_threads
from reshard.geometry.block import Box, Stored, contiguous_from, volume
from reshard.geometry.pieces import union_volume
from reshard.planner.copies import Copy
from reshard.planner.plan import Plan
from reshard.planner.tiles import BUFFER, Portion, Tile, portions, split, tile_limit
from reshard.planner.tiles import casts as casts_in

if TYPE_CHECKING:
    from reshard.executor.casts import Casts
    from reshard.planner.batches import Batch

_RUN = 64 << 10  # bytes: contiguous runs of at least this much are passed on as they are
_PIECE = 1 << 20  # bytes: of a run, at a time; they stay in a core's own cache


def run_tile(
    tile: Tile, source: Source | InMemory, write: Callable[[Stored, int, memoryview], None], space: Workspace, casts: "Casts | None" = None
) -> int:
    """Move one tile. `write(stored, element, bytes)` stores a contiguous run. Where it has `room(stored, element, size)`, the memory in which
    these elements lie, they are put straight there. Returns bytes read from the source."""
    if tile.computed:
        from reshard.executor.compute import compute

        return compute(tile, source, write, space, casts)
    runs = _runs_of(tile)
    if runs is not None:
        read = _pass_on(runs, source, write, space)
    else:
        from reshard.executor.rearrange import rearrange  # numpy's import takes longer than a small conversion

        read = rearrange(tile, source, write, space, casts)
    space.reset()
    source.count(read)
    return read


@dataclass(frozen=True, slots=True)
class Runs:
    """Copies of one box of `src` whose innermost `size` elements lie in one piece on all sides."""

    src: Stored
    starts: list[int]  # element of `src` at which each run begins
    size: int
    copies: list[tuple[Stored, list[int]]]  # destination, and the element of it at which each run begins


def _runs_of(tile: Tile) -> list[Runs] | None:
    """The tile as long runs, where it needs no arithmetic and no element would be read twice; else None."""
    if tile.checks:
        return None
    sharing: dict[tuple[object, ...], list[Copy]] = defaultdict(list)
    boxes: dict[tuple[object, ...], set[Box]] = defaultdict(set)
    for copy in tile.copies:
        if copy.src.dtype != copy.dst.dtype:
            return None
        sharing[copy.src.id, copy.key, copy.move.box].append(copy)
        boxes[copy.src.id, copy.key].add(copy.move.box)
    if any(len(held) > 1 and union_volume(held) != sum(map(volume, held)) for held in boxes.values()):
        return None
    out = []
    for copies in sharing.values():
        src, move = copies[0].src, copies[0].move
        sides = [move.src_strides, *(copy.move.dst_strides for copy in copies)]
        depth = max(contiguous_from(move.shape, strides) for strides in sides)
        size = prod(move.shape[depth:])
        if size * DTYPE_SIZE[src.dtype] < min(_RUN, move.size * DTYPE_SIZE[src.dtype]):
            return None
        outer = list(product(*map(range, move.shape[:depth])))

        def starts(offset: int, strides: tuple[int, ...], outer: list[tuple[int, ...]] = outer) -> list[int]:
            return [offset + sum(i * s for i, s in zip(index, strides)) for index in outer]

        targets = [(copy.dst, starts(copy.move.dst_offset, copy.move.dst_strides)) for copy in copies]
        out.append(Runs(src, starts(move.src_offset, move.src_strides), size, targets))
    return out


def _pass_on(runs: list[Runs], source: Source | InMemory, write: Callable[[Stored, int, memoryview], None], space: Workspace) -> int:
    """Read each run, piece by piece, and write it wherever it belongs."""
    total = 0
    for run_ in runs:
        width = DTYPE_SIZE[run_.src.dtype]
        step = _PIECE // width
        room = getattr(write, "room", None) if len(run_.copies) == 1 else None
        buffer = space.take(min(run_.size, step) * width) if room is None else memoryview(b"")
        for i, start in enumerate(run_.starts):
            if room is not None:
                [(dst, places)] = run_.copies
                source.read(run_.src, start, room(dst, places[i], run_.size))
                continue
            for at in range(0, run_.size, step):
                piece = buffer[: min(step, run_.size - at) * width]
                source.read(run_.src, start + at, piece)
                for dst, places in run_.copies:
                    write(dst, places[i] + at, piece)
        total += len(run_.starts) * run_.size * width
        space.reset()
    return total


def run(
    plan: Plan,
    source: Source,
    write: Callable[[Stored, int, memoryview], None],
    *,
    jobs: int = 2,
    buffer: int = BUFFER,
    progress: Callable[[int], None] = lambda size: None,
) -> None:
    """Run all of `plan` on `jobs` threads within `buffer` bytes of buffers. `progress` is told source bytes as they go."""
    if source.remote:
        from reshard.planner.batches import batches

        run_batches(list(enumerate(batches(plan))), source, write, jobs=jobs, buffer=buffer, progress=progress)
        return
    with casts_judged(plan, source):
        run_portions(list(enumerate(portions(plan))), source, write, limit=tile_limit(plan, jobs, buffer), jobs=jobs, progress=progress)


def run_portions(
    numbered: list[tuple[int, Portion]],
    source: Source,
    write: Callable[[Stored, int, memoryview], None],
    *,
    limit: int,
    jobs: int,
    progress: Callable[[int], None] = lambda size: None,
    moved: Callable[[int], None] = lambda number: None,
) -> None:
    """Move portions of a local source's plan, in tiles of `limit` bytes. `moved` is told each portion that is written."""
    queue = deque(numbered)
    lock = threading.Lock()

    def move(item: tuple[int, Portion], space: Workspace, stop: threading.Event) -> None:
        number, portion = item
        for part in portion.tiles:
            for tile in split(part, limit):
                read = run_tile(tile, source, write, space, source.casts)
                with lock:
                    progress(read)
                if stop.is_set():
                    return
        moved(number)

    # half of the workers begin at either end: they seldom want to write to the same file
    in_threads(jobs, lambda number: queue.pop() if number % 2 else queue.popleft(), move)


@contextmanager
def casts_judged(plan: Plan, source: Source) -> Iterator[None]:
    """While it runs, the casts of `plan` are judged as `source` was told, else strictly. One that is refused, by a tile that showed it,
    is told with all that its tensor would lose."""
    if source.casts is None and casts_in(plan):
        from reshard.executor.casts import Casts

        source.casts = Casts()
    try:
        yield
    except CastError:
        from reshard.executor.casts import refused
        from reshard.executor.rearrange import whole_loss

        assert source.casts is not None
        raise refused(whole_loss(plan, source, source.casts)) from None


def run_batches(
    numbered: list[tuple[int, "Batch"]],
    source: Source,
    write: Callable[[Stored, int, memoryview], None],
    *,
    jobs: int,
    buffer: int = BUFFER,
    progress: Callable[[int], None] = lambda size: None,
    moved: Callable[[int], None] = lambda number: None,
) -> None:
    """Fetch and move batches of a remote source, in order. `progress` is told bytes as they arrive, `moved` each batch that is written.

    No worker runs further ahead of the slowest than ``fetch.AHEAD`` allows: a checksum need not hold more than that for it.
    """
    from reshard.planner.batches import AHEAD, BATCH, workers

    jobs = workers(jobs, buffer)
    queue = deque(numbered)
    lock, turn = threading.Lock(), threading.Condition()
    in_flight: set[int] = set()
    rooms = threading.local()

    def tell(size: int) -> None:
        with lock:
            progress(size)

    def take(worker: int) -> tuple[int, "Batch"]:
        with turn:
            while queue and in_flight and queue[0][0] - min(in_flight) > AHEAD * jobs:
                turn.wait()
            item = queue.popleft()
            in_flight.add(item[0])
            return item

    def move(item: tuple[int, "Batch"], space: Workspace, stop: threading.Event) -> None:
        try:
            fetch_and_move(*item, space, stop)
        finally:
            with turn:
                in_flight.discard(item[0])
                turn.notify_all()

    def fetch_and_move(number: int, batch: "Batch", space: Workspace, stop: threading.Event) -> None:
        if not hasattr(rooms, "room"):
            rooms.room = Workspace()
            rooms.room.take(BATCH)  # so that it has this size, and not twice
        rooms.room.reset()
        held = source.hold(batch.ranges[0], rooms.room, tell)
        for tile in batch.tiles:
            run_tile(tile, held, write, space, source.casts)
        if not stop.is_set():
            moved(number)

    in_threads(jobs, take, move, source.stop)
