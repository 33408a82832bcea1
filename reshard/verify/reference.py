"""The original's logits: transformers on the Hugging Face checkpoint."""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from reshard.errors import FormatError
from reshard.verify.direct import reached, router_rows, routing_vectors, run_experts
from reshard.verify.model import Model, empty_model, parts_of
from reshard.verify.routers import recorded
from reshard.verify.trace import every_row, traced

#: every number computed one way, by transformers' plain code, on every device
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager", "local_files_only": True}


def placement(m: Model, device: torch.device, low_memory: bool) -> dict[str, torch.device | str | int]:
    """Where the parts of the original are: all on `device`, or with `low_memory` on disk until they are used there.

    Whole, each tensor goes to the device as it is stored and is cast there: no model in fp32 on the host. Streamed, norm and
    tables of angles stay on `device`, which makes it the one that accelerate computes on; were everything on disk, it would
    quietly take the CPU.
    """
    if not low_memory:
        return {"": device}
    base = m.module.base_model_prefix
    heavy = {m.embedding, m.head}
    here = (device.index or 0) if device.type == "cuda" else device.type  # as accelerate and safetensors name it
    parts = {f"{base}.{name}": child for name, child in m.at(base).named_children()} | {
        name: child for name, child in m.module.named_children() if name != base
    }
    out: dict[str, torch.device | str | int] = {}
    for path, child in parts.items():
        if path == m.layers:
            out |= {f"{path}.{i}": "disk" for i in range(len(child))}
        else:
            out[path] = "disk" if path in heavy else here
    return out


def load_reference(folder: Path, dtype: torch.dtype, device: torch.device, low_memory: bool, offload: Path) -> nn.Module:
    """transformers' model of `folder`, whole on `device`, or streamed from disk layer by layer (`offload` takes what must be cast)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {"offload_folder": offload} if low_memory else {}
    try:
        where = placement(empty_model(AutoConfig.from_pretrained(folder, local_files_only=True)), device, low_memory)
        model, seen = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, **EAGER, output_loading_info=True, device_map=where, **options
        )
    except torch.cuda.OutOfMemoryError as error:
        raise FormatError(
            f"the original does not fit on {device}: {str(error).splitlines()[0]}", "use --dtype bf16, --low-memory or --device cpu"
        ) from None
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise FormatError(f"transformers cannot load the reference {folder}: {str(error).strip().splitlines()[0]}",
                          "the reference is a Hugging Face checkpoint of a causal language model, with config.json") from None  # fmt: skip
    absent = sorted(seen["missing_keys"])
    if absent:
        raise FormatError(f"the reference {folder} lacks {len(absent)} tensors: {', '.join(absent[:3])}", "is it the whole original model?")
    elsewhere = sorted({str(at) for at in computing_devices(model) if at.type != device.type})
    if elsewhere:
        raise FormatError(f"the original would run on {', '.join(elsewhere)}, --device says {device.type}", "leave --low-memory out")
    return model.eval()


def computing_devices(model: nn.Module) -> list[torch.device]:
    """The devices that the parts of `model` compute on: that of their weights, or for what is streamed, accelerate's choice."""
    hooks = [
        hook
        for part in model.modules()
        if (hook := getattr(part, "_hf_hook", None)) and getattr(hook, "execution_device", None) is not None
    ]
    chosen = [torch.device("cuda", at) if isinstance(at := hook.execution_device, int) else torch.device(at) for hook in hooks]
    return chosen or [tensor.device for tensor in model.parameters()]


def load_state(state: dict[str, torch.Tensor], config, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """transformers' model of `config` with the tensors in `state`, which have the names of its files on the Hub."""
    kind = type(empty_model(config).module)
    return kind.from_pretrained(None, config=config, state_dict=state, dtype=dtype, device_map={"": device}, **EAGER).eval()


@dataclass(frozen=True)
class Original:
    """What the original computed, on the CPU: logits [sequences, positions, vocabulary] in fp32, the output of every part
    of the model, and what its routers saw; each expert's outputs on given tokens, the vectors that routers add and the marks of
    their rows (``direct.py``), and how many of all experts the prompts reached."""

    logits: torch.Tensor
    outputs: dict[str, torch.Tensor]
    routed: dict[str, torch.Tensor]
    experts: dict[str, torch.Tensor] = field(default_factory=dict)
    vectors: dict[str, torch.Tensor] = field(default_factory=dict)
    rows: dict[str, torch.Tensor] = field(default_factory=dict)
    reached: tuple[int, int] = (0, 0)


@torch.no_grad()
def run_reference(folder: Path, ids: torch.Tensor, dtype: torch.dtype, device: torch.device, low_memory: bool = False) -> Original:
    """Run the original on `ids` [sequences, positions]."""
    with tempfile.TemporaryDirectory(prefix="reshard-verify-") as offload:
        model = load_reference(folder, dtype, device, low_memory, Path(offload))
        m: Model = parts_of(model)
        rows = every_row(m, device)
        with traced(m) as outputs, recorded(m) as routed, reached(m) as used:
            logits = model(ids.to(device), use_cache=False).logits
        experts = run_experts(m, dtype, device)
        every = sum(len(outputs_of) for outputs_of in experts.values())
        return Original(
            logits.float().cpu(),
            {**rows, **outputs},
            routed,
            experts,
            routing_vectors(m),
            router_rows(m),
            (sum(map(len, used.values())), every),
        )
