"""Where in a tensor elements differ: counts in a coarse grid over the tensor's own axes."""

from dataclasses import dataclass, field
from math import prod

import numpy as np

from reshard.geometry.block import Box

#: cells of the grid along each side, at most
CELLS = 48


@dataclass
class Heat:
    """Differing elements of a tensor of `shape` (per axis), its first `lead` axes down and the others across, in at most 48 × 48 cells."""

    shape: tuple[int, ...]
    lead: int
    counts: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.counts = np.zeros(self.cells, np.int64)

    @property
    def size(self) -> tuple[int, int]:
        """Elements down and across."""
        return prod(self.shape[: self.lead]), prod(self.shape[self.lead :])

    @property
    def cells(self) -> tuple[int, int]:
        down, across = self.size
        return min(down, CELLS), min(across, CELLS)

    def add(self, box: Box, differs: np.ndarray) -> None:
        """Count the elements of `box`, all of the tensor's axes, where `differs` is true."""
        at = [index + start for index, (start, _) in zip(np.nonzero(differs), box)]
        cell = []
        for axes, size, cells in zip((slice(None, self.lead), slice(self.lead, None)), self.size, self.cells):
            flat = np.zeros(len(at[0]) if at else 1, np.int64)
            for index, length in zip(at[axes], self.shape[axes]):
                flat = flat * length + index
            cell.append(flat * cells // size)
        np.add.at(self.counts, (cell[0], cell[1]), 1)
