"""Stored tensors that no forward of a prompt uses: layers that predict further tokens, scales of quantised caches.

Where a file calls such a tensor as the original does, whole or cut along one dimension, its bits are compared. All others are named
as not exercised.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from reshard.errors import ReshardError
from reshard.verify.model import Model
from reshard.verify.shards import Held, Shards, open_shards
from reshard.verify.trace import Point


@dataclass(frozen=True)
class Beyond:
    """`points` of what was compared, `left` the names of what was not; `scales` those that are not the 1 that means none."""

    points: list[Point] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    scales: list[str] = field(default_factory=list)


def compare_beyond(shards: Shards, reference: Path, m: Model) -> Beyond:
    """Hold what `shards` store past the last layer of `m` against the tensors of the same names in `reference`; reads both."""
    by_name: dict[str, list[tuple[int, Held]]] = {}
    scales = {}
    for rank in shards.ranks:
        for held in shards.extra[rank.number]:
            kind = shards.engine.kind_beside(held.name)
            if kind == "prediction":
                by_name.setdefault(held.name, []).append((rank.tp, held))
            elif kind == "scales" and shards.read(held).float().flatten().tolist() not in ([], [1.0], [-1.0]):  # -1: none was read
                scales[held.name] = None
        for module, held in shards.tables[rank.number].items():
            if (number := m.layer_of(module)) is not None and number >= m.config.num_hidden_layers:
                by_name.setdefault(held.name, []).append((rank.tp, held))
    if not by_name:
        return Beyond(scales=list(scales))
    try:
        original = open_shards(reference, "hf")
    except ReshardError:  # quantised, perhaps: transformers reads it, this does not
        return Beyond([], list(by_name), list(scales))
    theirs = {held.name: held for held in (*original.tables[0].values(), *original.extra[0])}
    points, left = [], []
    for name, pieces in by_name.items():
        found = [(tp, shards.read(held)) for tp, held in pieces]
        equal = _equal(original.read(theirs[name]), found) if name in theirs else None
        if equal is None:
            left.append(name)
        else:
            points.append(Point(name, 0.0 if equal else float("inf"), not equal, decides=True))
    return Beyond(points, left, list(scales))


def _equal(whole: torch.Tensor, pieces: list[tuple[int, torch.Tensor]]) -> bool | None:
    """Whether `pieces`, by tensor-parallel rank, are `whole`, or it cut along one dimension; None where shapes tell neither."""
    if all(piece.shape == whole.shape for _, piece in pieces):
        return all(_same_bits(piece, whole) for _, piece in pieces)
    own = dict(pieces)  # of copies of a rank's piece, the last
    if any(piece.dim() != whole.dim() for piece in own.values()) or sorted(own) != list(range(len(own))):
        return None
    for dim in range(whole.dim()):
        sizes = [own[tp].shape[dim] for tp in sorted(own)]
        if sum(sizes) == whole.shape[dim] and all(_others(piece, dim) == _others(whole, dim) for piece in own.values()):
            parts = whole.split(sizes, dim)
            return all(_same_bits(piece, parts[tp]) for tp, piece in pieces)
    return None


def _others(x: torch.Tensor, dim: int) -> list[int]:
    return [size for i, size in enumerate(x.shape) if i != dim]


def _same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    bits = (x.contiguous().view(-1).view(torch.uint8) if x.numel() else x for x in (found, expected.to(found.dtype)))
    return torch.equal(*bits)
