"""How engines fuse queries, keys and values, and how many heads a rank has of them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from reshard.verify.group import Group
from reshard.verify.tables import Row


@dataclass(frozen=True)
class Heads:
    """Attention heads of a layer (`queries`, `keys`), their size, and how many of them rank `rank` of `ranks` computes with.

    With more ranks than key/value heads, engines repeat those: one each.
    """

    queries: int
    keys: int
    size: int
    rank: int
    ranks: int
    local_queries: int
    local_keys: int

    @property
    def repeated(self) -> int:
        """Key/value heads that all ranks together hold twice."""
        return self.ranks - self.keys if self.ranks > self.keys and self.ranks % self.keys == 0 else 0


Split = Callable[[torch.Tensor], tuple[torch.Tensor, ...]]


def sections(*sizes: int) -> Split:
    """Outputs one after another, as most engines have them."""
    return lambda y: y.split(sizes, -1)


def grouped(heads: Heads, group: Group) -> Split:
    """In groups: for each key/value head its queries, its key, its value (Megatron-core, get_query_key_value_tensors).

    With more ranks than key/value heads a rank's piece may end inside a head: the outputs are gathered, and each rank
    takes its head's and, of the queries, its own.
    """
    per_key = heads.queries // heads.keys
    width = (per_key + 2) * heads.size

    def split(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        queries = slice(None)
        if heads.ranks > heads.keys:
            y = group.concatenate(y, [y.shape[-1]] * heads.ranks)
            share = heads.ranks // heads.keys
            y = y[..., heads.rank // share * width :][..., :width]
            queries = slice(heads.rank % share * heads.local_queries, (heads.rank % share + 1) * heads.local_queries)
        y = y.unflatten(-1, (-1, per_key + 2, heads.size))
        q, k, v = y.split((per_key, 1, 1), -2)
        return q.flatten(-3, -2)[..., queries, :].flatten(-2), k.flatten(-3), v.flatten(-3)

    return split


def splits(row: Row, rows: int, heads: Heads | None, group: Group) -> Split:
    """How `rows` outputs of a fused column-parallel projection come apart, by the words of its row."""
    if not {"query", "key", "value"} & set(row.holds):
        return sections(*[rows // len(row.holds)] * len(row.holds))
    if row.order == "groups":
        return grouped(heads, group)
    return sections(*((heads.local_queries if part == "query" else heads.local_keys) * heads.size for part in row.holds))


def joined(row: Row, heads: Heads) -> Callable[..., torch.Tensor]:
    """How queries, keys and values make the one tensor that transformers' module wants: one after another, or head by head."""
    if row.becomes == "sections":
        return lambda *parts: torch.cat(parts, -1)
    return lambda *parts: torch.stack([part.unflatten(-1, (-1, heads.size)) for part in parts], -2).flatten(-3)
