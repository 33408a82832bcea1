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

    def spread(self, number: int, array: Array | None = None, opened: int = -1, each: int = 1) -> Array:
        """Operand `number` with an element for each of the result's: where several share one, it is repeated. Its axes lie over
        the result's in their order; what it does not depend on has size 1. `array`: what was made of it, with `each` elements
        for one along axis `opened`."""
        operand, array = self.value.operands[number], self.arrays[number] if array is None else array
        for axis, over in reversed(list(enumerate(operand.axes))):  # the innermost first: what is repeated of it is still small
            times = each if axis == opened else 1
            index = _index(over, self.box, self.boxes[number][axis][0] * times, len(self.box), over.grain // times).ravel()
            if len(index) != array.shape[axis] or over.grain > times or index[0]:
                array = _taken(array, index, axis)
        covered = {axis for over in operand.axes for axis in over.axes}
        return array.reshape([n if axis in covered else 1 for axis, n in enumerate(self.shape)])

    def last(self, number: int, side: str) -> int:
        """The axis of operand `number` that is the last along a `side` of the result's matrix, out or in."""
        rows, axes = self.settings["rows"], self.value.operands[number].axes
        return max(i for i, over in enumerate(axes) if over.axes and (over.axes[-1] < rows) == (side == "out"))

    def position(self, axis: int) -> Array:
        """The place of each element of the box along `axis` of the result."""
        start, stop = self.box[axis]
        return np.arange(start, stop).reshape([-1 if a == axis else 1 for a in range(len(self.box))])


def _index(over: Over, box: Box, low: int, rank: int, grain: int) -> Array:
    """Which element of an operand's axis each element of the result's `box` takes; `low` is the first that is there."""
    flat = np.zeros((1,) * rank, np.int64)
    for axis, size in zip(over.axes, over.sizes):
        start, stop = box[axis]
        flat = flat * size + np.arange(start, stop).reshape([-1 if a == axis else 1 for a in range(rank)])
    return flat // grain - low


def _taken(array: Array, index: Array, axis: int) -> Array:
    """np.take along one axis; what is one range of it is not copied."""
    if index[-1] - index[0] + 1 == len(index):
        part: Array = array[(slice(None),) * axis + (slice(index[0], index[-1] + 1),)]
        return part
    return np.take(array, index, axis=axis)


def scaled(given: Given) -> Array:
    """Codes times the scales of their blocks (DeepSeek's `weight_scale_inv`, compressed-tensors' `weight_scale`: both are multiplied)."""
    return _rounded(given, _numbers(given.spread(0)) * given.spread(1, _scale(given)))


def _scale(given: Given) -> Array:
    """The scales, in float32: times the matrix' own one where there is such, or over it (`inverse`)."""
    scale = _numbers(given.arrays[1], exponents=True)
    if len(given.arrays) < 3 or given.settings.get("bits"):
        return scale
    whole = given.arrays[2].astype(np.float32).reshape(-1)[0]
    factor: Array = scale / whole if given.settings.get("inverse") else scale * whole
    return factor


def _rounded(given: Given, out: Array) -> Array:
    """Products as compressed-tensors and the kernels of GPTQ and AWQ leave them: in the dtype of the scales."""
    kept = given.settings.get("rounded") and given.arrays[1].dtype.name in ("float16", "bfloat16")
    made: Array = out.astype(given.arrays[1].dtype) if kept else out
    return made


def _numbers(words: Array, exponents: bool = False) -> Array:
    """The values of codes or scales in float32; those of one byte are looked up, which is three times as fast as converted.
    `exponents`: bytes are powers of two, stored with a bias of 127 (E8M0, which some files call U8)."""
    if words.dtype.itemsize > 1:
        return words.astype(np.float32)
    dtype = numbers_of("F8_E8M0") if exponents and words.dtype.kind == "u" else words.dtype
    return np.take(_values_of(dtype), words.view(np.uint8), mode="clip")  # no byte is past 255: nothing to check


@lru_cache
def _values_of(dtype: np.dtype[Any]) -> Array:
    with np.errstate(invalid="ignore"):
        return np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)


#: the values of FP4 (E2M1), by code. Source: OCP Microscaling Formats specification, 5.3.3
_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def fp4_scaled(given: Given) -> Array:
    """FP4 codes, two to a byte and the first in its low half, times the scales of their groups."""
    packed, axis = given.arrays[0], given.last(0, "in")  # bytes of a group may be an axis of their own, behind it
    opened = _opened(packed, _fp4_pairs()).reshape(*packed.shape[:axis], -1, *[1] * (packed.ndim - axis - 1))
    return given.spread(0, opened, axis, opened.shape[axis] // packed.shape[axis]) * given.spread(1, _scale(given))


@lru_cache
def _fp4_pairs() -> Array:
    return _FP4[np.stack([np.arange(256) & 15, np.arange(256) >> 4], 1)]


def _opened(words: Array, table: Array) -> Array:
    """Each byte of `words` as the several values that `table` has for it: along one more axis."""
    return np.take(table, words.view(np.uint8), axis=0, mode="clip")


def int_scaled(given: Given) -> Array:
    """Whole numbers of `bits`, 32 bits to a word, less their zero points, times the scales of their groups. `codes` and `zeros` say
    along which side each is packed, `order` (AWQ) in which nibble each stands, `less` what is subtracted of codes without zero
    points, `more` what is added to zero points (GPTQ stores them less one)."""
    settings = given.settings
    out = _unpacked(given, 0, settings["codes"])
    if len(given.arrays) > 2:
        out = out - (_unpacked(given, 2, settings["zeros"]) + np.float32(settings.get("more", 0)))
    else:
        out = out - np.float32(settings["less"])
    return _rounded(given, out * given.spread(1, _scale(given)))


def _unpacked(given: Given, number: int, side: str) -> Array:
    """The whole numbers packed in operand `number` along `side`, for each element of the result."""
    bits, axis, words = given.settings["bits"], given.last(number, side), given.arrays[number]
    each = 32 // bits
    lying = np.ascontiguousarray(np.moveaxis(words, axis, -1))
    opened = _opened(lying, _fields(bits)).reshape(*lying.shape, each)
    order = str(given.settings.get("order", ""))
    if order:
        opened = opened[..., [int(digit) for digit in order]]
    whole = np.moveaxis(opened.reshape(*lying.shape[:-1], -1), -1, axis)
    return given.spread(number, whole, axis, each)


@lru_cache
def _fields(bits: int) -> Array:
    """The fields of `bits` in a byte, the lowest first."""
    each = 8 // bits
    return ((np.arange(256)[:, None] >> (np.arange(each) * bits)) & ((1 << bits) - 1)).astype(np.float32)


def shape(given: Given) -> Array:
    """The sizes of a matrix, out and in."""
    return np.array([given.settings["out"], given.settings["in"]], np.int64)[given.position(0)]


def groups(given: Given) -> Array:
    """The group of each input, where groups follow one another; `sizes` are those of the input's axes."""
    flat = np.zeros((1,) * len(given.box), np.int64)
    for axis, size in enumerate(str(given.settings["sizes"]).split()):
        flat = flat * int(size) + given.position(axis)
    group = given.settings["size"]
    return (flat // group if group > 0 else flat * 0).astype(np.int32)


def fp8_scale(given: Given) -> Array:
    """The scales of blocks: the largest magnitude in each, at least 1e-4, over 448. Source: DeepGEMM's per_block_cast_to_fp8,
    which vLLM has, too."""
    largest, _ = _blocks(given)
    overs, shape, inside = given.value.operands[0].axes, [], []
    for axis, (start, stop) in enumerate(given.box):
        (over, (low, high)) = next((over, box) for over, box in zip(overs, given.boxes[0]) if over.axes == (axis,))
        first, last = low * over.grain // over.times, -(-high * over.grain // over.times)
        shape.append(last - first)
        inside.append(slice(start - first, stop - first))
    scales: Array = (largest / np.float32(448)).reshape(shape)[tuple(inside)]
    return scales


def fp8_codes(given: Given) -> Array:
    """The codes of weights: divided by the scale of their block (times its inverse), rounded to E4M3. Source: as ``fp8_scale``."""
    largest, edges = _blocks(given)
    factors = np.float32(1) / (largest / np.float32(448))
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
    for function in (
        scaled,
        fp4_scaled,
        int_scaled,
        shape,
        groups,
        fp8_codes,
        fp8_scale,
        plus_one,
        divided,
        minus_one,
        minus_exp,
        log_minus,
        merged,
        repeated,
    )
}
#: the dtypes of what functions return, as the rest calls them
_WORDS = {"float32": "F32", "float8_e4m3fn": "F8_E4M3", "uint8": "U8", "bfloat16": "BF16", "float16": "F16", "float8_e8m0fnu": "F8_E8M0",
          "int32": "I32", "int64": "I64"}  # fmt: skip


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
