"""PEFT: adapters that it saves, merged by reshard into every kind of target; adapters that reshard cut and put together, loaded by it."""

import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from frameworks import SAMPLES, Differs, check, same

TITLE = "PEFT"
INSTALL = ("--no-deps", "peft==0.21.2")
VERSIONS = ("peft", "transformers", "torch")
#: model of the samples (or a config), what PEFT is told, and what it shows
CASES = {
    "llama, all linears": ("llama", {"target_modules": "all-linear", "r": 8, "lora_alpha": 16}),
    "llama, ranks and scales by pattern, rsLoRA, one layer left out": (
        "llama",
        {"target_modules": r"model\.layers\.(0\.self_attn\..*_proj|1\.mlp\..*_proj)", "r": 4, "lora_alpha": 7, "use_rslora": True,
         "rank_pattern": {"q_proj": 6, r"layers\.1\.mlp\.down_proj": 2}, "alpha_pattern": {"v_proj": 20}},
    ),
    "llama, embedding and head": ("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "r": 4}),
    "llama, head and norm saved whole": ("llama", {"target_modules": ["k_proj"], "modules_to_save": ["lm_head", "norm"], "r": 4}),
    "llama, biases trained": ("llama-tied", {"target_modules": ["q_proj", "down_proj"], "bias": "all", "r": 4}),
    "phi3, fused targets": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"], "r": 4}),
    "gpt_neox, query, key and value by head": ("gpt_neox", {"target_modules": ["query_key_value", "dense_4h_to_h"], "r": 4}),
    "gpt2, matrices input dimension first": (
        {"model_type": "gpt2", "n_embd": 48, "n_head": 4, "n_layer": 2, "vocab_size": 128, "n_positions": 64},
        {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True, "r": 4},
    ),
    "deepseek_v3, latent attention": ("deepseek_v3", {"target_modules": ["q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"], "r": 4}),
    "qwen3_moe, stacked experts": (
        "qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], "r": 4}),
    "qwen3_moe, one of two stacks": ("qwen3_moe", {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"], "r": 3}),
    "mixtral, stacked experts": ("mixtral", {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "r": 4}),
    "gpt_oss, transposed stacks": (
        "gpt_oss", {"target_modules": ["o_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], "r": 4}),
}  # fmt: skip


def rows(scratch: Path, quick: bool) -> Iterator[dict]:
    for what, (model, settings) in list(CASES.items())[: 2 if quick else None]:
        folder = scratch / "case"
        yield check(f"{what}: merged as PEFT merges", partial(_merged, model, settings, folder), partial(_other_scale, folder))
        yield check(f"{what}: cut for 2 ranks, for 3, and whole again", partial(_recut, folder), partial(_damaged, folder))
        shutil.rmtree(folder, ignore_errors=True)


def _merged(model, settings: dict, folder: Path) -> str:
    """PEFT's adapter on disk; its logits, merged weights beside reshard's."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    if isinstance(model, str):
        shutil.copytree(SAMPLES / "hf" / model, folder / "base")
    else:
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**model)).save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32, attn_implementation="eager")
    tuned = get_peft_model(base, LoraConfig(**settings, init_lora_weights=False))
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    tuned.save_pretrained(folder / "adapter")
    torch.save(_logits(tuned), folder / "logits.pt")
    tuned.merge_and_unload().save_pretrained(folder / "theirs")
    return _compared(folder)


def _compared(folder: Path) -> str:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    import reshard

    reshard.convert(folder / "base", folder / "ours", format="hf", adapter=folder / "adapter", dtype="fp32", fsync=False, overwrite=True)
    want, found = (load_file(folder / name / "model.safetensors") for name in ("theirs", "ours"))
    if want.keys() != found.keys():
        raise Differs(f"names: {sorted(want.keys() ^ found.keys())[:4]}")
    worst = max(float((want[n] - found[n]).abs().max() / want[n].abs().max().clamp(min=1e-9)) for n in want)
    model = AutoModelForCausalLM.from_pretrained(folder / "ours", dtype=torch.float32, attn_implementation="eager")
    logits = torch.load(folder / "logits.pt")
    off = float((_logits(model) - logits).abs().max() / logits.abs().max())
    if worst > 1e-6 or off > 2e-5:
        raise Differs(f"weights differ by {worst:.1e} of the largest, logits by {off:.1e}")
    return f"{len(want)} tensors within {worst:.1e} of the largest, logits of the adapter unmerged within {off:.1e}"


def _logits(model):
    import torch

    tokens = torch.arange(3, 27).reshape(2, 12)
    with torch.no_grad():
        return model(input_ids=tokens).logits


def _other_scale(folder: Path) -> None:
    path = folder / "adapter/adapter_config.json"
    kept = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(kept) | {"lora_alpha": json.loads(kept)["lora_alpha"] * 1.01}))
        _compared(folder)
    finally:
        path.write_text(kept)


def _recut(folder: Path) -> str:
    """The adapter there and back; PEFT loads what comes back and gives the same logits to the last bit."""
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    import reshard

    before = folder / "adapter"
    for format, ranks in (("tp", 2), ("dcp", 3), ("peft", 1)):
        shutil.rmtree(folder / format, ignore_errors=True)
        reshard.convert(reshard.open(before, config=folder / "base"), folder / format, format=format, tp=ranks, fsync=False)
        before = folder / format
    found = same(load_file(folder / "adapter/adapter_model.safetensors"), load_file(before / "adapter_model.safetensors"))
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32, attn_implementation="eager")
    if not torch.equal(_logits(PeftModel.from_pretrained(base, before)), torch.load(folder / "logits.pt")):
        raise Differs("PEFT's logits with the adapter are others")
    return found + "; PEFT's logits equal"


def _damaged(folder: Path) -> None:
    from safetensors.torch import load_file

    import reshard

    path = sorted((folder / "tp").glob("*.safetensors"))[-1]
    content = bytearray(path.read_bytes())
    content[-2] ^= 0x40
    path.write_bytes(content)
    reshard.convert(reshard.open(folder / "tp", config=folder / "base"), folder / "peft", format="peft", fsync=False, overwrite=True)
    same(load_file(folder / "adapter/adapter_model.safetensors"), load_file(folder / "peft/adapter_model.safetensors"))
