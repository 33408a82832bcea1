"""A rank's experts in the form in which transformers' module computes them: one stack for all.

``gate_up_proj`` is [experts, 2·ffn, hidden] and ``down_proj`` [experts, hidden, ffn], gate rows before up rows; GPT-OSS has
the input dimension first, and gate and up on alternate rows (``is_transposed``, ``is_concatenated`` of the module).
"""

from collections.abc import Callable

import torch
from torch import nn

Read = Callable[[str], torch.Tensor]


def alternate(gate_up: torch.Tensor, dim: int) -> torch.Tensor:
    """Rows of two halves, dealt out in turn."""
    gate, up = gate_up.chunk(2, dim)
    return torch.stack([gate, up], dim + 1).flatten(dim, dim + 1)


def stack_one_by_one(names: dict[int, dict[str, str]], read: Read, module: nn.Module) -> dict[str, torch.Tensor]:
    """The stacks of experts that are stored one by one; `names[expert]` maps gate_proj.weight, … to names for `read`."""
    out: dict[str, torch.Tensor] = {}
    for place, expert in enumerate(sorted(names)):
        own = {leaf: read(name) for leaf, name in names[expert].items()}
        for kind in ("weight", "bias"):
            if f"gate_proj.{kind}" in own:
                own[f"gate_up_proj.{kind}"] = torch.cat([own.pop(f"gate_proj.{kind}"), own.pop(f"up_proj.{kind}")])
        for leaf, tensor in own.items():
            name, kind = leaf.split(".")
            if name == "gate_up_proj" and not module.is_concatenated:
                tensor = alternate(tensor, 0)
            if kind == "weight" and module.is_transposed:
                tensor = tensor.T
            target = name if kind == "weight" else f"{name}_bias"
            if target not in out:
                out[target] = tensor.new_empty(len(names), *tensor.shape)
            out[target][place] = tensor
    return out


def stack_as_stored(stored: dict[str, str], read: Read, module: nn.Module, output_first: bool) -> dict[str, torch.Tensor]:
    """Stacks that are stored as such. `output_first`: the file has the output dimension first even where the module has not."""
    out = {}
    for leaf, name in stored.items():
        tensor = read(name)
        if leaf.endswith("_proj") and module.is_transposed and output_first:
            tensor = tensor.transpose(1, 2)
        out[leaf] = tensor
    return out


def ungroup(stored: dict[str, str], read: Read, module: nn.Module, count: int, hidden: int) -> dict[str, torch.Tensor]:
    """Megatron's GroupedMLP: ``weight1`` (hidden, experts·2·ffn) is viewed as (experts, hidden, 2·ffn), ``weight2`` likewise."""
    gate_up = read(stored["grouped_gate_up_proj"]).reshape(count, hidden, -1)
    down = read(stored["grouped_down_proj"]).reshape(count, -1, hidden)
    if not module.is_concatenated:
        gate_up = alternate(gate_up, 2)
    return {"gate_up_proj": gate_up if module.is_transposed else gate_up.transpose(1, 2),
            "down_proj": down if module.is_transposed else down.transpose(1, 2)}  # fmt: skip
