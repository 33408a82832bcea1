"""The original's logits: transformers on the Hugging Face checkpoint."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from reshard.errors import FormatError
from reshard.verify.model import Model, empty_model, parts_of
from reshard.verify.routers import recorded
from reshard.verify.trace import Trace, every_row

#: every number computed one way, by transformers' plain code, on every device
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager", "local_files_only": True}
#: bytes of weights that stay in memory with --low-memory; layers past them are read from disk as they are used
_KEPT = 10**8


def load_reference(folder: Path, dtype: torch.dtype, device: torch.device, low_memory: bool, offload: Path) -> nn.Module:
    """transformers' model of `folder`, whole on `device`, or streamed from disk layer by layer (`offload` takes what must be cast)."""
    from transformers import AutoModelForCausalLM

    place = (device.index or 0) if device.type == "cuda" else "cpu"
    options = {"device_map": "auto", "max_memory": {place: _KEPT}, "offload_folder": offload} if low_memory else {}
    try:
        model, seen = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **EAGER, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise FormatError(f"transformers cannot load the reference {folder}: {str(error).strip().splitlines()[0]}",
                          "the reference is a Hugging Face checkpoint of a causal language model, with config.json") from None  # fmt: skip
    absent = sorted(seen["missing_keys"])
    if absent:
        raise FormatError(f"the reference {folder} lacks {len(absent)} tensors: {', '.join(absent[:3])}", "is it the whole original model?")
    return model.eval() if low_memory else model.eval().to(device)


def load_state(state: dict[str, torch.Tensor], config, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """transformers' model of `config` with the tensors in `state`, which have the names of its files on the Hub."""
    kind = type(empty_model(config).module)
    return kind.from_pretrained(None, config=config, state_dict=state, dtype=dtype, **EAGER).eval().to(device)


@dataclass(frozen=True)
class Original:
    """What the original computed, on the CPU: logits [sequences, positions, vocabulary] in fp32, the output of every part
    of the model, and what its routers saw."""

    logits: torch.Tensor
    outputs: dict[str, torch.Tensor]
    routed: dict[str, torch.Tensor]


@torch.no_grad()
def run_reference(folder: Path, ids: torch.Tensor, dtype: torch.dtype, device: torch.device, low_memory: bool = False) -> Original:
    """Run the original on `ids` [sequences, positions]."""
    with tempfile.TemporaryDirectory(prefix="reshard-verify-") as offload:
        model = load_reference(folder, dtype, device, low_memory, Path(offload))
        m: Model = parts_of(model)
        rows = every_row(m, device)
        with Trace(m) as outputs, recorded(m) as routed:
            logits = model(ids.to(device), use_cache=False).logits
    return Original(logits.float().cpu(), {**rows, **outputs}, routed)
