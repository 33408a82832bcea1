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
    prefix = f"{m.layers}.{depth}."
    value = getattr(m.config, "v_head_dim", None) or 0
    head = getattr(m.config, "head_dim", None) or m.config.hidden_size // m.config.num_attention_heads
    latent = getattr(m.config, "kv_lora_rank", None)
    query = m.config.qk_nope_head_dim + m.config.qk_rope_head_dim if latent else head

    def at(linears: dict[str, Linear], *leaves: str) -> dict[str, str]:
        return {leaf: path for path in linears if path.startswith(prefix) and (leaf := path.rpartition(".")[2]) in leaves}

    def shifted(linears: dict[str, Linear]) -> dict[str, Change]:
        found = at(linears, "qkv_proj", "query_key_value", "kv_b_proj", "k_proj", "v_proj")
        if {"k_proj", "v_proj"} <= found.keys():
            k, v = linears[found["k_proj"]], linears[found["v_proj"]]
            swap = {id(k.weight): v.weight, id(v.weight): k.weight, id(k.bias): v.bias, id(v.bias): k.bias}
            return {found[leaf]: lambda x: swap[id(x)] for leaf in ("k_proj", "v_proj")}
        return {path: lambda x: x.roll(value if latent else head, 0) for path in found.values()}

    def paired(linears: dict[str, Linear]) -> dict[str, Change]:
        found = at(linears, "qkv_proj", "query_key_value", "q_proj", "k_proj", "q_b_proj")
        return {path: lambda x: _other_rotary_order(x, query) for path in found.values()}

    def exchanged(leaf: str) -> Callable[[dict[str, Linear]], dict[str, Change]]:
        return lambda linears: {path: s.group.exchanged for path in at(linears, leaf).values()}

    out = [Control(f"keys and values of layer {depth} exchanged" if not latent else f"rows of layer {depth}'s kv_b_proj shifted", shifted),
           Control(f"rows of each stored head of layer {depth} in the other rotary order", paired)]  # fmt: skip
    for leaf in ("o_proj", "dense", "down_proj", "dense_4h_to_h"):
        columns = s.any_columns(f"{prefix}{'mlp' if leaf in ('down_proj', 'dense_4h_to_h') else 'self_attn' if leaf == 'o_proj' else 'attention'}.{leaf}.weight")
        if len(columns) > 1 and len(set(columns)) == 1:
            out.append(Control(f"{leaf} of layer {depth}: two ranks' shards exchanged", exchanged(leaf)))
            break
    return out


def _other_rotary_order(x: torch.Tensor, size: int) -> torch.Tensor:
    """Rows of each head as pairs instead of halves."""
    heads = len(x) // size
    order = torch.cat([torch.arange(0, size, 2), torch.arange(1, size, 2)])
    rows = (torch.arange(heads)[:, None] * size + order).flatten()
    return torch.cat([x[rows.to(x.device)], x[heads * size :]])
