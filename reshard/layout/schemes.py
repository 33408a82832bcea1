"""Quantisation schemes: what a matrix is stored as instead, and how the layout of a quantised checkpoint follows from the plain one's.

A scheme is a page in ``layouts/schemes``: the tensors that stand for one matrix (its operands), what their dimensions are in
terms of the matrix's own (``out/128``: 128 rows share an element), their names in each format, and the function that gives the
matrix back. A tensor is quantised iff its operands are in the files; config.json only says which scheme it would be.

``quantised`` adds the operands to a layout as tensors of their own, fused and cut as the matrix is. So codes and scales are
copied like any tensor, and ``Layout.values`` says how the matrix is computed where a destination wants it.
"""

import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from pathlib import Path
from types import MappingProxyType

from reshard.errors import LayoutError, PlanError
from reshard.foreign import quote
from reshard.layout.bound import Layout
from reshard.layout.expressions import evaluate, holds
from reshard.layout.files import layout_dir, read_table
from reshard.layout.model import Entry, Section, Tensor
from reshard.layout.values import FORMATS, dtype_of, expression, known_keys, table_of, text_of
from reshard.planner.values import Operand, Over, Value

_KEYS = {"description", "quantised", "value", "dtype"}
_DIM = re.compile(r"(out|in)(?:/(\S+))?|(\d+)")


@dataclass(frozen=True)
class Kind:
    """One operand: its dimensions as texts, and per format its name's template and the dtype that the engine wants."""

    label: str
    dims: tuple[str, ...]
    dtype: str | None
    names: Mapping[str, str]
    dtypes: Mapping[str, str | None]


@dataclass(frozen=True)
class Scheme:
    """One page. `quantised` is an expression over config.json's quantization_config, `value` the function of the operands."""

    name: str
    description: str
    quantised: str
    value: str
    dtype: str
    kinds: tuple[Kind, ...]


class _Settings(dict[str, object]):
    """quantization_config: what it does not say is null."""

    def __missing__(self, key: str) -> None:
        return None


@lru_cache(maxsize=1)
def schemes() -> tuple[Scheme, ...]:
    """All of ``layouts/schemes``."""
    return tuple(load_scheme(path) for path in sorted((layout_dir() / "schemes").glob("*.toml")))


def load_scheme(path: Path) -> Scheme:
    """One page, checked. Raises LayoutError."""
    where, table = f"scheme {path.stem}", read_table(path)
    kinds = []
    for label, given in table.items():
        if label in _KEYS:
            continue
        at = f"{where}: [{label}]"
        own = table_of(where, label, given)
        known_keys(at, own, {"dims", "dtype", *FORMATS}, "keys")
        dims = tuple(text_of(f"{at} dims", own.get("dims")).split())
        wrong = next((dim for dim in dims if not _DIM.fullmatch(dim)), None)
        if wrong:
            raise LayoutError(f"{at} dims: cannot read {quote(repr(wrong))}", 'write "out", "in", "out/128", or a number')
        names, dtypes = {}, {}
        for format in FORMATS:
            if format in own:
                each = own[format] if isinstance(own[format], dict) else {"name": own[format]}
                known_keys(f"{at} {format}", each, {"name", "dtype"}, "keys")
                names[format] = text_of(f"{at} {format}", each.get("name"))
                dtypes[format] = dtype_of(f"{at} {format}", each.get("dtype"))
        kinds.append(Kind(label, dims, dtype_of(at, own.get("dtype")), names, dtypes))
    value, dtype = (text_of(f"{where}: {key}", table.get(key)) for key in ("value", "dtype"))
    return Scheme(
        path.stem, str(table.get("description", "")), expression(f"{where}: quantised", table.get("quantised")), value, dtype, tuple(kinds)
    )


def quantised(layout: Layout, format: str, names: Container[str]) -> Layout:
    """`layout` of a checkpoint whose files, in `format`, hold `names`: with the operands of those tensors that are quantised in
    the place of them. The same where none is. Raises PlanError, LayoutError."""
    settings = _Settings(config) if isinstance(config := layout.config.get("quantization_config"), Mapping) else None
    scheme = next((each for each in schemes() if settings is not None and holds(each.quantised, settings)), None)
    if scheme is None or settings is None or any(format not in kind.names for kind in scheme.kinds):
        return layout
    every = layout.present(layout.absent)  # optional places are looked for later
    there = set(_found(every, scheme, format, names))
    if not there:
        return layout
    tensors, axes, values = dict(layout.descriptor.tensors), dict(layout.descriptor.axes), {}
    lacking = set(layout.lacking)
    for name in sorted({name for name, _ in there}):
        tensor = tensors[name]
        numbers = [number for number in every.numbers(tensor.place) if every.exists(tensor, number)]
        shapes = {layout.shape(tensor, number) for number in numbers if (name, number) in there}
        if len(shapes) > 1 or len(tensor.dims) != 2:
            raise PlanError([f"{name} is quantised, but {'its size differs from layer to layer' if len(shapes) > 1 else 'is no matrix'}"])
        operands = []
        for kind in scheme.kinds:
            own, operand, sizes = _operand(tensor, shapes.copy().pop(), kind, settings)
            tensors[own.name] = own
            axes |= {axis: str(size) for axis, size in sizes.items()}
            operands.append(operand)
            lacking |= {(own.name, number) for number in numbers if (name, number) not in there}
        lacking |= {(name, number) for number in numbers if (name, number) in there}
        values[name] = Value(scheme.value, tuple(operands), scheme.dtype)
    formats = {key: _section(section, key, scheme, values) for key, section in layout.descriptor.formats.items()
               if all(key in kind.names for kind in scheme.kinds)}  # fmt: skip
    descriptor = replace(
        layout.descriptor, tensors=MappingProxyType(tensors), axes=MappingProxyType(axes), formats=MappingProxyType(formats)
    )
    sizes = {**layout.sizes, **{axis: int(text) for axis, text in axes.items() if axis not in layout.descriptor.axes}}
    return replace(layout, descriptor=descriptor, sizes=sizes, lacking=frozenset(lacking), values=MappingProxyType(values),
                   plain=layout, scheme=scheme.name, _cache={})  # fmt: skip


def _found(layout: Layout, scheme: Scheme, format: str, names: Container[str]) -> Iterator[tuple[str, int | None]]:
    """The tensors whose operands are all among `names`, each with the number of its place."""
    section = layout.section(format)
    every = [section, *section.prefixes, *(variant for _, _, variant in section.variants)]
    for entry in (entry for each in every for entry in each.entries if entry.name and not entry.omit and not entry.copy):
        for number in layout.numbers(entry.place):
            plain = layout.fill(entry.name, entry.place, number, number).replace("{expert}", "0")
            if all(kind.names[format].replace("{name}", plain) in names for kind in scheme.kinds):
                yield from ((name, number if layout.descriptor.tensors[name].place == entry.place else None) for name in entry.of)


def _section(section: Section, format: str, scheme: Scheme, values: Mapping[str, Value]) -> Section:
    """`section` with an entry for each operand of what its entries hold, of the same form."""
    entries = list(section.entries)
    for entry in section.entries:
        if not entry.omit and all(name in values for name in entry.of):
            entries += [_entry(entry, format, kind) for kind in scheme.kinds]
    inner = tuple(_section(each, format, scheme, values) for each in section.prefixes)
    variants = tuple((name, until, _section(each, format, scheme, values)) for name, until, each in section.variants)
    return replace(section, entries=tuple(entries), prefixes=inner, variants=variants)


def _entry(entry: Entry, format: str, kind: Kind) -> Entry:
    names = {name: f"{name}.{kind.label}" for name in entry.of}
    return replace(entry, label=f"{entry.label}.{kind.label}", name=kind.names[format].replace("{name}", entry.name), fusion=entry.fusion.renamed(names),
                   dims=None, pad=(), align="1", aligned=(), view=None, dtype=kind.dtypes[format])  # fmt: skip


def _operand(tensor: Tensor, shape: tuple[int, ...], kind: Kind, settings: Mapping[str, object]) -> tuple[Tensor, Operand, dict[str, int]]:
    """The operand as a tensor of the model, how it lies over `tensor`, and the sizes of axes that it brings."""
    where = dict(zip(tensor.axes, range(len(shape))))
    dims, overs, sizes, grains = [], [], {}, []
    for text in kind.dims:
        match = _DIM.fullmatch(text)
        if match is None or match[3]:
            own = int(text)
            name = f"{tensor.name}.{kind.label}:{own}"
            dims.append((name,) if own > 1 else ())
            if own > 1:
                sizes[name] = own
                overs.append(Over((), (), own))
            continue
        grain = evaluate(match[2], settings) if match[2] else 1
        if not isinstance(grain, int) or isinstance(grain, bool) or grain < 1:
            raise PlanError([f"{text} of quantization_config is {quote(repr(grain))}, not a number of elements"])
        grains.append(f"{grain} of {'input' if match[1] == 'in' else 'output'}" if grain > 1 else "")
        named = []
        for axes, over in _grained([where[axis] for axis in tensor.dims[match[1] == "in"]], shape, grain):
            kept = over.grain == 1 and len(axes) == 1
            name = tensor.axes[axes[0]] if kept else f"{'·'.join(tensor.axes[axis] for axis in axes)}/{over.grain} of {tensor.name}"
            named.append(name)
            overs.append(over)
            if not kept:
                sizes[name] = over.size
        dims.append(tuple(named))
    new = replace(tensor, name=f"{tensor.name}.{kind.label}", dims=tuple(dims), split=(), dtype=kind.dtype or "F32", optional=None)
    return new, Operand(new.name, tuple(overs), " and ".join(filter(None, grains))), sizes


def _grained(axes: list[int], shape: tuple[int, ...], grain: int) -> list[tuple[list[int], Over]]:
    """The axes of a dimension whose flat range is divided by `grain`, as axes of the quotient: those inside a block are gone,
    those outside it stay; where a block ends inside an axis, all outer ones are one flat range with it."""
    left = list(axes)
    while left and grain > 1 and grain % shape[left[-1]] == 0:
        grain //= shape[left.pop()]
    if not left:
        return []
    at = left[-1]
    if grain == 1 or shape[at] % grain == 0 or len(left) == 1:
        split = [([axis], Over((axis,), (shape[axis],), shape[axis])) for axis in left[:-1]]
        return [*split, ([at], Over((at,), (shape[at],), -(-shape[at] // grain), grain))]
    sizes = tuple(shape[axis] for axis in left)
    return [(left, Over(tuple(left), sizes, -(-prod(sizes) // grain), grain))]
