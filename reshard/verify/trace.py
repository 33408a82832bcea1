"""What comes out of every part of a model, in order: where two runs part, the broken layer is."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite

import torch
from torch import nn

from reshard.verify.model import Model
from reshard.verify.parallel import Receive, Send, Skipped
from reshard.verify.routers import hooked


@dataclass(frozen=True)
class Point:
    """One part's output held against the reference's: the largest difference, relative to the largest number there."""

    path: str
    relative: float
    apart: bool
    decides: bool = False  # part of the verdict; of what prompts reach, the logits tell


@torch.no_grad()
def every_row(m: Model, device: torch.device) -> dict[str, torch.Tensor]:
    """Each row of the embedding as two numbers, so that rows which no prompt reads are compared too: [vocabulary, 2].

    The numbers are products with fixed vectors: rows that differ have, but for chance, other products.
    """
    embedding, vocab, hidden = m.at(m.embedding), m.config.vocab_size, m.config.hidden_size
    if isinstance(embedding, Receive):
        return {}
    places = torch.arange(hidden, dtype=torch.float64)
    vectors = torch.stack([torch.cos(places), torch.cos(places * places + 1)], 1)
    chunks = [embedding(ids.to(device)).cpu().double() @ vectors for ids in torch.arange(vocab).split(4096)]
    return {m.embedding: torch.cat(chunks)}


@contextmanager
def traced(m: Model) -> Iterator[dict[str, torch.Tensor]]:
    """The output of every layer with its direct parts, and of the final norm, after the forward in ``with``."""
    layers = [(f"{m.layers}.{i}", child) for i, child in m.at(m.layers).named_children()]
    parts = [(f"{path}.{name}", child) for path, layer in layers for name, child in layer.named_children()]
    places = [
        place for place in (*parts, *layers, (m.norm, m.at(m.norm))) if not isinstance(place[1], (Receive, Send, Skipped, nn.Identity))
    ]
    outputs: dict[str, torch.Tensor] = {}

    def keep(path: str, _, output) -> None:
        if torch.is_tensor(output := output[0] if isinstance(output, tuple) else output):
            outputs[path] = output.detach().float().cpu().clone()

    with hooked(places, keep, after=True):
        yield outputs


def follow(reference: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor], tolerance: float, deciding: str) -> list[Point]:
    """The points of both traces, in the reference's order of computation; `deciding` is the path of the embedding."""
    points = []
    for path, expected in reference.items():
        found = outputs.get(path)
        if found is None:
            continue
        relative = float("inf")
        if found.shape == expected.shape:
            relative = (found - expected).abs().max().item() / (expected.abs().max().item() or 1.0)
        points.append(Point(path, relative, not isfinite(relative) or relative > tolerance, path == deciding))
    return points
