"""diff: the join of two checkpoints, with comparing in the place of copying. One bounded pass over both.

What was compared is counted, element by element: a tensor of which a part lies on neither side's shards, or was passed over,
is reported as different, never as equal. Weights that a layout leaves out are compared under their own names.
"""

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from reshard.checkpoint import Checkpoint
from reshard.comparison.difference import Difference, DiffReport
from reshard.comparison.heat import Heat
from reshard.dtypes import DTYPE_SIZE, TABLE, numbers_of
from reshard.executor.casts import cast
from reshard.executor.rearrange import GAP, mapped, strided
from reshard.executor.sources import Source, Workspace
from reshard.executor.threads import in_threads
from reshard.geometry.block import Box, Key, Stored, end
from reshard.geometry.coverage import label
from reshard.geometry.pieces import union_volume
from reshard.layout import Layout, Mesh, Placement
from reshard.planner.batches import JOBS, Batch, batches, of_pair, runs, workers
from reshard.planner.copies import Copy
from reshard.planner.join import Join, Pattern, join
from reshard.planner.plan import Plan
from reshard.planner.tiles import BUFFER, Tile, tiles

Sizes = Callable[[Key], tuple[int, ...]]


@dataclass(frozen=True)
class Pair:
    """Two checkpoints, tensor by tensor: their join, and the sizes that each tensor of the model has on either side."""

    join: Join
    sizes: tuple[Sizes, Sizes]

    @property
    def both(self) -> Iterator[tuple[Key, Pattern]]:
        for run in self.join.runs:
            for i in range(run.count):
                yield run.key(i), self.join.patterns[run.pattern]

    @property
    def tensors(self) -> int:
        return sum(self.join.counts) + len(self.join.only_source) + len(self.join.only_destination)

    @property
    def plan(self) -> Plan:
        """Every holder of a box against every other side's holder of it, of the tensors that have the same sizes on both sides."""
        mine, theirs = self.sizes
        alike = tuple(run for run in self.join.runs if all(mine(key) == theirs(key) for key in map(run.key, range(run.count))))
        return Plan(replace(self.join, runs=alike), every_pair=True)


def pair(a: Checkpoint, b: Checkpoint) -> Pair:
    """Line up every box of `b` (destination) with every box of `a` (source) of the same tensor, all replicas included."""
    sides = tuple((*checkpoint.stored, *checkpoint.left_out) for checkpoint in (a, b))
    return Pair(join(*sides), (_sizes(a), _sizes(b)))


def _sizes(checkpoint: Checkpoint) -> Sizes:
    """Per tensor of the model, and weight that its layout leaves out, the size along each axis."""
    left = {part.first: part.block.shape for stored in checkpoint.left_out for part in stored.parts}
    return lambda key: left[key] if key in left else checkpoint.layout.shape_of(key)


def _bytes(side: Iterable[Stored], keys: Iterable[Key], sizes: Sizes) -> int:
    """Bytes of some tensors, whole, in the dtype that `side` holds them in."""
    wanted = set(keys)
    dtypes = {key: stored.dtype for stored in side for key, _ in stored.blocks if key in wanted} if wanted else {}
    return sum(prod(sizes(key)) * DTYPE_SIZE[dtype] for key, dtype in dtypes.items())


@dataclass(frozen=True)
class Likeness:
    """When two elements count as equal: bit for bit; or once both are cast to `dtype`; or when they lie within `atol` of each other
    (two equal infinities do; NaN is unlike everything)."""

    dtype: str | None = None
    atol: float = 0.0

    def unequal(self, mine: np.ndarray, other: np.ndarray, copy: Copy) -> np.ndarray | None:
        """Which elements differ; None where none does. Of unlike dtypes all differ, unless an engine wanted one of them (a
        descriptor's `dtype`): then values count."""
        first, second = copy.src.dtype, copy.dst.dtype
        if self.dtype is not None and {TABLE[first].kind, TABLE[second].kind} == {"float"}:
            mine, other = cast(mine, first, self.dtype), cast(other, second, self.dtype)
            first = second = self.dtype
        if first == second and not self.atol:
            wrong = mine != other
        elif self.atol:
            a, b = _values(mine, first), _values(other, second)
            with np.errstate(invalid="ignore"):
                wrong = (a != b) & ~(np.abs(a - b) <= self.atol)
        elif any(stored.entry is not None and stored.entry.dtype for stored in (copy.src, copy.dst)):
            wrong = np.asarray(cast(mine, first, "F32") != cast(other, second, "F32"))
        else:
            return np.ones(mine.shape, bool)
        return np.asarray(wrong) if np.any(wrong) else None


def compare(
    a: Checkpoint,
    b: Checkpoint,
    progress: Callable[[int], None] = lambda size: None,
    likeness: Likeness = Likeness(),
    maps: bool = False,
) -> DiffReport:
    """See ``api.diff``."""
    lined_up = pair(a, b)
    names = hf_names(a) | hf_names(b)

    def name(key: Key) -> str:
        return names.get(key, label(key))

    joined = lined_up.join
    missing = sorted(joined.only_destination, key=str), sorted(joined.only_source, key=str)
    report = DiffReport(lined_up.tensors, [], *[sorted(map(name, keys)) for keys in missing])
    report.bytes_missing_in_a = _bytes(joined.destinations, missing[0], lined_up.sizes[1])
    report.bytes_missing_in_b = _bytes(joined.sources, missing[1], lined_up.sizes[0])
    tally = _Tally(progress, likeness, a.layout if maps else None)
    with closing(a.source()) as left, closing(b.source()) as right:
        plan = lined_up.plan
        if left.remote or right.remote:
            _look_from_afar(plan, left, right, tally.look)
        else:
            for tile in tiles(plan):
                tally.look(tile, left, right)
    for key, pattern in lined_up.both:
        difference = tally.found.get(key)
        why = _not_compared(lined_up.sizes, key, pattern, tally.compared[key])
        if why:
            difference = difference or Difference("", 0, None)
            difference.elements += prod(lined_up.sizes[0](key)) - tally.compared[key]
            difference.why = "; ".join(text for text in (difference.why, why) if text)
        if difference:
            difference.name = name(key)
            report.differing.append(difference)
    report.differing.sort(key=lambda difference: difference.name)
    return report


def _not_compared(sizes: tuple[Sizes, Sizes], key: Key, pattern: Pattern, compared: int) -> str:
    """Why not every element of a tensor that both sides have was compared; empty where every one was."""
    first, second = (side(key) for side in sizes)
    if first != second:
        return f"sizes {list(first)} and {list(second)}"
    whole = prod(first)
    if compared == whole:
        return ""
    held = [union_volume([slot.box for slot in slots]) for slots in (pattern.sources, pattern.destinations)]
    lacks = ", ".join(f"{side} lacks {whole - own}" for side, own in zip(("the first", "the second"), held) if own != whole)
    return f"{compared} of {whole} elements compared" + (f": {lacks}" if lacks else "")


class _Tally:
    """What was compared, and what of it differs. Tiles of one tensor do not overlap, so that its elements count once."""

    def __init__(self, progress: Callable[[int], None], likeness: Likeness, layout: Layout | None):
        self.likeness, self._layout = likeness, layout
        self.compared: dict[Key, int] = defaultdict(int)
        self.found: dict[Key, Difference] = {}
        self._progress = progress
        self._lock = threading.Lock()

    def look(self, tile: Tile, left: Source, right: Source) -> None:
        by_key: dict[Key, list[Copy]] = defaultdict(list)
        for copy in tile.copies:
            by_key[copy.key].append(copy)
        for key, copies in by_key.items():
            differs = None  # which elements of the tile's box differ, in any replica
            for copy in copies:
                move = copy.move
                mine = _view(left, copy.src, move.box, move.src_offset, move.src_strides)
                other = _view(right, copy.dst, move.box, move.dst_offset, move.dst_strides)
                wrong = self.likeness.unequal(mine, other, copy)
                if wrong is not None:
                    whole = tile.boxes[key]
                    if differs is None:
                        differs = np.zeros([stop - start for start, stop in whole], bool)
                    differs[tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(move.box, whole))] |= wrong
                    self._note(copy, _largest(mine[wrong], other[wrong], copy))
                with self._lock:
                    self._progress(move.size * (DTYPE_SIZE[copy.src.dtype] + DTYPE_SIZE[copy.dst.dtype]))
            with self._lock:
                self.compared[key] += union_volume(copy.move.box for copy in copies)
                if differs is not None:
                    self.found[key].elements += int(np.count_nonzero(differs))
                    if self._layout is not None:
                        self._map(key).add(tile.boxes[key], differs)

    def _map(self, key: Key) -> Heat:
        found = self.found[key]
        if found.heat is None:
            tensor = self._layout.descriptor.tensors.get(key[0])
            shape = self._layout.shape_of(key) if tensor else tuple(stop for _, stop in key)
            found.heat = Heat(shape, len(tensor.dims[0]) if tensor and tensor.dims else 0)
        return found.heat

    def _note(self, copy: Copy, largest: float) -> None:
        with self._lock:
            entry = self.found.setdefault(copy.key, Difference(""))
            entry.max_abs_diff = float(np.maximum(entry.max_abs_diff, largest))  # NaN stays NaN
            if copy.src.dtype != copy.dst.dtype:
                entry.why = f"{copy.src.dtype} and {copy.dst.dtype}"


def _largest(mine: np.ndarray, other: np.ndarray, copy: Copy) -> float:
    """The largest difference of some elements; NaN where a NaN is among them."""
    with np.errstate(invalid="ignore", over="ignore"):
        gap = np.abs(_values(mine, copy.src.dtype) - _values(other, copy.dst.dtype))
    return float(gap.max(initial=0.0))  # numpy's maximum is NaN where any is


def _values(words: np.ndarray, dtype: str) -> np.ndarray:
    """The numbers that `words` of `dtype` stand for, as float64 (complex128 for complex ones)."""
    numbers = np.ascontiguousarray(words).view(numbers_of(dtype))
    with np.errstate(invalid="ignore"):
        return numbers.astype(np.complex128 if TABLE[dtype].kind == "complex" else np.float64)


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
    """One box of a stored tensor."""
    shape = tuple(stop - start for start, stop in box)
    needed = runs(offset, shape, strides, GAP // DTYPE_SIZE[stored.dtype])
    return strided(mapped(source, stored, offset, end(offset, shape, strides), needed), box, strides)


def hf_names(checkpoint: Checkpoint) -> dict[Key, str]:
    """Each tensor's name in the Hugging Face format, for people."""
    from reshard import formats

    section = checkpoint.layout.section("hf")
    stored = Placement(checkpoint.layout, section, formats.get("hf").rules, Mesh()).stored()
    return {key: s.name for s in stored for key, _ in s.blocks}
