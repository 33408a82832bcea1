"""An engine's model and reshard's placement of it brought together: which of its tensors is filled with what. No engine is imported here."""

import logging
from collections.abc import Mapping

import torch

from reshard import formats
from reshard.errors import PlanError
from reshard.layout import Placement, Rank, parse_version
from reshard.text import some

_log = logging.getLogger("reshard.plugins")


def release(engine: str, version: str) -> str:
    """The engine's release, or the newest whose names are known: a tensor that is called otherwise by now is refused by its name."""
    newest, parts = formats.get(engine).newest, version.partition("+")[0].split(".")
    own = ".".join(parts[: len(newest.split("."))])
    return own if parse_version(own) <= parse_version(newest) else newest


def fitted(model: torch.nn.Module, placement: Placement, rank: Rank) -> tuple[dict[str, torch.Tensor], list[tuple[str, torch.Tensor]]]:
    """The model's tensors by the names of the placement, and copies to be made after: (name, tensor). Raises PlanError with all problems.

    A tensor of several names is found by any of them. Where the engine padded the vocabulary further than the placement (room for
    adapters), what is beyond becomes zero; any other shape is refused, by ``load_into``. Two tensors of one parameter (vLLM unties embedding and head where files hold a head) are
    filled alike.
    """
    state = {name: t.data for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, torch.Tensor) and t.numel()}
    names: dict[tuple, list[str]] = {}
    for name, tensor in state.items():
        names.setdefault(storage(tensor), []).append(name)
    stored = {s.name: s for s in placement.stored([rank])}
    shapes = {name: tuple(s.shape) for name, s in stored.items()} | {name: tuple(c.shape) for name, c in placement.constants(rank)}
    into, filled, problems = {}, set(), []
    for name, shape in shapes.items():
        tensor = state.get(name)
        if tensor is None:
            problems.append(f"{name} {list(shape)} is in no parameter of {type(model).__name__}")
            continue
        if name in stored and stored[name].entry.pad and tuple(tensor.shape[1:]) == shape[1:] and tensor.shape[0] > shape[0]:
            _log.info("%s is %s here, %s by its layout: the rest is zero", name, list(tensor.shape), list(shape))
            tensor.zero_()
            tensor = tensor[: shape[0]]
        into[name] = tensor
        filled.update(names[storage(state[name])])
    copies = []
    for name in state.keys() - filled:
        twin = other_name(placement, name, stored)
        if twin in into and into[twin].shape == state[name].shape:
            copies.append((twin, state[name]))
        else:
            problems.append(f"{name} {list(state[name].shape)}: layout {placement.layout.name} fills it with nothing")
    if problems:
        raise PlanError(
            sorted(problems), f"{type(model).__name__} has {some(sorted(state))}; layout {placement.layout.name} is for other names"
        )
    return into, copies


def storage(tensor: torch.Tensor) -> tuple:
    """What is the same of two names of one tensor."""
    return tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape)


def other_name(placement: Placement, name: str, stored: Mapping) -> str | None:
    """What the placement holds of the same parameters under another name; None where the layout knows no entry of this one."""
    of = next((entry.of for entry in placement.section.entries if entry.name == name), None)
    return next((s.name for s in stored.values() if of and s.entry.of == of and s.name == s.entry.name), None)
