"""Routers see what the original's saw.

Which experts a token goes to is decided by a comparison: where two are nearly equal, rounding alone turns it, and sound shards
would give other logits. So the original's inputs of its routers are kept, and each rank's router is given these: a sound router
then decides as the original did, in any dtype, and a broken one (another's rows, a lost correction bias) does not.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from reshard.verify.model import Model


def routers(m: Model) -> list[tuple[str, nn.Module]]:
    """The modules that choose experts, by path within the layers."""
    return [(path, module) for path, module in m.at(m.layers).named_modules() if type(module).__name__.lower().endswith("router")]


@contextmanager
def hooked(modules: Iterable[tuple[str, nn.Module]], keep: Callable[[str, tuple, object], None], after: bool = False) -> Iterator[None]:
    """While ``with`` lasts, `keep` is called with the path and the arguments of each of `modules` that runs, and `after` it with its output."""
    hooks = []
    for path, module in modules:
        if after:
            hooks.append(module.register_forward_hook(lambda module, args, output, path=path: keep(path, args, output)))
        else:
            hooks.append(module.register_forward_pre_hook(lambda module, args, path=path: keep(path, args, None)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def recorded(m: Model) -> Iterator[dict[str, torch.Tensor]]:
    """The inputs of every router, by path within the layers, on the CPU, after the forward in ``with``."""
    inputs: dict[str, torch.Tensor] = {}
    with hooked(routers(m), lambda path, args, _: inputs.update({path: args[0].detach().cpu()})):
        yield inputs


def replay(m: Model, inputs: dict[str, torch.Tensor]) -> None:
    """Give every router of `m` the recorded input from now on."""
    for path, module in routers(m):
        if path in inputs:
            module.register_forward_pre_hook(lambda module, args, seen=inputs[path]: (seen.to(args[0]), *args[1:]))
