"""Fusion: what stands one after another in one stored tensor, as a text, and where each of its items then lies.

    q k v                       all of q, then all of k, then all of v
    kv: q k v                   the same, once for every position of the leading axes up to and including kv
    (group: q gate) k v         brackets nest: of every query head its query and its gate, then k, then v

Items are fused along the first dimension of the model's tensors, wherever the stored tensor has it. One rule places all
of it: the *height* of an item is the product of its cut sizes after the outer axes; a group's *period* is the sum of its
items' heights; an outer axis' stride is the period times the sizes of the outer axes after it; an item's offset is the
sum of the heights before it. Integers only.
"""

import re
from collections.abc import Iterator, Mapping
from math import prod
from typing import NamedTuple

from reshard.geometry.block import Block, row_major

#: what a rank holds of each axis of a tensor: (its range in the padded axis, the axis' true size)
Cut = Mapping[str, tuple[tuple[int, int], int]]


class Group(NamedTuple):
    """Items one after another, once for every position of the leading axes up to and including `axis` (None: once)."""

    axis: str | None
    items: tuple["str | Group", ...]

    def leaves(self) -> Iterator[str]:
        """The tensors, in order; one may stand in several places."""
        for item in self.items:
            if isinstance(item, Group):
                yield from item.leaves()
            else:
                yield item

    def renamed(self, names: Mapping[str, str]) -> "Group":
        return Group(self.axis, tuple(item.renamed(names) if isinstance(item, Group) else names.get(item, item) for item in self.items))

    def groups(self) -> Iterator["Group"]:
        yield self
        for item in self.items:
            if isinstance(item, Group):
                yield from item.groups()

    def __str__(self) -> str:
        items = " ".join(f"({item})" if isinstance(item, Group) else item for item in self.items)
        return f"{self.axis}: {items}" if self.axis else items


def parse(text: str) -> Group:
    """The fusion that `text` writes. Raises ValueError with what is wrong."""
    words = re.findall(r"[():]|[\w.]+|\S", text)
    at = 0

    def group(closing: bool) -> Group:
        nonlocal at
        axis, items = None, []
        if at + 1 < len(words) and words[at + 1] == ":":
            axis = words[at]
            if not re.fullmatch(r"\w+", axis):
                raise ValueError(f"{axis!r} before a colon is no axis")
            at += 2
        while at < len(words) and words[at] != ")":
            word = words[at]
            at += 1
            if word == "(":
                items.append(group(True))
            elif re.fullmatch(r"\w+(\.\w+)?", word):
                items.append(word)
            else:
                raise ValueError(f"{word!r} does not belong there")
        if not items:
            raise ValueError("a group holds nothing")
        if closing != (at < len(words)):
            raise ValueError("brackets do not match")
        at += closing
        return Group(axis, tuple(items))

    return group(False)


def stored_dims(own: tuple[tuple[str, ...], ...], stored: tuple[tuple[str, ...], ...] | None) -> tuple[tuple[str, ...], ...]:
    """The order of axes in which a tensor of `own` dimensions is stored: that of the entry, as far as the tensor has the axes."""
    axes = {axis for dim in own for axis in dim}
    return own if stored is None else tuple(tuple(axis for axis in dim if axis in axes) for dim in stored)


def fused_dim(own: tuple[tuple[str, ...], ...], stored: tuple[tuple[str, ...], ...] | None) -> int:
    """The stored dimension in which the first of a tensor's `own` dimensions lies. Raises ValueError where it is spread."""
    if stored is None or not own or not own[0]:
        return 0
    for number, axes in enumerate(stored):
        if set(axes) == set(own[0]):
            return number
    raise ValueError(f"the first dimension ({' '.join(own[0])}) must be one dimension of the stored tensor")


def check_axes(fusion: Group, leading: Mapping[str, tuple[str, ...]]) -> None:
    """That all items of each group have its leading axes; `leading`: per tensor the axes of the fused dimension.
    Raises ValueError."""
    for group in fusion.groups():
        if group.axis is None:
            continue
        leaves = list(group.leaves())
        for leaf in leaves:
            if group.axis not in leading[leaf]:
                raise ValueError(f"{leaf} has no axis {group.axis!r} in its first dimension")
        depth = leading[leaves[0]].index(group.axis) + 1
        for leaf in leaves:
            if leading[leaf][:depth] != leading[leaves[0]][:depth]:
                raise ValueError(f"{leaf} and {leaves[0]} do not share the axes up to {group.axis!r}")

    def deeper(group: Group, depth: int) -> None:
        inner = depth if group.axis is None else leading[next(group.leaves())].index(group.axis) + 1
        if inner < depth:
            raise ValueError(f"{group.axis!r} inside a group that has placed it already")
        for item in group.items:
            if isinstance(item, Group):
                deeper(item, inner)

    deeper(fusion, 0)


class Item(NamedTuple):
    """One tensor as it goes into a fusion: `dims` as stored, `axes` in the tensor's own order, and what is held of it."""

    tensor: str
    dims: tuple[tuple[str, ...], ...]
    axes: tuple[str, ...]
    held: Cut

    def extent(self, axis: str) -> int:
        (start, stop), _ = self.held[axis]
        return stop - start


def fuse(fusion: Group, items: list[Item], dim: int = 0, align: int = 1, aligned: Mapping[str, int] = {}):
    """Shape of the stored tensor that holds `items` (in the order of `fusion`'s leaves), and (tensor, block) of each.

    `dim` is the fused dimension. `align` fills that of the whole with zero rows to a multiple, `aligned` that of an item
    by its tensor. Items that hold nothing have no block. Raises ValueError where the sizes of items do not agree.
    """
    if not items[0].dims:
        return (), [(item.tensor, Block((), 0, ())) for item in items]
    rows = [item.dims[dim] for item in items]
    order = _numbered(fusion)

    def inner(group: Group, depth: int, first: int) -> int:
        return depth if group.axis is None else rows[first].index(group.axis) + 1

    def height(node: object, depth: int) -> int:
        group, numbers = node
        if group is None:
            number = numbers
            own = prod(items[number].extent(axis) for axis in rows[number][depth:])
            unit = aligned.get(items[number].tensor, 1)
            return -(-own // unit) * unit
        first = _first(node)
        deep = inner(group, depth, first)
        return prod(items[first].extent(axis) for axis in rows[first][depth:deep]) * sum(height(sub, deep) for sub in numbers)

    places: list[tuple[int, dict[str, int]]] = [(0, {})] * len(items)  # per item: its first row, and rows per step of each axis

    def place(node: object, depth: int, at: int, strides: dict[str, int]) -> None:
        group, numbers = node
        if group is None:
            places[numbers] = at, _steps(items[numbers], rows[numbers][depth:], 1) | strides
            return
        first = _first(node)
        deep = inner(group, depth, first)
        heights = [height(sub, deep) for sub in numbers]
        outer = rows[first][depth:deep]
        for number in _all(node):
            if rows[number][depth:deep] != outer or any(items[number].extent(a) != items[first].extent(a) for a in outer):
                raise ValueError(f"{items[first].tensor} and {items[number].tensor} cannot be fused: their sizes differ")
        strides = strides | _steps(items[first], outer, sum(heights))
        for sub, size in zip(numbers, heights):
            place(sub, deep, at, strides)
            at += size

    total = height(order, 0)
    place(order, 0, 0, {})
    shape = tuple(
        -(-total // align) * align if d == dim else prod(items[0].extent(axis) for axis in axes) for d, axes in enumerate(items[0].dims)
    )
    steps = row_major(shape)
    blocks = []
    for item, (at, strides) in zip(items, places):
        if len(item.dims) != len(shape) or any(prod(map(item.extent, axes)) != shape[d] for d, axes in enumerate(item.dims) if d != dim):
            raise ValueError(f"{items[0].tensor} and {item.tensor} cannot be fused: their sizes differ")
        step = {axis: rows_ * steps[dim] for axis, rows_ in strides.items()}
        for d, axes in enumerate(item.dims):
            if d != dim:
                step |= _steps(item, axes, steps[d])
        box = tuple((start, min(stop, true)) for start, stop, true in ((*item.held[axis][0], item.held[axis][1]) for axis in item.axes))
        if all(start < stop for start, stop in box):
            blocks.append((item.tensor, Block(box, at * steps[dim], tuple(step[axis] for axis in item.axes))))
    return shape, blocks


def _numbered(group: Group, start: int = 0):
    """`group` as (group, parts), each leaf as (None, its number from `start` on)."""
    parts, count = [], start
    for item in group.items:
        if isinstance(item, Group):
            parts.append(_numbered(item, count))
            count += sum(1 for _ in item.leaves())
        else:
            parts.append((None, count))
            count += 1
    return group, parts


def _all(node) -> Iterator[int]:
    group, parts = node
    if group is None:
        yield parts
    else:
        for part in parts:
            yield from _all(part)


def _first(node) -> int:
    return next(_all(node))


def _steps(item: Item, axes: tuple[str, ...], step: int) -> dict[str, int]:
    """Strides of `axes`, the fastest of which has `step`."""
    out = {}
    for axis in reversed(axes):
        out[axis] = step
        step *= item.extent(axis)
    return out
