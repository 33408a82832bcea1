"""Numbers of one dtype as those of another, and what is lost by it: a finite value that the smaller one has no room for.

Rounding is what a cast is for. Infinity in the place of a number is not: it is refused, or counted where it was allowed. A whole
number that has no room is refused always: another would stand in its place.
"""

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from reshard.dtypes import DTYPE_SIZE, TABLE, numbers_of, words_of
from reshard.errors import CastError
from reshard.geometry.block import Box, Id, Key, Stored
from reshard.geometry.coverage import where
from reshard.planner.copies import Copy

#: a box of a tensor in a source, that casts were counted of
Counted = tuple[Id, Key, Box]


def cast(view: np.ndarray, src: str, dst: str) -> np.ndarray:
    """`view`'s words of dtype `src` as words of dtype `dst`, rounded to nearest even as torch does. NaN stays NaN, with other bits perhaps."""
    if src == dst:
        return view
    with np.errstate(over="ignore", invalid="ignore"):  # what no longer fits is counted, not warned of
        flat = np.ascontiguousarray(view).view(numbers_of(src)).astype(numbers_of(dst)).view(words_of(DTYPE_SIZE[dst]))
        return flat.reshape(view.shape)  # which may be of no dimension


@dataclass
class Loss:
    """Finite values of one tensor that became infinite (or NaN): how many, and the largest magnitude among them."""

    stored: Stored
    dtype: str
    values: int = 0
    largest: float = 0.0

    def words(self, at_least: str = "") -> str:
        ends = TABLE[self.dtype].largest or int(np.iinfo(numbers_of(self.dtype)).max)
        return f"{where(self.stored)}: {at_least}{self.values:,} values of up to {self.largest:.6g} do not fit {self.dtype}, which ends at {ends:.6g}"


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

    def cast(self, copy: Copy, view: np.ndarray, counted: set[Counted]) -> np.ndarray:
        """``cast`` of the words of `copy`. `counted` are the source boxes that were counted already, for other destinations."""
        src, dst = copy.src.dtype, copy.dst.dtype
        out = cast(view, src, dst)
        if src != dst and (
            _other_number(view, out, src, dst)
            if TABLE[src].kind == "int"
            else TABLE[src].largest > TABLE[dst].largest and _not_finite(out, dst)
        ):
            at = copy.src.id, copy.key, copy.move.box
            if at not in counted:
                counted.add(at)
                self._count(copy, view, out)
        return out

    def _count(self, copy: Copy, view: np.ndarray, out: np.ndarray) -> None:
        whole = TABLE[copy.src.dtype].kind == "int"
        values, others = np.abs(numbers(view, copy.src.dtype)), numbers(out, copy.dst.dtype)
        lost = values != np.abs(others) if whole else np.isfinite(values) & ~np.isfinite(others)
        if not lost.any():
            return
        with self._lock:
            loss = self.lost.setdefault(copy.key, Loss(copy.src, copy.dst.dtype))
            loss.values += int(np.count_nonzero(lost))
            loss.largest = max(loss.largest, float(values[lost].max()))
            if whole or not self.allow:
                raise refused([loss], "at least ")


def refused(losses: Iterable[Loss], at_least: str = "") -> CastError:
    text = "\n  ".join(loss.words(at_least) for loss in losses)
    return CastError(
        text, "use --dtype bf16 or fp32, which have room for them; --allow-overflow (allow_overflow) writes infinity in their place"
    )


def _other_number(words: np.ndarray, out: np.ndarray, src: str, dst: str) -> bool:
    """Whether any of a whole number's words is another number as `dst`."""
    return not np.array_equal(words.view(numbers_of(src)), out.view(numbers_of(dst)))


def _not_finite(words: np.ndarray, dtype: str) -> bool:
    """Whether any of a float's words is infinite or NaN: its exponent is all ones. Two passes over integers, the cheapest test."""
    if not words.size:
        return False
    bits = TABLE[dtype].exponent
    sign = 1 << (8 * words.itemsize - 1)
    return int(words.view(f"i{words.itemsize}").max()) >= bits or int(words.max()) >= bits | sign


def numbers(words: np.ndarray, dtype: str) -> np.ndarray:
    """The values of a float's words, as float64."""
    return np.ascontiguousarray(words).view(numbers_of(dtype)).astype(np.float64)
