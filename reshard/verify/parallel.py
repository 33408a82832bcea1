"""The modules that take transformers' places where a rank holds a slice: what a tensor-parallel engine computes with it."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from reshard.verify.group import Group, receive, send


class Linear(nn.Module):
    """A slice of a linear layer. Its `bias` belongs to its own rows (column parallel, or a layer that every rank holds)."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None):
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class RowLinear(Linear):
    """Columns of a linear layer: partial sums are added up over the group, and then the bias, once."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, group: Group):
        super().__init__(weight, bias)
        self.group = group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.group.sum(F.linear(x, self.weight))
        return y if self.bias is None else y + self.bias


class Fused(Linear):
    """One stored matrix for several projections: multiplied once, its output split by `split`."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, split: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]):
        super().__init__(weight, bias)
        self.split = split

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.split(super().forward(x))


class Part(nn.Module):
    """One of a fused layer's outputs. The parts of a layer share `outputs`; the first of them that is called multiplies."""

    def __init__(self, fused: Fused, index: int, outputs: dict[int, torch.Tensor]):
        super().__init__()
        self.fused, self.index, self.outputs = fused, index, outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.index not in self.outputs:
            self.outputs.update(enumerate(self.fused(x)))
        return self.outputs.pop(self.index)


class Joined(nn.Module):
    """A fused layer whose outputs transformers expects in one tensor, in an order of its own."""

    def __init__(self, fused: Fused, join: Callable[..., torch.Tensor]):
        super().__init__()
        self.fused, self.join = fused, join

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.join(*self.fused(x))


class Gathered(nn.Module):
    """A norm over all ranks' slices, of `widths[i]` numbers each: they are gathered, and a rank keeps its own part of the result."""

    def __init__(self, norm: nn.Module, widths: list[int], group: Group):
        super().__init__()
        self.norm, self.widths, self.group = norm, widths, group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.group.concatenate(x, self.widths)).split(self.widths, -1)[self.group.index]


class VocabEmbedding(nn.Module):
    """Rows `start` … of an embedding. Ids of other ranks give zero here; the sum over the group is the whole.

    Rows are looked up by transformers' own module `inner`, which may scale them."""

    def __init__(self, inner: nn.Embedding, weight: torch.Tensor, start: int, group: Group):
        super().__init__()
        inner.weight, inner.padding_idx = nn.Parameter(weight, requires_grad=False), None  # whose number is another rank's, perhaps
        self.inner, self.start, self.group = inner, start, group

    @property
    def weight(self) -> torch.Tensor:
        return self.inner.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        local = ids - self.start
        outside = (local < 0) | (local >= len(self.weight))
        if not len(self.weight):
            return self.group.sum(self.weight.new_zeros(*ids.shape, self.weight.shape[1]))
        rows = self.inner(local.masked_fill(outside, 0))
        return self.group.sum(rows.masked_fill(outside[..., None], 0))


class VocabHead(nn.Module):
    """Rows of the output layer: every rank's logits side by side, cut to the vocabulary."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, rows: list[int], vocab: int, group: Group):
        super().__init__()
        self.weight, self.bias, self.rows, self.vocab, self.group = weight, bias, rows, vocab, group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.group.concatenate(F.linear(x, self.weight, self.bias), self.rows)[..., : self.vocab]


class Experts(nn.Module):
    """A rank's slices of some of a layer's experts, computed by transformers' own module `inner`.

    Tokens of other ranks' experts weigh nothing here. The sum over the stage is divided by the number of ranks that
    hold the same slices.
    """

    def __init__(self, inner: nn.Module, first: int, count: int, copies: int, group: Group):
        super().__init__()
        self.inner, self.first, self.count, self.copies, self.group = inner, first, count, copies, group

    def forward(self, x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        local = index - self.first
        outside = (local < 0) | (local >= self.count)
        own = self.inner(x, local.masked_fill(outside, 0), weight.masked_fill(outside, 0))
        return self.group.sum(own / self.copies if self.copies > 1 else own)


class NoHeads(nn.Module):
    """Attention of a rank without heads (more ranks than heads): nothing to add, but the others wait for its part."""

    def __init__(self, output: RowLinear):
        super().__init__()
        self.output = output

    def forward(self, hidden_states: torch.Tensor, *_, **__) -> tuple[torch.Tensor, None]:
        return self.output(hidden_states[..., :0]), None


class Skipped(nn.Module):
    """A layer that another pipeline stage holds."""

    def forward(self, hidden_states: torch.Tensor, *_, **__) -> torch.Tensor:
        return hidden_states


class Receive(nn.Module):
    """Hidden states from another stage, in place of what this one would compute from its argument."""

    def __init__(self, source: int, hidden: int, dtype: torch.dtype):
        super().__init__()
        self.source, self.hidden, self.dtype = source, hidden, dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = x.shape if x.is_floating_point() else (*x.shape, self.hidden)
        return receive(tuple(shape), self.dtype, x.device, self.source)


class Send(nn.Module):
    """Hidden states to another stage; passes them on here too."""

    def __init__(self, to: int):
        super().__init__()
        self.to_rank = to

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        send(x, self.to_rank)
        return x
