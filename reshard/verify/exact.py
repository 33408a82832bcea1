"""Sums at full precision, whatever the environment asked for: then a difference between two runs is the shards', not the device's.

TensorFloat-32 keeps ten bits of a factor, and half-precision sums round on the way. With either on, the tolerance for fp32 would
not hold, or sound shards would be hard to tell from others.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

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
    names = [name for name in _SHORTCUTS if hasattr(matmul, name)]
    before = torch.get_float32_matmul_precision(), cudnn.allow_tf32, {name: getattr(matmul, name) for name in names}
    torch.set_float32_matmul_precision("highest")  # of the CPU too, where oneDNN may use bf16
    try:
        for name in names:
            setattr(matmul, name, False)
        cudnn.allow_tf32 = False
        yield
    finally:
        precision, cudnn.allow_tf32, values = before
        for name, value in values.items():
            setattr(matmul, name, value)
        torch.set_float32_matmul_precision(precision)
