"""The functions of values: small and pure, over numpy arrays. A plan names them; what they are given is a tile's operands.

Every function returns an array of the result's box, of the numbers that the formula gives; the destination's dtype is a cast
like any other. Arithmetic is in float32 where the frameworks' own is.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from typing import Any

import numpy as np

from reshard.dtypes import numbers_of
from reshard.geometry.block import Box
from reshard.planner.values import Over, Value

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Given:
    """A box of a result, and the boxes of its operands with their numbers."""

    value: Value
    box: Box
    boxes: tuple[Box, ...]
    arrays: tuple[Array, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.box)

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        return dict(self.value.settings)

    def spread(self, number: int) -> Array:
        """Operand `number` with an element for each of the result's: where several share one, it is repeated. Its axes lie over
        the result's in their order; what it does not depend on has size 1."""
        array, operand = self.arrays[number], self.value.operands[number]
        for axis, over in reversed(list(enumerate(operand.axes))):  # the innermost first: what is repeated of it is still small
            index = _index(over, self.box, self.boxes[number][axis][0], len(self.box)).ravel()
            if len(index) != array.shape[axis] or over.grain > 1:
                array = np.take(array, index, axis=axis)
        covered = {axis for over in operand.axes for axis in over.axes}
        return array.reshape([n if axis in covered else 1 for axis, n in enumerate(self.shape)])

    def position(self, axis: int) -> Array:
        """The place of each element of the box along `axis` of the result."""
        start, stop = self.box[axis]
        return np.arange(start, stop).reshape([-1 if a == axis else 1 for a in range(len(self.box))])


def _index(over: Over, box: Box, low: int, rank: int) -> Array:
    """Which element of an operand's axis each element of the result's `box` takes; `low` is the first that is there."""
    flat = np.zeros((1,) * rank, np.int64)
    for axis, size in zip(over.axes, over.sizes):
        start, stop = box[axis]
        flat = flat * size + np.arange(start, stop).reshape([-1 if a == axis else 1 for a in range(rank)])
    return flat // over.grain - low


def scaled(given: Given) -> Array:
    """Codes times the scales of their blocks (DeepSeek's `weight_scale_inv`, compressed-tensors' `weight_scale`: both are multiplied)."""
    return _decoded(given.spread(0)) * given.spread(1).astype(np.float32)


def _decoded(codes: Array) -> Array:
    """The values of codes of one byte: looked up, which is three times as fast as converted."""
    if codes.dtype.itemsize > 1:
        return codes.astype(np.float32)
    return np.take(_values_of(codes.dtype), codes.view(np.uint8), mode="clip")  # no byte is past 255: nothing to check


@lru_cache
def _values_of(dtype: np.dtype[Any]) -> Array:
    with np.errstate(invalid="ignore"):
        return np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)


#: the values of FP4 (E2M1), by code. Source: OCP Microscaling Formats specification, 5.3.3
_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def fp4_scaled(given: Given) -> Array:
    """FP4 codes, two to a byte and the first in its low half, times powers of two whose exponents are stored with a bias of 127."""
    codes = given.arrays[0].view(np.uint8)
    over = given.value.operands[0].axes[-2]
    inner = given.position(over.axes[-1])
    at = [_index(each, given.box, low, len(given.box)) for each, (low, _) in zip(given.value.operands[0].axes[:-1], given.boxes[0])]
    packed = codes[(*at, inner % over.grain // 2)]
    nibbles = np.where(inner % 2, packed >> 4, packed & 15)
    made: Array = np.ldexp(_FP4[nibbles], given.spread(1).view(np.uint8).astype(np.int32) - 127)
    return made


def fp8_scale(given: Given) -> Array:
    """The scales of blocks: the largest magnitude in each, at least 1e-4, over 448. Source: DeepGEMM's per_block_cast_to_fp8."""
    largest, _ = _blocks(given)
    return (largest / np.float32(448)).reshape(given.shape)


def fp8_codes(given: Given) -> Array:
    """The codes of weights: times 448 over the largest magnitude of their block, rounded to E4M3. Source: as ``fp8_scale``."""
    largest, edges = _blocks(given)
    factors = np.float32(448) / largest
    for axis, edge in enumerate(edges):
        factors = np.repeat(factors, edge, axis)
    whole = given.arrays[0].astype(np.float32)
    rows, columns = _matrix(given)
    codes = (whole.reshape(rows, columns) * factors[:rows, :columns]).astype(numbers_of("F8_E4M3")).reshape(whole.shape)
    inside = [slice(start - low, stop - low) for (start, stop), (low, _) in zip(given.box, given.boxes[0])]
    return codes[tuple(inside)]


def _matrix(given: Given) -> tuple[int, int]:
    """Rows and columns of the operand: its first `rows` axes are rows."""
    shape, outer = given.arrays[0].shape, given.settings["rows"]
    return prod(shape[:outer]), prod(shape[outer:])


def _blocks(given: Given) -> tuple[Array, tuple[int, int]]:
    """The largest magnitude in each block of an operand that begins on a block, and the blocks' edges; the last may be partial."""
    rows, columns = _matrix(given)
    edges = given.settings["out"], given.settings["in"]
    largest = np.abs(given.arrays[0].astype(np.float32)).reshape(rows, columns)
    for axis, (size, edge) in enumerate(zip((rows, columns), edges)):
        largest = np.maximum.reduceat(largest, np.arange(0, size, edge), axis=axis)
    return np.maximum(largest, np.float32(1e-4)), edges


def plus_one(given: Given) -> Array:
    return given.arrays[0].astype(np.float32) + np.float32(1)


def divided(given: Given) -> Array:
    """What is held times a number."""
    return given.arrays[0].astype(np.float32) / np.float32(given.settings["by"])


def minus_one(given: Given) -> Array:
    return given.arrays[0].astype(np.float32) - np.float32(1)


def minus_exp(given: Given) -> Array:
    return (-np.exp(given.arrays[0].astype(np.float64))).astype(np.float32)


def log_minus(given: Given) -> Array:
    return np.log(-given.arrays[0].astype(np.float64)).astype(np.float32)


def merged(given: Given) -> Array:
    """A weight and a low-rank update of it: W + factor · R·C; the operands are W, C (the rank, and W's last axes) and R (W's first axes, and the rank)."""
    base, columns, rows = (array.astype(np.float32) for array in given.arrays)
    update = rows.reshape(-1, rows.shape[-1]) @ columns.reshape(columns.shape[0], -1)
    update *= np.float32(given.settings["factor"])
    base += update.reshape(base.shape)
    return base


def repeated(given: Given) -> Array:
    """The same scales on a finer grid: exact."""
    return given.spread(0)


#: by the name that a plan gives them
FUNCTIONS: dict[str, Callable[[Given], Array]] = {
    function.__name__: function
    for function in (scaled, fp4_scaled, fp8_codes, fp8_scale, plus_one, divided, minus_one, minus_exp, log_minus, merged, repeated)
}
#: the dtypes of what functions return, as the rest calls them
_WORDS = {"float32": "F32", "float8_e4m3fn": "F8_E4M3", "uint8": "U8", "bfloat16": "BF16", "float16": "F16", "float8_e8m0fnu": "F8_E8M0"}


def evaluate(given: Given) -> tuple[Array, str]:
    """The box's numbers, and their dtype."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        out = np.ascontiguousarray(np.broadcast_to(FUNCTIONS[given.value.function](given), given.shape))
    return out, _WORDS[out.dtype.name]


def undefined(given: Given, out: Array) -> int:
    """How many elements have no value, though all that they are computed from are numbers."""
    lost = np.isnan(out)
    if not lost.any() or any(np.isnan(array.astype(np.float32)).any() for array in given.arrays if array.dtype.kind not in "iu"):
        return 0
    return int(np.count_nonzero(lost))


def numbers(words: Array, dtype: str) -> Array:
    return words.view(numbers_of(dtype))
