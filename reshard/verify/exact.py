"""Sums at full precision, whatever the environment asked for: then a difference between two runs is the shards', not the device's.

TensorFloat-32 keeps ten bits of a factor, and half-precision sums round on the way. With either on, the tolerance for fp32 would
not hold, or sound shards would be hard to tell from others.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from reshard.errors import FormatError

#: switches of torch.backends.cuda.matmul, off while verify runs; a torch that lacks one has not the shortcut either
_SHORTCUTS = ("allow_tf32", "allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction", "allow_fp16_accumulation")
STATED = "TF32 off, no sums in half precision"


def refuse_override(device: str) -> None:
    """Raise FormatError where the driver would compute with TF32 whatever torch asks for."""
    if device == "cuda" and os.environ.get("NVIDIA_TF32_OVERRIDE", "").strip() == "1":
        raise FormatError("NVIDIA_TF32_OVERRIDE=1 makes cuBLAS compute fp32 with TF32 whatever torch is told: logits would prove little",
                          "unset NVIDIA_TF32_OVERRIDE")  # fmt: skip


@contextmanager
def exact() -> Iterator[None]:
    """Full precision while ``with`` lasts, and the caller's settings again afterwards."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    shortcuts = [(matmul, name) for name in _SHORTCUTS if _known(matmul, name)] + [(cudnn, "allow_tf32")]
    before = [(owner, name, _read(lambda owner=owner, name=name: _value(owner, name))) for owner, name in shortcuts]
    precision, switches = _read(torch.get_float32_matmul_precision), _switches()
    torch.set_float32_matmul_precision("highest")  # of the CPU too, where oneDNN may use bf16
    try:
        for owner, name in shortcuts:
            setattr(owner, name, False)
        for owner, _ in switches:
            owner.fp32_precision = "ieee"
        yield
    finally:
        for owner, name, value in before:
            if value is not None:
                setattr(owner, name, value)
        if precision is not None:
            torch.set_float32_matmul_precision(precision)
        for owner, value in switches:  # these have the last word: the older names set them too
            owner.fp32_precision = value


def _switches() -> list[tuple[Any, str]]:
    """Whose ``fp32_precision`` says the same since torch 2.9, by backend and operation, and its value for the caller."""
    b = torch.backends
    if not hasattr(b, "fp32_precision"):
        return []
    owners = b.cuda.matmul, b.cudnn.conv, b.cudnn.rnn, b.mkldnn.matmul, b.mkldnn.conv, b.mkldnn.rnn
    return [(owner, owner.fp32_precision) for owner in owners]


def _known(owner: Any, name: str) -> bool:
    """Whether this torch has a switch of that name, be it one that cannot be read now."""
    try:
        return hasattr(owner, name)
    except RuntimeError:
        return True


def _value(owner: Any, name: str) -> Any:
    """A switch as it is to be set again: some are pairs by now, of which reading gives the first."""
    value, second = getattr(owner, name), f"{name}_split_k"
    return (value, getattr(owner, second)) if _known(owner, second) else value


def _read(get: Callable[[], Any]) -> Any:
    """A setting under its older name; None where torch does not tell it, since the caller used the newer ones."""
    try:
        return get()
    except RuntimeError:
        return None
