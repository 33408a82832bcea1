"""Tensors and entries as a descriptor file writes them, typed and checked, each with the place it stands at."""

import math
import re
import struct
from typing import NamedTuple

from reshard.errors import LayoutError
from reshard.foreign import quote
from reshard.layout.fusion import Group, parse
from reshard.layout.model import TRANSFORMS, Dims
from reshard.layout.values import (
    dtype_of,
    expression,
    expressions,
    fields_of,
    flag,
    known_keys,
    stage_of,
    text_of,
    texts,
    until_of,
    when_of,
)

_TENSOR_KEYS = {"dims", "when", "stage", "dtype", "optional"}
_ENTRY_KEYS = {
    "name", "of", "dims", "cut", "split", "pad", "align", "when", "stage", "only_rank0", "view", "dtype", "copy", "omit", "until",
    "form", "constant", "shape", "transform", "scheme",
}  # fmt: skip
_CONSTANT_KEYS = {"name", "constant", "dtype", "shape", "when", "until"}
_OMIT_KEYS = {"omit", "when", "of"}
#: how a constant's value is packed, by its dtype; BF16 is the upper half of F32
_PACKED = {"F64": "<d", "F32": "<f", "F16": "<e", "BF16": "<f"}
_LARGEST_CONSTANT = 1 << 20  # elements


class RawTensor(NamedTuple):
    """`where` names file, table and key, for errors."""

    where: str
    expert: bool
    dims: Dims
    split: tuple[str, ...]
    when: str
    stage: str
    dtype: str | None
    optional: str | None


class RawEntry(NamedTuple):
    """One alternative of one label of one format."""

    where: str
    label: str
    name: str
    fusion: Group | None
    dims: Dims | None = None
    cut: str = "parts"
    split: tuple[str, ...] | None = None
    pad: tuple[tuple[str, str], ...] = ()
    align: str = "1"
    aligned: tuple[tuple[str, str], ...] = ()
    when: str = "true"
    stage: str | None = None
    only_rank0: bool = False
    view: tuple[tuple[int, ...], ...] | None = None
    dtype: str | None = None
    copy: bool = False
    omit: bool | str = False
    until: str | None = None
    form: str | None = None
    constant: float | None = None
    shape: tuple[int, ...] = ()
    transform: str | None = None
    scheme: str | None = None


def parse_dims(where: str, text: object) -> tuple[bool, Dims, tuple[str, ...]]:
    """``{expert} (kv* group* head) hidden`` as (numbered by expert, axes of each dimension, starred axes)."""
    shape = r"\s*(\{\w+\}\s*)*(\(\s*\w+\*?(\s+\w+\*?)*\s*\)|\w+\*?)?(\s+(\(\s*\w+\*?(\s+\w+\*?)*\s*\)|\w+\*?))*\s*"
    if not isinstance(text, str) or len(text) > 500 or not re.fullmatch(shape, text):
        raise LayoutError(f"{where}: cannot read dims {quote(repr(text))}", 'write them like "{expert} (kv* head) hidden"')
    index = re.findall(r"\{(\w+)\}", text)
    if index not in ([], ["expert"]):
        wrong = next((axis for axis in index if axis != "expert"), "expert")
        raise LayoutError(f"{where}: dims may begin with {{expert}} once, not {{{wrong}}}", "layers are numbered by the place, not by dims")
    dims, split = [], []
    for group, single in re.findall(r"\(([^)]*)\)|([\w*]+)", re.sub(r"\{\w+\}", " ", text)):
        words = (group or single).split()
        split += [word.rstrip("*") for word in words if word.endswith("*")]
        dims.append(tuple(word.rstrip("*") for word in words if word != "1"))
    flat = [axis for dim in dims for axis in dim]
    twice = next((axis for axis in flat if flat.count(axis) > 1), None)
    if twice is not None:
        raise LayoutError(f"{where}: an axis stands twice in {quote(repr(text))}: {twice}", "give one of the two another name in [axes]")
    number = next((axis for axis in flat if axis[0].isdigit()), None)
    if number is not None:
        raise LayoutError(f"{where}: {number!r} is no axis in {quote(repr(text))}", "only 1 may stand for itself")
    return bool(index), tuple(dims), tuple(split)


def parse_tensor(where: str, value: object) -> RawTensor:
    table = {"dims": value} if isinstance(value, str) else value
    if not isinstance(table, dict):
        raise LayoutError(f"{where}: expected dims or a table, got {quote(repr(value))}")
    known_keys(where, table, _TENSOR_KEYS, "keys")
    expert, dims, split = parse_dims(where, table.get("dims"))
    when = when_of(where, table)
    optional = expression(f"{where}: optional", table["optional"]) if "optional" in table else None
    return RawTensor(
        where, expert, dims, split, when, stage_of(where, table.get("stage", "last")), dtype_of(where, table.get("dtype")), optional
    )


def parse_entry(where: str, label: str, value: object) -> RawEntry:
    table = {"name": value} if isinstance(value, str) else value
    if not isinstance(table, dict) or not isinstance(table.get("name", ""), str) or not ("name" in table or "omit" in table):
        raise LayoutError(f"{where}: expected a name or a table with a name, got {quote(repr(value))}")
    constant, omit = "constant" in table, table.get("omit", False)
    if not (isinstance(omit, str) and omit):
        omit = flag(f"{where}: omit", omit)
    known_keys(where, table, _CONSTANT_KEYS if constant else _OMIT_KEYS if omit else _ENTRY_KEYS, "keys")
    when = when_of(where, table)
    until, form = until_of(where, table["until"]) if "until" in table else None, table.get("form")
    if form is not None and (not isinstance(form, str) or not re.fullmatch(r"\w+", form)):
        raise LayoutError(f"{where}: form = {quote(repr(form))} is no name")
    if until and form:
        raise LayoutError(f"{where}: until and form together", "write one alternative for each")
    name = table.get("name", "")
    for text in fields_of(where, name):
        if text != "expert":
            raise LayoutError(
                f"{where}: {{{text}}} in {name!r}: only {{expert}} may stand in a name", "numbers of layers stand in the place's prefix"
            )
    if constant:
        return _constant(where, label, table, when, until)
    try:
        fusion = parse(text_of(f"{where}: of", table.get("of", label)))
    except ValueError as error:
        raise LayoutError(f"{where}: of = {quote(repr(table.get('of', label)))}: {error}", 'write it like "kv: q k v"') from None
    if omit:
        return RawEntry(where, label, "", fusion, when=when, omit=omit)
    if not name.strip("./"):
        raise LayoutError(f"{where}: {name!r} is no name")
    numbered, dims, stars = parse_dims(where, table["dims"]) if "dims" in table else (False, None, ())
    if numbered or stars:
        raise LayoutError(f"{where}: dims {table['dims']!r} of an entry have no {{expert}} and no star: those are the tensor's")
    if table.get("cut", "parts") not in ("parts", "whole"):
        raise LayoutError(f"{where}: cut must be parts or whole, got {quote(repr(table['cut']))}")
    if "align" in table and table.get("cut") == "whole":
        raise LayoutError(f'{where}: align does not go with cut = "whole"')
    align, aligned = table.get("align", "1"), ()
    if isinstance(align, dict):
        align, aligned = "1", tuple(expressions(where, "align", align, False).items())
    view = table.get("view")
    if view is not None and not (isinstance(view, list) and all(isinstance(g, list) and all(type(d) is int for d in g) for g in view)):
        raise LayoutError(f"{where}: view must list, per dimension, the dimensions that it joins, got {quote(repr(view))}")
    transform = table.get("transform")
    if transform is not None and (not isinstance(transform, str) or transform not in TRANSFORMS):
        raise LayoutError(f"{where}: unknown transform {quote(repr(transform))}", f"known are {', '.join(TRANSFORMS)}")
    if table.get("scheme", "none") != "none":
        raise LayoutError(
            f"{where}: scheme = {quote(repr(table['scheme']))}: an entry can only say none", "schemes are not part of the notation yet"
        )
    return RawEntry(
        where, label, name, fusion, dims, table.get("cut", "parts"),
        texts(where, "split", table["split"]) if "split" in table else None,
        tuple(expressions(where, "pad", table.get("pad", {}), False).items()), expression(f"{where}: align", align), aligned, when,
        None if "stage" not in table else stage_of(where, table["stage"]), flag(f"{where}: only_rank0", table.get("only_rank0", False)),
        tuple(map(tuple, view)) if view is not None else None, dtype_of(where, table.get("dtype")),
        flag(f"{where}: copy", table.get("copy", False)), False, until, form, transform=transform, scheme=table.get("scheme"),
    )  # fmt: skip


def _constant(where: str, label: str, table: dict, when: str, until: str | None) -> RawEntry:
    value, shape = table["constant"], table.get("shape", [])
    if isinstance(value, bool) or not isinstance(value, int | float) or table.get("dtype") is None:
        raise LayoutError(f"{where}: a constant needs a value and a dtype, got {quote(repr(value))} and {quote(repr(table.get('dtype')))}")
    dtype = dtype_of(where, table["dtype"])
    if dtype not in _PACKED:
        raise LayoutError(f"{where}: a constant of dtype {dtype} can't be written", f"use {', '.join(_PACKED)}")
    try:
        struct.pack(_PACKED[dtype], value)
    except (OverflowError, struct.error):
        raise LayoutError(f"{where}: constant {quote(value)} does not fit {dtype}") from None
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape) or math.prod(shape) > _LARGEST_CONSTANT:
        raise LayoutError(f"{where}: shape must be a short list of sizes, got {quote(repr(shape))}")
    if not table.get("name"):
        raise LayoutError(f"{where}: a constant needs a name")
    return RawEntry(where, label, table["name"], None, when=when, dtype=dtype, until=until, constant=float(value), shape=tuple(shape))
