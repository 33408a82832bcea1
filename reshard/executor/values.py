"""The functions of values: small and pure, over numpy arrays. A plan names them; what they are given is a tile's operands.

Every function returns an array of the result's box, of the numbers that the formula gives; the destination's dtype is a cast
like any other. Arithmetic is in float32 where the frameworks' own is.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from reshard.dtypes import numbers_of
from reshard.geometry.block import Box
from reshard.planner.values import Operand, Over, Value

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
        """Operand `number` with an element for each of the result's: where several share one, it is repeated. Axes of the operand
        that lie over none of the result's stay, last."""
        array, operand = self.arrays[number], self.value.operands[number]
        rank, own = len(self.box), [axis for axis, over in enumerate(operand.axes) if not over.axes]
        if len(operand.axes) == rank and operand.axes == Operand.alike(operand.name, tuple(over.size for over in operand.axes)).axes:
            return array
        at = [_index(over, self.box, low, rank) for over, (low, _) in zip(operand.axes, self.boxes[number])]
        tail = len(own)
        for place, axis in enumerate(own):
            at[axis] = np.arange(array.shape[axis]).reshape((1,) * rank + (1,) * place + (-1,) + (1,) * (tail - place - 1))
        if not at:
            return array
        return array[tuple(index if axis in own else index.reshape(index.shape + (1,) * tail) for axis, index in enumerate(at))]

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
    return given.spread(0).astype(np.float32) * given.spread(1).astype(np.float32)


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


def plus_one(given: Given) -> Array:
    return given.arrays[0].astype(np.float32) + np.float32(1)


def minus_one(given: Given) -> Array:
    return given.arrays[0].astype(np.float32) - np.float32(1)


def minus_exp(given: Given) -> Array:
    return -np.exp(given.arrays[0].astype(np.float32))


def log_minus(given: Given) -> Array:
    return np.log(-given.arrays[0].astype(np.float32))


def merged(given: Given) -> Array:
    """A weight and a low-rank update of it: W + factor · B·A."""
    base, a, b = (array.astype(np.float32) for array in given.arrays)
    return base + np.float32(given.settings["factor"]) * (b @ a)


def repeated(given: Given) -> Array:
    """The same scales on a finer grid: exact."""
    return given.spread(0)


#: by the name that a plan gives them
FUNCTIONS: dict[str, Callable[[Given], Array]] = {
    function.__name__: function for function in (scaled, fp4_scaled, plus_one, minus_one, minus_exp, log_minus, merged, repeated)
}
#: the dtypes of what functions return, as the rest calls them
_WORDS = {"float32": "F32", "float8_e4m3fn": "F8_E4M3", "uint8": "U8", "bfloat16": "BF16", "float16": "F16", "float8_e8m0fnu": "F8_E8M0"}


def evaluate(given: Given) -> tuple[Array, str]:
    """The box's numbers, and their dtype."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        out = np.ascontiguousarray(np.broadcast_to(FUNCTIONS[given.value.function](given), given.shape))
    return out, _WORDS[out.dtype.name]


def numbers(words: Array, dtype: str) -> Array:
    return words.view(numbers_of(dtype))
