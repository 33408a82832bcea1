"""Places that are carried: a vision tower, a projector. What files have under their prefix becomes tensors of the layout.

Each is whole on every rank and keeps its dtype. From there on they are tensors like all others: planned, counted, compared.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from reshard.layout.bound import Layout
from reshard.layout.fusion import Group
from reshard.layout.model import Entry, Section, Tensor

#: of what is carried, by place and the rest of the name: its shape and dtype
Carried = Mapping[tuple[str, str], tuple[tuple[int, ...], str]]


def found(section: Section, held: Iterable[tuple[str, tuple[int, ...] | None, str]]) -> Carried:
    """What files have under the prefixes of places that are carried. `held`: names with shapes (of a region: where it ends) and dtypes."""
    out: dict[tuple[str, str], tuple[tuple[int, ...], str]] = {}
    for name, shape, dtype in held if section.carried else ():
        for place, prefix in section.carried:
            rest = name.removeprefix(f"{prefix}.")
            if rest != name and shape is not None and not {"{", "}"} & set(name):
                known = out.get((place, rest), (shape, dtype))[0]
                out[place, rest] = (tuple(map(max, known, shape)) if len(known) == len(shape) else known), dtype
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
    return replace(layout, descriptor=descriptor, sizes=sizes, plain=layout.plain and carrying(layout.plain, carried), _cache={})


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
