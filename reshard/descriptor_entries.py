"""Entries of a format's table in a descriptor: what the format stores under one name, and the constants beside them."""

import math
import struct
from collections.abc import Mapping

from reshard.descriptor_values import STAGES, At, dtype_of, read_dims
from reshard.foreign import quote
from reshard.layout import Constant, Entry, Tensor

_ENTRY_KEYS = ("name", "of", "within", "dims", "dim", "cut", "split", "pad", "when", "stage", "alias", "only_rank0", "view", "dtype")
_CONSTANT_KEYS = ("value", "dtype", "shape", "when")
#: how a constant's value is packed, by its dtype; BF16 is the upper half of F32
_PACKED = {"F64": "<d", "F32": "<f", "F16": "<e", "BF16": "<f"}
_LARGEST_CONSTANT = 1 << 20  # elements


def read_entry(at: At, key: str, value: object, tensors: Mapping[str, Tensor], axes: Mapping[str, str]) -> Entry:
    """The entry `key` of a format's table, a name or a table with a name. Raises LayoutError."""
    table = {"name": value} if isinstance(value, str) else value
    if not isinstance(table, dict) or not isinstance(table.get("name"), str):
        at.fail(f"expected a name or a table with a name, got {quote(repr(value))}")
    at.keys(table, _ENTRY_KEYS)
    parts = _parts(at, key, table, tensors)
    name, index = table["name"], parts[0].index
    fields = at.template(name, index)
    own = read_dims(at, table["dims"], axes) if "dims" in table else None
    if own and (own[0] or own[2]):
        at.fail(f"dims {table['dims']!r} of an entry have no {{…}} and no star: those are the tensor's")
    dims = own[1] if own else None
    stored = [dims or tensor.dims for tensor in parts]
    for tensor, lie in zip(parts, stored):
        if sorted(axis for dim in lie for axis in dim) != sorted(tensor.axes):
            at.fail(f"dims {table.get('dims')!r} must hold the axes of {tensor.name}: {tensor.axes}")
    dim = _dim(at, table, parts, stored)
    stacked = [axis for axis in index if axis not in fields]
    cut = at.choice("cut", table.get("cut", "parts"), ("parts", "whole"))
    stage = None if table.get("stage") is None else at.choice("stage", table["stage"], STAGES)
    split = _split(at, table["split"], parts, axes) if "split" in table else None
    if cut == "whole" and not stored[0]:
        at.fail("cut = 'whole' of a tensor without dimensions")
    if stacked == ["layer"] and "expert" in index:
        at.fail(f"{name!r} numbers experts and stacks layers", "number both, or experts alone may be stacked")
    return Entry(key, name, tuple(tensor.name for tensor in parts), table.get("within"), dims, dim, cut, split,
                 _pad(at, table, parts, stored, stacked, axes), at.when(table), stage, at.flag("alias", table), at.flag("only_rank0", table),
                 _view(at, table["view"], len(stacked) + len(stored[0])) if "view" in table else None,
                 dtype_of(at, table.get("dtype")))  # fmt: skip


def _parts(at: At, key: str, table: dict, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """The tensors that lie in the entry, in order."""
    of = table.get("of", [key])
    if not isinstance(of, list) or not of or not all(isinstance(name, str) for name in of) or len(set(of)) != len(of):
        at.fail(f"of must be a list of tensors, each once, got {quote(repr(of))}")
    unknown = next((name for name in of if name not in tensors), None)
    if unknown is not None:
        at.fail(f"no tensor {unknown!r} in [tensors]", 'say which it holds with of = ["…"]')
    parts = [tensors[name] for name in of]
    if any(tensor.index != parts[0].index for tensor in parts):
        at.fail(f"{quote(repr(table['name']))} and its tensors must be numbered alike, by {parts[0].index}")
    return parts


def _dim(at: At, table: dict, parts: list[Tensor], stored: list) -> int:
    """The dimension along which the entry's parts stand one after another, checked with `within`."""
    dim, within = table.get("dim", 0), table.get("within")
    if type(dim) is not int or not 0 <= dim < max(1, len(stored[0])):
        at.fail(f"dim = {quote(repr(dim))}, but {parts[0].name} has {len(stored[0])} dimensions")
    if any(len(lie) != len(stored[0]) for lie in stored) or (len(parts) > 1 and not stored[0]):
        at.fail(
            f"{', '.join(tensor.name for tensor in parts)} can't be fused: they have {', '.join(str(len(lie)) for lie in stored)} dimensions"
        )
    if within is None:
        return dim
    places = [next((d for d, axes in enumerate(lie) if within in axes), None) if isinstance(within, str) else None for lie in stored]
    if None in places or len(set(places)) > 1:
        odd = parts[places.index(None)].name if None in places else "each of its tensors"
        at.fail(f"within = {quote(repr(within))}, but {odd} has no such axis" + ("" if None in places else " in the same dimension"))
    if "dim" in table and dim != places[0]:
        at.fail(f"dim = {dim}, but within = {within!r} lies in dimension {places[0]}")
    return dim


def _split(at: At, value: object, parts: list[Tensor], axes: Mapping[str, str]) -> tuple[str, ...]:
    split = (at / "split").texts(value)
    for axis in split:
        at.known_axis(axis, axes)
        lacking = next((tensor.name for tensor in parts if axis not in tensor.axes), None)
        if lacking is not None:
            at.fail(f"split: {lacking} has no axis {axis!r}")
    return split


def _pad(
    at: At, table: dict, parts: list[Tensor], stored: list, stacked: list[str], axes: Mapping[str, str]
) -> tuple[tuple[str, str], ...]:
    """Padding lies behind a tensor's last row: of one tensor, along the slowest axis of its first dimension."""
    pad = [
        ((at / "pad").known_axis(axis, axes), (at / "pad" / axis).expression(text))
        for axis, text in (at / "pad").table(table.get("pad", {})).items()
    ]
    for axis, _ in pad:
        if len(pad) > 1 or len(parts) > 1 or stacked or not stored[0] or stored[0][0][:1] != (axis,) or table.get("within") is not None:
            at.fail(
                f"pad: {axis} would be padded inside the stored tensor", "only the first axis of one whole tensor can be padded, at its end"
            )
    return tuple(pad)


def _view(at: At, value: object, count: int) -> tuple[tuple[int, ...], ...]:
    """Dimensions joined to those under which the engine holds a tensor or a stack; each of the `count` own ones stands once."""
    if not isinstance(value, list) or not all(isinstance(group, list) and all(type(d) is int for d in group) for group in value):
        at.fail(f"view must list, per dimension, the dimensions that it joins, got {quote(repr(value))}")
    if sorted(d for group in value for d in group) != list(range(count)):
        at.fail(f"view = {quote(repr(value))} must join the dimensions 0 to {count - 1}, each once")
    return tuple(map(tuple, value))


def read_constant(at: At, name: str, value: object) -> Constant:
    """A tensor of one value that an engine demands beside the weights. Raises LayoutError."""
    table = at.table(value, "a table with value and dtype")
    at.keys(table, _CONSTANT_KEYS)
    number, shape = table.get("value"), table.get("shape", [])
    if isinstance(number, bool) or not isinstance(number, int | float) or table.get("dtype") is None:
        at.fail("needs a value and a dtype")
    dtype = dtype_of(at, table["dtype"])
    if dtype not in _PACKED:
        at.fail(f"a constant of dtype {dtype} can't be written", f"use {', '.join(_PACKED)}")
    try:
        struct.pack(_PACKED[dtype], number)
    except (OverflowError, struct.error):
        at.fail(f"value {quote(number)} does not fit {dtype}")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape) or math.prod(shape) > _LARGEST_CONSTANT:
        at.fail(f"shape must be a short list of sizes, got {quote(repr(shape))}")
    at.template(name, ("layer",))
    return Constant(name, float(number), dtype, tuple(shape), at.when(table))
