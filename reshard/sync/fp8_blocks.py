"""Where the square blocks of an FP8 tensor lie: each block of a weight's rows and columns shares one scale. Pure.

The grid is laid on the whole HF tensor, so that a shard has the values that quantising the whole would give it. A box that
cuts through a block cannot be quantised by its sender, since the largest value may lie on another rank: it is refused.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import gcd, prod

from reshard.errors import PlanError
from reshard.geometry.block import Box, Stored
from reshard.layout import Layout


@dataclass(frozen=True, slots=True)
class Fp8:
    """Which tensors of the layout an engine holds in FP8 (E4M3), and the edge of their blocks. Their scales, fp32, are
    stored beside each as `<name>_scale_inv`: value = fp8 · scale."""

    tensors: frozenset[str]
    edge: int = 128


@dataclass(frozen=True, slots=True)
class Blocks:
    """A box of a weight as rows × columns, which begins on a block boundary of `edge`."""

    rows: int
    columns: int
    edge: int

    @property
    def grid(self) -> tuple[int, int]:
        return -(-self.rows // self.edge), -(-self.columns // self.edge)

    @property
    def count(self) -> int:
        return self.grid[0] * self.grid[1]


def linear_tensors(layout: Layout) -> frozenset[str]:
    """The weights that FP8 checkpoints quantise: matrices inside the layers, but no router."""
    return frozenset(t.name for t in layout.descriptor.tensors.values() if len(t.dims) == 2 and "layer" in t.index and t.name != "router")


def scales_name(name: str) -> str:
    return name + "_scale_inv"


def scale_shape(shape: tuple[int, ...], edge: int) -> tuple[int, ...]:
    return (*shape[:-2], -(-shape[-2] // edge), -(-shape[-1] // edge))


def scale_place(dst: Stored, offset: int, edge: int) -> tuple[int, int]:
    """Where the scales of a box that begins at element `offset` of `dst` lie in its scale tensor: (offset, row stride)."""
    rows, columns = dst.shape[-2:]
    lead, at = divmod(offset, rows * columns)
    row, column = divmod(at, columns)
    if row % edge or column % edge:
        raise PlanError([f"{dst.name}: a part begins at row {row}, column {column}, inside a block of {edge}"])
    grid_rows, grid_columns = scale_shape(dst.shape, edge)[-2:]
    return (lead * grid_rows + row // edge) * grid_columns + column // edge, grid_columns


@lru_cache(maxsize=65536)
def _flat(box: Box, sizes: tuple[int, ...]) -> tuple[int, int] | None:
    """The range of a flattened dimension that `box` (its axes, from the slowest) covers; None if that is no one range."""
    low, high, whole = 0, 1, True
    for (start, stop), size in zip(box, sizes):
        if not whole and (start, stop) != (0, size):
            return None
        whole = whole and stop - start == 1
        low, high = low * size + start, (high - 1) * size + stop
    return low, high


def block_grid(layout: Layout, name: str, box: Box, fp8: Fp8) -> Blocks:
    """`box` of tensor `name` on the grid of blocks. Raises PlanError where it does not begin and end on it."""
    at, ends = 0, []
    for sizes in _sizes(layout, name):
        span = _flat(box[at : at + len(sizes)], sizes)
        at += len(sizes)
        total = prod(sizes)
        if span is None or span[0] % fp8.edge or (span[1] % fp8.edge and span[1] != total):
            where = "rows or columns that are no one range" if span is None else f"{span[0]}:{span[1]} of {total}"
            raise PlanError([f"{name}: {where} cut through FP8 blocks of {fp8.edge}: no sender holds the largest value of such a block"],
                            "choose meshes whose cuts fall on multiples of the block")  # fmt: skip
        ends.append(span[1] - span[0])
    rows, columns = ends
    return Blocks(rows, columns, fp8.edge)


def grain(layout: Layout, name: str, box: Box, fp8: Fp8) -> tuple[int, ...]:
    """After how many indices of each axis a cut of `box` falls between blocks; all of an axis where no cut does."""
    out: list[int] = []
    for sizes in _sizes(layout, name):
        inner, outermost = prod(sizes), True  # a range of rows is cut along the first axis that has more than one index
        for size in sizes:
            inner //= size
            start, stop = box[len(out)]
            out.append(fp8.edge // gcd(fp8.edge, inner) if outermost else stop - start)
            outermost = outermost and stop - start == 1
    return tuple(out)


def _sizes(layout: Layout, name: str) -> list[tuple[int, ...]]:
    return [tuple(layout.size(axis) for axis in axes) for axes in layout.descriptor.tensors[name].dims]
