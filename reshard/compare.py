"""diff: the join of two checkpoints, with comparing in the place of copying. One bounded pass over both.

What was compared is counted, element by element: a tensor of which a part lies on neither side's shards, or was passed over,
is reported as different, never as equal. Weights that a layout leaves out are compared under their own names.
"""

import threading
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np

from reshard.api import Difference, DiffReport
from reshard.block import Block, Box, Key, Stored, end, volume
from reshard.checkpoint import Checkpoint
from reshard.coverage import Coverage, label, union_volume
from reshard.execute import Source, Workspace, in_threads
from reshard.fetch import JOBS, Batch, batches, of_pair, runs, workers
from reshard.join import Copy, Move, Plan, holders, move_between
from reshard.layout import Mesh, Placement
from reshard.rearrange import GAP, cast, mapped, strided
from reshard.stores import DTYPE_SIZE
from reshard.tiles import BUFFER, Tile, tiles

Held = dict[Key, list[tuple[Stored, Block]]]
_INTEGERS = {"BOOL": "?", "U8": "u1", "I8": "i1", "U16": "u2", "I16": "i2", "U32": "u4", "I32": "i4", "U64": "u8", "I64": "i8"}


@dataclass
class Pair:
    """Two checkpoints, tensor by tensor: what holds each on either side, and the sizes that it has there."""

    sides: tuple[Held, Held]
    sizes: tuple[dict[Key, tuple[int, ...]], dict[Key, tuple[int, ...]]]
    copies: list[Copy] = field(default_factory=list)

    @property
    def both(self) -> list[Key]:
        return [key for key in self.sides[0] if key in self.sides[1]]

    def only(self, side: int) -> list[Key]:
        return sorted(self.sides[side].keys() - self.sides[1 - side].keys(), key=str)

    def bytes(self, side: int, key: Key) -> int:
        return _volume(self.sizes[side][key]) * DTYPE_SIZE[self.sides[side][key][0][0].dtype]

    def coverage(self, key: Key) -> list[int]:
        """How many elements of a tensor lie on each side."""
        return [Coverage().covered([block for _, block in held[key]], sizes[key])[0] for held, sizes in zip(self.sides, self.sizes)]


def pair(a: Checkpoint, b: Checkpoint) -> Pair:
    """Copies that line up every box of `b` (dst) with every box of `a` (src) of the same tensor, all replicas included."""
    sides = tuple(dict(holders([*checkpoint.stored, *checkpoint.left_out])) for checkpoint in (a, b))
    found = Pair(sides, tuple(_sizes(checkpoint, held) for checkpoint, held in zip((a, b), sides)))
    moves: dict[tuple[int, int], Move | None] = {}
    for key in found.both:
        if found.sizes[0][key] != found.sizes[1][key]:
            continue
        for stored, block in sides[1][key]:
            for source, other in sides[0][key]:
                at = id(other), id(block)
                if at not in moves:
                    moves[at] = move_between(other, block)
                if moves[at] is not None:
                    found.copies.append(Copy(key, source, stored, moves[at]))
    return found


def _sizes(checkpoint: Checkpoint, held: Held) -> dict[Key, tuple[int, ...]]:
    """Per tensor, its size along each of its axes."""
    of = {tensor.name: checkpoint.layout.shape(tensor) for tensor in checkpoint.layout.descriptor.tensors.values()}
    return {key: of[key[0]] if own[0][0].entry is not None else own[0][1].shape for key, own in held.items()}


def compare(a: Checkpoint, b: Checkpoint, progress: Callable[[int], None] = lambda size: None) -> DiffReport:
    """See ``api.diff``."""
    lined_up = pair(a, b)
    names = hf_names(a) | hf_names(b)

    def name(key: Key) -> str:
        return names.get(key, label(key))

    missing = [lined_up.only(1), lined_up.only(0)]
    report = DiffReport(len(lined_up.sides[0].keys() | lined_up.sides[1].keys()), [], *[[name(key) for key in keys] for keys in missing])
    report.bytes_missing_in_a, report.bytes_missing_in_b = (sum(lined_up.bytes(1 - side, key) for key in missing[side]) for side in (0, 1))
    tally = _Tally(progress)
    with closing(a.source()) as left, closing(b.source()) as right:
        plan = Plan([], lined_up.copies)
        if left.remote or right.remote:
            _look_from_afar(plan, left, right, tally.look)
        else:
            for tile in tiles(plan):
                tally.look(tile, left, right)
    for key in lined_up.both:
        difference = tally.found.get(key)
        why = _not_compared(lined_up, key, tally.compared[key])
        if why:
            difference = difference or Difference("", 0, None)
            difference.elements += _volume(lined_up.sizes[0][key]) - tally.compared[key]
            difference.why = "; ".join(text for text in (difference.why, why) if text)
        if difference:
            difference.name = name(key)
            report.differing.append(difference)
    report.differing.sort(key=lambda difference: difference.name)
    return report


def _not_compared(lined_up: Pair, key: Key, compared: int) -> str:
    """Why not every element of a tensor that both sides have was compared; empty where every one was."""
    sizes = [side[key] for side in lined_up.sizes]
    if sizes[0] != sizes[1]:
        return f"sizes {list(sizes[0])} and {list(sizes[1])}"
    whole = _volume(sizes[0])
    if compared == whole:
        return ""
    held = lined_up.coverage(key)
    lacks = ", ".join(f"{side} lacks {whole - own}" for side, own in zip(("the first", "the second"), held) if own != whole)
    return f"{compared} of {whole} elements compared" + (f": {lacks}" if lacks else "")


class _Tally:
    """What was compared, and what of it differs. Tiles of one tensor do not overlap, so that its elements count once."""

    def __init__(self, progress: Callable[[int], None]):
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
                wrong = _unequal(mine, other, copy)
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

    def _note(self, copy: Copy, largest: float) -> None:
        with self._lock:
            entry = self.found.setdefault(copy.key, Difference(""))
            entry.max_abs_diff = float(np.maximum(entry.max_abs_diff, largest))  # NaN stays NaN
            if copy.src.dtype != copy.dst.dtype:
                entry.why = f"{copy.src.dtype} and {copy.dst.dtype}"


def _unequal(mine: np.ndarray, other: np.ndarray, copy: Copy) -> np.ndarray | None:
    """Which elements differ, bit for bit; None where none does. Of unlike dtypes all differ, unless an engine wanted one of
    them (a descriptor's `dtype`): then values count."""
    if copy.src.dtype == copy.dst.dtype:
        wrong = mine != other
    elif any(stored.entry is not None and stored.entry.dtype for stored in (copy.src, copy.dst)):
        wrong = np.asarray(cast(mine, copy.src.dtype, "F32") != cast(other, copy.dst.dtype, "F32"))
    else:
        return np.ones(mine.shape, bool)
    return np.asarray(wrong) if np.any(wrong) else None


def _largest(mine: np.ndarray, other: np.ndarray, copy: Copy) -> float:
    """The largest difference of some elements; NaN where a NaN is among them."""
    with np.errstate(invalid="ignore", over="ignore"):
        gap = np.abs(_values(mine, copy.src.dtype) - _values(other, copy.dst.dtype))
    return float(gap.max(initial=0.0))  # numpy's maximum is NaN where any is


def _values(words: np.ndarray, dtype: str) -> np.ndarray:
    """The numbers that `words` of `dtype` stand for, as float64 (complex128 for complex ones)."""
    from reshard.api import torch_dtypes

    words = np.ascontiguousarray(words)
    if dtype in _INTEGERS:
        return words.view(_INTEGERS[dtype]).astype(np.float64)
    import torch

    kind = torch_dtypes().get(dtype)
    if kind is None:
        return words.astype(np.float64)  # a dtype that this torch does not know: by its codes
    numbers = torch.from_numpy(words.view(f"i{words.itemsize}")).view(kind)
    return numbers.to(torch.complex128 if kind.is_complex else torch.float64).numpy()


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


def _volume(sizes: tuple[int, ...]) -> int:
    return volume(tuple((0, size) for size in sizes))


def hf_names(checkpoint: Checkpoint) -> dict[Key, str]:
    """Each tensor's name in the Hugging Face format, for people."""
    from reshard import formats

    section = checkpoint.layout.section("hf")
    stored = Placement(checkpoint.layout, section, formats.get("hf").rules, Mesh()).stored()
    return {key: s.name for s in stored for key, _ in s.blocks}
