"""Sums that show whether what arrived is what was sent: position-weighted, additive over shards, in the tensor's own axes.

The sum of a box is Σ bits(x) · Π r(axis, index) mod 2^64, with an odd number r for every index of every axis. Equal boxes have
equal sums whatever shards they lie in; a flipped bit changes it, and so do two exchanged heads, which an XOR misses.
"""

from collections import defaultdict

import torch

from reshard.block import Block
from reshard.coverage import label
from reshard.sync.fp8 import quantise
from reshard.sync.fp8_blocks import scale_place
from reshard.sync.messages import RankPlan
from reshard.sync.plan import Transfer
from reshard.sync.tensors import DTYPES, Bound

_INT = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 20  # elements widened to 64 bits at a time


def numbers(axis: int, start: int, stop: int, device: torch.device) -> torch.Tensor:
    """One odd 64-bit number per index of an axis (splitmix64)."""
    seed = (axis + 1) * 0x94D049BB133111EB % 2**63
    x = torch.arange(start, stop, dtype=torch.int64, device=device) * -7046029254386353131 + seed
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return (x ^ ((x >> 31) & ((1 << 33) - 1))) | 1


def weighted_sum(values: torch.Tensor, starts: tuple[int, ...]) -> torch.Tensor:
    """The sum of `values`, one dimension per axis, whose first element has the indices `starts`. int64, 0-d."""
    if values.dim() == 0:
        values, starts = values.reshape(1), (0,)
    if values.numel() > _CHUNK and values.shape[0] > 1:
        rows = max(1, _CHUNK * values.shape[0] // values.numel())
        return torch.stack([weighted_sum_rows(values[i : i + rows], (starts[0] + i, *starts[1:])) for i in range(0, values.shape[0], rows)]).sum()
    return weighted_sum_rows(values, starts)


def weighted_sum_rows(values: torch.Tensor, starts: tuple[int, ...]) -> torch.Tensor:
    total = values.contiguous().view(_INT[values.element_size()]).to(torch.int64)
    for axis in reversed(range(values.dim())):
        total = (total * numbers(axis, starts[axis], starts[axis] + values.shape[axis], values.device)).sum(-1)
    return total


def sums(part: RankPlan, tensors: dict[int, Bound], *, taker: bool) -> dict[tuple[int, int], tuple[list[str], torch.Tensor]]:
    """Per (sender, taker), the tensors that go between them and the sum of all boxes of each. `tensors` are this end's."""
    found: dict[tuple[int, int], dict[tuple, list[torch.Tensor]]] = defaultdict(lambda: defaultdict(list))
    for t in part.transfers:
        if (t.taker if taker else t.sender) == part.process and t.sender != t.taker:
            found[t.sender, t.taker][t.key].append(_sum(t, tensors, taker))
    out = {}
    for pair, by_key in sorted(found.items()):
        keys = sorted(by_key)
        out[pair] = [label(key) for key in keys], torch.stack([torch.stack(by_key[key]).sum() for key in keys])
    return out


def _sum(t: Transfer, tensors: dict[int, Bound], taker: bool) -> torch.Tensor:
    """The sum of one box as it is at this end, in the dtype of the wire."""
    block: Block = (t.dst_block if taker else t.src_block).clip(t.box)
    stored = t.dst if taker else t.src
    bound = tensors[id(stored)]
    values = bound.view(block.shape, block.offset, block.strides).reshape(block.shape)
    starts = tuple(start for start, _ in t.box)
    if t.blocks:
        edge = t.blocks.edge
        if taker:
            offset, step = scale_place(t.dst, block.offset, edge)
            scales = tensors[-id(t.dst)].view(t.blocks.grid, offset, (step, 1))
        else:
            values, scales = quantise(values, t.blocks)
        return weighted_sum(values, starts) + 3 * weighted_sum(scales, (t.blocks.row // edge, t.blocks.column // edge))
    if values.dtype != DTYPES[t.wire]:
        values = values.to(DTYPES[t.wire])
    return weighted_sum(values, starts)
