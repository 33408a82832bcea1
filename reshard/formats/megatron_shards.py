"""How Megatron-Core files a whole tensor: which box of it lies with which rank of a mesh. The boxes are all that ``torch_dist`` keeps of a mesh.

Each layer and each expert is a box of its own, as are the rows (or columns) of each tensor-parallel rank, and of those that hold
two tensors one after the other (gate, up) of each. Sources: megatron-core 0.19.2, ``apply_swiglu_sharded_factory``,
``make_sharded_tensors_for_checkpoint``, ``TEGroupedMLP.sharded_state_dict``.
"""

from collections.abc import Iterator
from itertools import product
from math import prod
from typing import NamedTuple

from reshard.formats import Target
from reshard.geometry.block import Stored, chunk
from reshard.layout.mesh import expert_cut

Shape = tuple[int, ...]


class Box(NamedTuple):
    """A box of a stored tensor: where it begins, its size, and the number of the rank that files it."""

    offsets: Shape
    size: Shape
    rank: int


class Shards:
    """The boxes of whole tensors on the mesh of a target."""

    def __init__(self, target: Target):
        placement, mesh = target.placement, target.mesh
        ranks = placement.rules.ranks(mesh)
        stages = placement.rules.stages(placement.layout.layers, mesh.pp)
        self.tensors, self.layout = placement.layout.descriptor.tensors, placement.layout
        self.tp, self.ep, self.etp, self.last = mesh.tp, mesh.ep, expert_cut(mesh, ranks), mesh.pp - 1
        self.stage = {layer: p for p, layers in enumerate(stages) for layer in layers}
        self.dense = {(r.pp, r.tp): r.number for r in reversed(ranks)}  # of several the first
        self.expert = {(r.pp, r.ep, r.etp): r.number for r in reversed(ranks)}

    def stacked(self, s: Stored) -> list[str]:
        """What is numbered along the leading dimensions of `s`: layer, expert."""
        index = self.tensors[s.entry.of[0]].index
        return [each for each in index if each not in s.entry.numbered]

    def boxes(self, s: Stored) -> Iterator[Box]:
        """Every box of `s`, which is whole."""
        tensor, stacked = self.tensors[s.entry.of[0]], self.stacked(s)
        inner = s.shape[len(stacked) :]
        numbers: dict[str, int] = dict(zip(tensor.index, s.parts[0].first[1:]))
        experts = "expert" in tensor.index
        dim, cuts = self._cuts(s, inner, self.etp if experts else self.tp)
        for lead in product(*map(range, s.shape[: len(stacked)])):
            numbers.update(zip(stacked, lead))
            stage = self.stage[numbers["layer"]] if "layer" in numbers else 0 if (s.entry.stage or tensor.stage) == "first" else self.last
            for index, low, high in cuts:
                rank = self._expert_rank(stage, numbers, s, index) if experts else self.dense[stage, index]
                offsets = [0] * len(inner)
                size = list(inner)
                if cuts[-1][2]:
                    offsets[dim], size[dim] = low, high - low
                yield Box((*lead, *offsets), (*(1 for _ in lead), *size), rank)

    def _expert_rank(self, stage: int, numbers: dict[str, int], s: Stored, index: int) -> int:
        place = s.entry.place
        count = self.layout.size("expert", place, numbers.get(place))
        return self.expert[stage, numbers["expert"] // -(-count // self.ep), index]

    def _cuts(self, s: Stored, inner: Shape, count: int) -> tuple[int, list[tuple[int, int, int]]]:
        """The dimension that ranks share, and (rank, first row, past the last) of each cut along it; past the last is 0 of one whole."""
        entry = s.entry
        tensor = self.tensors[entry.of[0]]
        axis = next((a for a in (tensor.split if entry.split is None else entry.split) if a in tensor.axes), None)
        if axis is None:
            return 0, [(0, 0, 0)]
        dim = next(i for i, axes in enumerate(entry.dims_of(tensor)) if axis in axes)
        starts = [0]
        if len(entry.of) > 1 and entry.fusion.axis is None and dim == entry.dim(self.tensors):
            starts = sorted({part.block.offset // prod(inner[dim + 1 :]) % inner[dim] for part in s.parts})
        ends = [*starts[1:], inner[dim]]
        cuts = [(i, start + low, start + high) for i in range(count) for start, end in zip(starts, ends)
                for low, high in [chunk(end - start, count, i)] if low < high]  # fmt: skip
        return dim, cuts
