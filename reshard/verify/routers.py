"""Routers see what the original's saw.

Which experts a token goes to is decided by a comparison: where two are nearly equal, rounding alone turns it, and sound shards
would give other logits. So the original's inputs of its routers are kept, and each rank's router is given these: a sound router
then decides as the original did, in any dtype, and a broken one (another's rows, a lost correction bias) does not.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from reshard.verify.model import Model


def routers(m: Model) -> list[tuple[str, nn.Module]]:
    """The modules that choose experts, by path within the layers."""
    return [(path, module) for path, module in m.at(m.layers).named_modules() if type(module).__name__.lower().endswith("router")]


@contextmanager
def recorded(m: Model) -> Iterator[dict[str, torch.Tensor]]:
    """The inputs of every router, by path within the layers, on the CPU, after the forward in ``with``."""
    inputs: dict[str, torch.Tensor] = {}

    def keep(path: str):
        def hook(module, args) -> None:
            inputs[path] = args[0].detach().cpu()

        return hook

    hooks = [module.register_forward_pre_hook(keep(path)) for path, module in routers(m)]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


def replay(m: Model, inputs: dict[str, torch.Tensor]) -> None:
    """Give every router of `m` the recorded input from now on."""
    for path, module in routers(m):
        if path in inputs:
            module.register_forward_pre_hook(lambda module, args, seen=inputs[path]: (seen.to(args[0]), *args[1:]))
