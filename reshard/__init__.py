"""reshard: move a model's weights from the shape they are in to the shape they must be in.

ckpt   = reshard.open("Qwen3-8B")                                  # headers only
plan   = reshard.plan(ckpt, format="vllm", tp=8)                   # pure; nothing written
report = reshard.convert("Qwen3-8B", "out", format="megatron", tp=4, pp=2)
state  = reshard.load("Qwen3-8B", format="megatron", tp=4, rank=1) # {stored name: tensor}, this rank's bytes only
same   = reshard.diff("Qwen3-8B", "out")
"""

from reshard.errors import CastError, DestinationError, FormatError, HubError, LayoutError, PlanError, ReshardError, SourceError

__version__ = "0.1.0"
__all__ = ["CastError", "DestinationError", "FormatError", "HubError", "LayoutError", "PlanError", "ReshardError",
           "SourceError", "convert", "diff", "load", "open", "plan", "pull", "push"]  # fmt: skip


def __getattr__(name: str):
    if name in ("open", "plan", "convert", "load", "diff", "pull", "push"):
        from reshard import api

        return getattr(api, name)
    raise AttributeError(f"module 'reshard' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
