"""Floats of one dtype as those of another, and what is lost by it: a finite value that the smaller one has no room for.

Rounding is what a cast is for. Infinity in the place of a number is not: it is refused, or counted where it was allowed.
"""

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from reshard.block import Key, Stored
from reshard.errors import CastError
from reshard.planner.plan import Copy, where
from reshard.stores import DTYPE_SIZE

#: the largest finite value of each, and its exponent bits in a word
LARGEST = {"F64": 1.7976931348623157e308, "F32": 3.4028234663852886e38, "BF16": 3.3895313892515355e38, "F16": 65504.0}
_EXPONENT = {"F32": 0x7F800000, "BF16": 0x7F80, "F16": 0x7C00}


def word(width: int) -> np.dtype:
    """A dtype that carries `width` bytes untouched."""
    return np.dtype(f"u{width}") if width in (1, 2, 4, 8) else np.dtype(("V", width))


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
    return out.view(word(DTYPE_SIZE[dst])).reshape(view.shape)


@dataclass
class Loss:
    """Finite values of one tensor that became infinite (or NaN): how many, and the largest magnitude among them."""

    stored: Stored
    dtype: str
    values: int = 0
    largest: float = 0.0

    def words(self, at_least: str = "") -> str:
        return f"{where(self.stored)}: {at_least}{self.values:,} values of up to {self.largest:.6g} do not fit {self.dtype}, which ends at {LARGEST[self.dtype]:.6g}"


@dataclass
class Casts:
    """The casts of one run. What does not fit raises CastError, unless `allow`: then it is counted in `lost`.

    A value that is already infinite or NaN in the source is neither. Safe for threads.
    """

    allow: bool = False
    lost: dict[Key, Loss] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def values(self) -> int:
        return sum(loss.values for loss in self.lost.values())

    def cast(self, copy: Copy, view: np.ndarray, counted: set[tuple]) -> np.ndarray:
        """``cast`` of the words of `copy`. `counted` are the source boxes that were counted already, for other destinations."""
        src, dst = copy.src.dtype, copy.dst.dtype
        out = cast(view, src, dst)
        if src != dst and LARGEST[src] > LARGEST[dst] and _not_finite(out, dst):
            at = copy.src.id, copy.key, copy.move.box
            if at not in counted:
                counted.add(at)
                self._count(copy, view, out)
        return out

    def _count(self, copy: Copy, view: np.ndarray, out: np.ndarray) -> None:
        values = np.abs(numbers(view, copy.src.dtype))
        lost = np.isfinite(values) & ~np.isfinite(numbers(out, copy.dst.dtype))
        if not lost.any():
            return
        with self._lock:
            loss = self.lost.setdefault(copy.key, Loss(copy.src, copy.dst.dtype))
            loss.values += int(np.count_nonzero(lost))
            loss.largest = max(loss.largest, float(values[lost].max()))
            if not self.allow:
                raise refused([loss], "at least ")


def refused(losses: Iterable[Loss], at_least: str = "") -> CastError:
    text = "\n  ".join(loss.words(at_least) for loss in losses)
    return CastError(
        text, "use --dtype bf16 or fp32, which have room for them; --allow-overflow (allow_overflow) writes infinity in their place"
    )


def _not_finite(words: np.ndarray, dtype: str) -> bool:
    """Whether any of a float's words is infinite or NaN: its exponent is all ones. Two passes over integers, the cheapest test."""
    if not words.size:
        return False
    bits = _EXPONENT[dtype]
    sign = 1 << (8 * words.itemsize - 1)
    return int(words.view(f"i{words.itemsize}").max()) >= bits or int(words.max()) >= bits | sign


def numbers(words: np.ndarray, dtype: str) -> np.ndarray:
    """The values of a float's words, as float64."""
    import torch

    kinds = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    words = np.require(words, requirements=["C", "W"])
    return torch.from_numpy(words.view(f"i{words.itemsize}")).view(kinds[dtype]).to(torch.float64).numpy()
