"""A rank's experts in the form in which transformers' module computes them: one stack for all.

``gate_up_proj`` is [experts, 2·ffn, hidden] and ``down_proj`` [experts, hidden, ffn], gate rows before up rows; some modules have
the input dimension first, or gate and up on alternate rows (``is_transposed``, ``is_concatenated`` of the module).
"""

from collections import defaultdict

import torch
from torch import nn

from reshard.geometry.block import chunk
from reshard.verify.model import Model
from reshard.verify.parallel import Experts
from reshard.verify.slices import Slices
from reshard.verify.tables import Row


def alternate(gate_up: torch.Tensor, dim: int) -> torch.Tensor:
    """Rows of two halves, dealt out in turn."""
    gate, up = gate_up.chunk(2, dim)
    return torch.stack([gate, up], dim + 1).flatten(dim, dim + 1)


def stack_one_by_one(s: Slices, numbered: dict[int, list[str]], module: nn.Module) -> dict[str, torch.Tensor]:
    """The stacks of experts that are stored one by one; `numbered[expert]` are names of its tensors."""
    out: dict[str, torch.Tensor] = {}
    for place, expert in enumerate(sorted(numbered)):
        own = {(s.table[name].row.holds, s.table[name].row.kind): s.read(name) for name in numbered[expert]}
        for kind in ("weight", "bias"):
            if (("gate",), kind) in own and (("up",), kind) in own:
                own[("gate", "up"), kind] = torch.cat([own.pop((("gate",), kind)), own.pop((("up",), kind))])
        for (holds, kind), tensor in own.items():
            if "gate" in holds and not module.is_concatenated:
                tensor = alternate(tensor, 0)
            if kind == "weight" and module.is_transposed:
                tensor = tensor.T
            target = parameter(holds, kind == "bias")
            if target not in out:
                out[target] = tensor.new_empty(len(numbered), *tensor.shape)
            out[target][place] = tensor
    return out


def parameter(holds: tuple[str, ...], bias: bool) -> str:
    """What transformers' modules of experts call the stack of what `holds` says."""
    return ("down_proj" if holds == ("down",) else "gate_up_proj") + "_bias" * bias


def stacked(tensor: torch.Tensor, row: Row, module: nn.Module, count: int, hidden: int, ep: int) -> torch.Tensor:
    """A stack that is stored as such. Flat: (hidden, experts·2·ffn) viewed as (experts, hidden, 2·ffn), or (experts·ffn, hidden)."""
    transposed, fused = row.flat or row.transposed == "always" or (row.transposed == "without ep" and ep == 1), "gate" in row.holds
    if row.flat:
        tensor = tensor.reshape(count, hidden, -1) if fused else tensor.reshape(count, -1, hidden)
    if fused and row.order == "sections" and not module.is_concatenated:
        tensor = alternate(tensor, 2 if transposed else 1)
    return tensor.transpose(1, 2) if tensor.dim() == 3 and transposed != module.is_transposed else tensor


def _complete(s: Slices, path: str, numbered: dict[int, list[str]], first: int, stop: int) -> bool:
    """Whether the rank's experts are those that are dealt to it, each with all its matrices."""
    found = {expert: {s.table[name].row: name for name in names} for expert, names in numbered.items()}
    every = {row: None for own in found.values() for row in own}
    expected = list(range(stop - first) if any(row.local for row in every) else range(first, stop))
    if sorted(found) != expected:
        s.problem(f"{path}.{min(found)}", f"and others are experts {sorted(found)} of this rank, it is dealt {expected}")
    missing = [
        f"{path}.{expert}.{row.path.rpartition('.')[2]}.{row.kind}" for expert in sorted(found) for row in every if row not in found[expert]
    ]
    halves = {row.holds for row in every} & {("gate",), ("up",)}
    if len(halves) == 1:
        missing.append(f"{path}: gate or up of all experts")
    for name in missing:
        s.problem(name, "is missing")
    for own in numbered.values():
        s.used.update(own)
    return sorted(found) == expected and not missing


def fill(s: Slices, m: Model, path: str, names: list[str]) -> None:
    """A layer's experts, of which the rank holds some, or slices; `names` are all their tensors."""
    module, rank, hidden, ep = m.at(path), s.seat.rank, m.config.hidden_size, s.shards.mesh.ep
    first, stop = chunk(module.num_experts, ep, rank.ep)
    numbered: dict[int, list[str]] = defaultdict(list)
    made: dict[str, torch.Tensor] = {}
    for name in names:
        held = s.table[name]
        if held.expert is None:
            made[held.row.kind] = stacked(s.read(name), held.row, module, stop - first, hidden, ep)
        else:
            numbered[held.expert].append(name)
    if numbered and _complete(s, path, numbered, first, stop):
        made |= stack_one_by_one(s, numbered, module)
    copied = {
        parameter(row.holds, "bias" in row.kind) for row in {s.table[name].row for name in names} if row.copied and "bias" in row.kind
    }
    for kind in copied & made.keys():
        # outputs are summed, so each rank adds its share of its own copy; where rows don't say so, all ranks but the first hold zeros
        made[kind] = made[kind] / len({seat.rank.etp for seat in s.seats if seat.stage == s.seat.stage})
    shown = names[0]
    for kind in [kind for kind, tensor in module._parameters.items() if tensor is not None]:
        if kind not in made:
            continue
        own, full = made[kind], module._parameters[kind]
        whole = [size for dim, size in enumerate(full.shape) if dim and size == hidden]
        if own.dim() != full.dim() or len(own) != stop - first or any(size not in own.shape[1:] for size in whole):
            s.problem(
                shown,
                f"and the others of its layer make {kind} of {list(own.shape)}, the engine takes {stop - first} experts of slices of {list(full.shape[1:])}",
            )
        module._parameters[kind] = nn.Parameter(own, requires_grad=False)
    module.num_experts = stop - first
    copies = sum((seat.rank.ep, seat.rank.etp) == (rank.ep, rank.etp) for seat in s.seats if seat.stage == s.seat.stage)
    m.put(path, Experts(module, first, stop - first, copies, s.stage))
