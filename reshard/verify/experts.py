"""A rank's experts in the form in which transformers' module computes them: one stack for all.

``gate_up_proj`` is [experts, 2·ffn, hidden] and ``down_proj`` [experts, hidden, ffn], gate rows before up rows; GPT-OSS has
the input dimension first, and gate and up on alternate rows (``is_transposed``, ``is_concatenated`` of the module).
"""

from collections.abc import Callable

import torch
from torch import nn

from reshard.geometry.block import chunk
from reshard.verify.model import Model
from reshard.verify.names import ENGINES
from reshard.verify.parallel import Experts
from reshard.verify.slices import Slices

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


def _complete(s: Slices, path: str, names: dict[int, dict[str, str]], first: int, stop: int) -> bool:
    """Whether the rank's experts are those that are dealt to it, each with all its matrices."""
    local = s.shards.format == "megatron"  # whose experts are numbered within the rank
    expected = list(range(stop - first) if local else range(first, stop))
    if sorted(names) != expected:
        s.problem(f"{path}.{min(names)}", f"and others are experts {sorted(names)} of this rank, it is dealt {expected}")
    every = set().union(*names.values())
    missing = [f"{path}.{expert}.{leaf}" for expert in sorted(names) for leaf in sorted(every - names[expert].keys())]
    for name in missing:
        s.problem(name, "is missing")
    for own in names.values():
        s.used.update(own.values())
    return sorted(names) == expected and not missing


def fill(s: Slices, m: Model, path: str, names: dict[int, dict[str, str]]) -> None:
    """A layer's experts, of which the rank holds some, or slices."""
    module, rank, hidden = m.at(path), s.seat.rank, m.config.hidden_size
    first, stop = chunk(module.num_experts, s.shards.mesh.ep, rank.ep)
    if -1 in names and "grouped_gate_up_proj" in names[-1]:
        made = ungroup(names[-1], s.read, module, stop - first, hidden)
    elif -1 in names:
        # SGLang's kernel for GPT-OSS takes stacks with the input dimension first, unless experts are dealt out to ranks
        as_module = s.shards.format not in ENGINES or (s.shards.format == "sglang" and s.shards.mesh.ep == 1)
        made = stack_as_stored(names[-1], s.read, module, not as_module)
    else:
        made = stack_one_by_one(names, s.read, module) if _complete(s, path, names, first, stop) else {}
    if s.shards.format not in ENGINES and "down_proj_bias" in made:
        # outputs are summed, so each rank adds its share of its own copy; engines store zeros on all ranks but the first
        made["down_proj_bias"] = made["down_proj_bias"] / len({seat.rank.etp for seat in s.seats if seat.stage == s.seat.stage})
    shown = next(iter(next(iter(names.values())).values()))
    for kind in [kind for kind, tensor in module._parameters.items() if tensor is not None]:
        if kind not in made:
            continue
        own, full = made[kind], module._parameters[kind]
        whole = [size for dim, size in enumerate(full.shape) if dim and size == hidden]
        if own.dim() != full.dim() or len(own) != stop - first or any(size not in own.shape[1:] for size in whole):
            s.problem(shown, f"and the others of its layer make {kind} of {list(own.shape)}, the engine takes {stop - first} experts of slices of {list(full.shape[1:])}")
        module._parameters[kind] = nn.Parameter(own, requires_grad=False)
    module.num_experts = stop - first
    copies = sum((seat.rank.ep, seat.rank.etp) == (rank.ep, rank.etp) for seat in s.seats if seat.stage == s.seat.stage)
    m.put(path, Experts(module, first, stop - first, copies, s.stage))
