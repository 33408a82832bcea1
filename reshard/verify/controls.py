"""Defects on purpose: the same shards with one thing wrong, which the same comparison must find."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from reshard.verify.model import Model
from reshard.verify.parallel import Linear
from reshard.verify.slices import Slices

Change = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Control:
    """A defect in one layer, as the new tensors of the projections that it breaks (on ranks that hold the layer)."""

    name: str
    broken: Callable[[dict[str, Linear]], dict[str, Change]]


@contextmanager
def planted(control: Control, linears: dict[str, Linear]) -> Iterator[None]:
    """The defect in place while ``with`` lasts."""
    kept = []
    for path, change in control.broken(linears).items():
        linear = linears[path]
        kept.append((linear, linear.weight, linear.bias))
        linear.weight = change(linear.weight)
        if linear.bias is not None and len(linear.bias) == len(linear.weight):
            linear.bias = change(linear.bias)
    try:
        yield
    finally:
        for linear, weight, bias in kept:
            linear.weight, linear.bias = weight, bias


def controls(s: Slices, m: Model) -> list[Control]:
    """The defects that this checkpoint can have; the same list, in the same order, on every rank."""
    depth = m.config.num_hidden_layers // 2
    latent = bool(s.rows.paths("latent_key_value", depth))
    head = getattr(m.config, "head_dim", None) or m.config.hidden_size // m.config.num_attention_heads
    value, query = (m.config.v_head_dim, m.config.qk_nope_head_dim + m.config.qk_rope_head_dim) if latent else (head, head)

    def at(linears: dict[str, Linear], *words: str) -> list[str]:
        return [path for path in dict.fromkeys(path for word in words for path in s.rows.paths(word, depth)) if path in linears]

    def shifted(linears: dict[str, Linear]) -> dict[str, Change]:
        keys, values = at(linears, "key"), at(linears, "value")
        if keys and values and keys != values:
            k, v = linears[keys[0]], linears[values[0]]
            swap = {id(k.weight): v.weight, id(v.weight): k.weight, id(k.bias): v.bias, id(v.bias): k.bias}
            return {path: lambda x: swap[id(x)] for path in (keys[0], values[0])}
        return {path: lambda x: x.roll(value, 0) for path in at(linears, "value", "latent_key_value")}

    def paired(linears: dict[str, Linear]) -> dict[str, Change]:
        return {path: lambda x: _other_rotary_order(x, query) for path in at(linears, "query", "key", "latent_query")}

    def exchanged(path: str) -> Callable[[dict[str, Linear]], dict[str, Change]]:
        return lambda linears: {path: s.group.exchanged} if path in linears else {}

    out = [Control(f"keys and values of layer {depth} exchanged" if not latent else f"rows of layer {depth}'s kv_b_proj shifted", shifted)]
    if any(
        "Rotary" in type(part).__name__ for part in m.module.modules()
    ):  # without positions in it, attention has no order of a head's rows
        out.append(Control(f"rows of each stored head of layer {depth} in the other rotary order", paired))
    for path in (*s.rows.paths("heads", depth), *s.rows.paths("down", depth)):
        columns = s.any_columns(f"{path}.weight")
        if len(columns) > 1 and len(set(columns)) == 1:
            out.append(Control(f"{path.rpartition('.')[2]} of layer {depth}: two ranks' shards exchanged", exchanged(path)))
            break
    return out


def _other_rotary_order(x: torch.Tensor, size: int) -> torch.Tensor:
    """Rows of each head as pairs instead of halves."""
    heads = len(x) // size
    order = torch.cat([torch.arange(0, size, 2), torch.arange(1, size, 2)])
    rows = (torch.arange(heads)[:, None] * size + order).flatten()
    return torch.cat([x[rows.to(x.device)], x[heads * size :]])
