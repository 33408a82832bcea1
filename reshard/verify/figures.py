"""How far two runs of a model are apart, and how far rounding alone may put them."""

from dataclasses import asdict, dataclass
from math import isfinite, sqrt

import torch

from reshard.dtypes import USER_WORDS, torch_dtypes

#: dtypes that verify computes in, by the command line's word
DTYPES = {word: torch_dtypes()[name] for word, name in USER_WORDS.items()}


@dataclass(frozen=True)
class Figures:
    """Logits held against the reference's, over all positions. `tolerance` is in units of logits; KL in nats per position."""

    max_abs_diff: float
    max_abs_logit: float
    mean_kl: float
    top1_agreement: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return isfinite(self.max_abs_diff) and self.max_abs_diff <= self.tolerance

    @property
    def relative(self) -> float:
        return self.max_abs_diff / self.max_abs_logit if self.max_abs_logit else 0.0

    def to_json(self) -> dict:
        """Numbers that JSON can hold: what is not finite becomes null."""
        return {"passed": self.passed} | {key: value if isfinite(value) else None for key, value in asdict(self).items()}


def relative_tolerance(dtype: torch.dtype, depth: int, width: int) -> float:
    """How far apart, of the largest logit, two correct runs may be that add the same numbers up in another order.

    Each of the 2·depth updates of the hidden state is rounded by half a unit in the last place, and the dot products of
    length `width` in fp32 by some sqrt(width) of fp32's; errors add up like steps of a random walk, and 4 stands for the
    largest of many logits. Measured on sound shards: docs/performance.md.
    """
    unit = max(torch.finfo(dtype).eps / 2, torch.finfo(torch.float32).eps * sqrt(width))
    return 4 * sqrt(2 * depth) * unit


def compare(reference: torch.Tensor, logits: torch.Tensor, relative: float) -> Figures:
    """Figures of `logits` [sequences, positions, vocabulary] against `reference`, whose largest logit scales the tolerance."""
    top = reference.abs().max().item()
    expected, found = reference.double().log_softmax(-1), logits.double().log_softmax(-1)
    kl = (expected.exp() * (expected - found)).sum(-1).mean().item()
    agreement = (reference.argmax(-1) == logits.argmax(-1)).double().mean().item()
    return Figures((logits - reference).abs().max().item(), top, max(kl, 0.0), agreement, relative * top)


def worst(figures: list[Figures]) -> Figures:
    """Those of the run that is furthest off: of several dense models in a stage, all must be right."""
    return max(figures, key=lambda f: f.max_abs_diff if isfinite(f.max_abs_diff) else float("inf"))
