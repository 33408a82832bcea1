"""Weight sync: from the trainer's tensors to the engine's, moving only what must move.

    layout = sync.layout("config.json")
    src  = sync.Side.placed(layout, "megatron", tp=4, pp=2, ranks=range(0, 8))
    dst  = sync.Side.placed(layout, "vllm", tp=4, ranks=range(8, 12))
    plan = sync.plan(src, dst)                       # pure: every rank makes the same one by itself
    print(plan.cost(bandwidth=50e9))
    s    = sync.Sync(plan)                           # torch.distributed's default group
    s.send(model.named_parameters(), version=1)      # on trainer ranks
    s.recv(engine.named_parameters(), version=1)     # on engine ranks, into the tensors as they lie

The same join as everywhere in reshard, with ranks on both sides: ``side.py`` says who holds what,
``plan.py`` joins and chooses who sends, ``messages.py`` lays one rank's copies out as messages, ``cost.py`` adds up: all pure. Torch
begins at ``tensors.py`` (binding), ``staging.py``, ``transport.py`` and ``mapping.py`` (moving), ``device.py`` (what is asked of an
accelerator), ``checks.py``, ``fp8.py``, ``groups.py`` and ``session.py`` (the object that runs steps).
"""

from importlib import import_module

from reshard.errors import PeerLost, SyncError
from reshard.sync.cost import Cost
from reshard.sync.fp8_blocks import Fp8
from reshard.sync.lora import adapter
from reshard.sync.plan import SyncPlan, plan
from reshard.sync.sharding import Sharding, fsdp
from reshard.sync.side import Side, layout

__all__ = [
    "Cost",
    "Fp8",
    "PeerLost",
    "Sharding",
    "Side",
    "Sync",
    "SyncError",
    "SyncPlan",
    "adapter",
    "dtypes",
    "fsdp",
    "joined",
    "layout",
    "plan",
    "shardings",
]


#: names whose modules import torch, which a plan does not need
_WITH_TORCH = {"Sync": "session", "dtypes": "tensors", "joined": "groups", "shardings": "tensors"}


def __getattr__(name: str):
    if name not in _WITH_TORCH:
        raise AttributeError(f"module 'reshard.sync' has no attribute {name!r}")
    return getattr(import_module(f"reshard.sync.{_WITH_TORCH[name]}"), name)
