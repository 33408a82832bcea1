"""torch.distributed.checkpoint: what reshard writes is loaded by `dcp.load` into DTensors on 1, 2 and 3 gloo ranks; torch's own folders are read."""

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from frameworks import SAMPLES, check, on_ranks, same

TITLE = "torch.distributed.checkpoint"
INSTALL = ()
VERSIONS = ("torch",)
MODELS = ("llama-oddvocab", "qwen3_moe", "gpt_oss", "deepseek_v3")
#: folders of torch's own writers, their config.json's folder, and the weights that they were saved from
GENUINE = (
    ("dcp/llama-fsdp2-dp2-modelonly", "hf/llama", "hf/llama/model.safetensors"),
    ("dcp/llama-fsdp2dp2-tp2", "hf/llama", "hf/llama/model.safetensors"),
    ("dcp/llama-oddvocab-fsdp2-dp3-modelonly", "hf/llama-oddvocab", "hf/llama-oddvocab/model.safetensors"),
    ("accelerate/llama-fsdp2-dp2", "accelerate/llama-fsdp2-dp2", "accelerate/llama-fsdp2-dp2.full_inmemory_names.safetensors"),
    ("torchtitan_style/llama-meta-dp2/step-10", "meta/hf-original", "meta/hf-original/model.safetensors"),
)


def rows(scratch: Path, quick: bool) -> Iterator[dict]:
    for name in MODELS[:1] if quick else MODELS:
        for written, ranks in ((3, 1), (2, 2), (1, 3)):
            folder = scratch / f"{name}-{ranks}"
            yield check(
                f"{name}: dcp for {written} ranks, `dcp.load` on {ranks}",
                partial(_loads, name, folder, written, ranks),
                partial(_damaged, name, folder, ranks),
            )
            shutil.rmtree(folder, ignore_errors=True)
    for name, config, weights in GENUINE[:1] if quick else GENUINE:
        folder = scratch / "read"
        yield check(f"{name} → hf", partial(_read, SAMPLES / name, SAMPLES / config, SAMPLES / weights, folder),
                    partial(_exchanged, SAMPLES / weights, folder))  # fmt: skip
        shutil.rmtree(folder)


def _loads(name: str, folder: Path, written: int, ranks: int) -> str:
    import reshard

    reshard.convert(SAMPLES / "hf" / name, folder, format="dcp", tp=written, fsync=False)
    return same(memory(SAMPLES / "hf" / name), on_ranks(ranks, load, str(folder), str(SAMPLES / "hf" / name))[0])


def _damaged(name: str, folder: Path, ranks: int) -> str:
    import reshard

    held = reshard.open(folder, config=SAMPLES / "hf" / name).stored[-1]
    path = folder / held.file
    content = bytearray(path.read_bytes())
    content[held.start + 1] ^= 0x40
    path.write_bytes(content)
    return same(memory(SAMPLES / "hf" / name), on_ranks(ranks, load, str(folder), str(SAMPLES / "hf" / name))[0])


def memory(model: Path) -> dict:
    """The parameters of the model that transformers makes of `model`, by its names in memory."""
    from transformers import AutoModelForCausalLM

    return {name: tensor.detach() for name, tensor in AutoModelForCausalLM.from_pretrained(model, dtype="auto").state_dict().items()}


def load(rank: int, folder: str, model: str) -> dict | None:
    """On one rank: the model with all its parameters cut over the ranks and made NaN, filled by torch; whole, by rank 0."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    state = {n: distribute_tensor(torch.full_like(t, float("nan")), mesh, [Shard(0)]) for n, t in memory(Path(model)).items()}
    dcp.load(state, checkpoint_id=folder)
    whole = {name: tensor.full_tensor() for name, tensor in state.items()}
    return None if rank else whole


def _read(source: Path, config: Path, weights: Path, folder: Path) -> str:
    from safetensors.torch import load_file

    import reshard

    reshard.convert(reshard.open(source, config=config), folder, format="hf", fsync=False)
    want, found = load_file(weights), load_file(folder / "model.safetensors")
    return same({name: tensor for name, tensor in want.items() if name in found or name != "lm_head.weight"}, found)


def _exchanged(weights: Path, folder: Path) -> str:
    from safetensors.torch import load_file

    found = load_file(folder / "model.safetensors")
    one, other = (next(n for n in found if n.endswith(f"layers.{i}.mlp.up_proj.weight")) for i in (0, 1))
    found[one], found[other] = found[other], found[one]
    want = load_file(weights)
    return same({name: tensor for name, tensor in want.items() if name in found}, found)
