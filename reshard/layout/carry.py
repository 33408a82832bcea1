"""Places that are carried: a vision tower, a projector. What files have under their prefix becomes tensors of the layout.

Each is whole on every rank and keeps its dtype. From there on they are tensors like all others: planned, counted, compared.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from reshard.layout.bound import Layout
from reshard.layout.fusion import Group
from reshard.layout.model import Entry, Section, Tensor
from reshard.stores import TensorInfo

#: of what is carried, by place and the rest of the name: its shape and dtype
Carried = Mapping[tuple[str, str], tuple[tuple[int, ...], str]]


def found(section: Section, ranks: Iterable[Mapping[str, tuple[str, TensorInfo]]]) -> Carried:
    """What the files of a format (per rank, tensors by name) have under the prefixes of places that are carried."""
    out: dict[tuple[str, str], tuple[tuple[int, ...], str]] = {}
    for names in ranks if section.carried else ():
        for name, (_, info) in names.items():
            for place, prefix in section.carried:
                rest = name.removeprefix(f"{prefix}.") if prefix else name
                if (rest != name or not prefix) and not {"{", "}"} & set(name):
                    out.setdefault((place, rest), (info.shape, info.dtype))
                    break
    return out


def carrying(layout: Layout, carried: Carried) -> Layout:
    """`layout` with tensors and entries for what is `carried`."""
    if not carried:
        return layout
    tensors, axes = {}, {}
    for (place, rest), (shape, _) in carried.items():
        dims = tuple((f"{place} {number} {size}",) for number, size in enumerate(shape))
        tensors[f"{place}.{rest}"] = Tensor(f"{place}.{rest}", (), dims, (), stage="first", place=place)
        axes |= {axis: str(size) for (axis,), size in zip(dims, shape)}
    own = layout.descriptor
    descriptor = replace(
        own,
        tensors={**own.tensors, **tensors},
        axes={**own.axes, **axes},
        formats={format: with_entries(section, carried) for format, section in own.formats.items()},
    )
    sizes = {**layout.sizes, **{axis: int(size) for axis, size in axes.items()}}
    return replace(layout, descriptor=descriptor, sizes=sizes, _cache={})


def with_entries(section: Section, carried: Carried) -> Section:
    """`section` with an entry for each tensor that is `carried`, in a place that it holds."""
    entries = (*section.entries, *_entries(section, carried))
    return replace(section, entries=entries, prefixes=tuple(with_entries(other, carried) for other in section.prefixes))


def _entries(section: Section, carried: Carried) -> Iterator[Entry]:
    prefixes = dict(section.carried)
    for (place, rest), (_, dtype) in carried.items():
        if place in prefixes:
            name = ".".join(filter(None, (prefixes[place], rest)))
            yield Entry(rest, name, Group(None, (f"{place}.{rest}",)), dtype=dtype, place=place)
