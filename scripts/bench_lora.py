"""Time `reshard merge` beside PEFT's merge_and_unload and save_pretrained, in turn: seconds and peak memory of each as a process.

python scripts/bench_lora.py FOLDER PYTHON [LAYERS]    (PYTHON: of an environment with peft; 16 layers: 3.0 GB of weights, thrice that of disk)
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
from bench_checkpoint import CONFIG, make
from bench_dcp import in_turn
from safetensors.numpy import save_file

import reshard

RANK = 16


def adapter(folder: Path, layers: int) -> None:
    """An adapter of all linear layers."""
    hidden, ffn, head = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["head_dim"]
    wide, narrow = CONFIG["num_attention_heads"] * head, CONFIG["num_key_value_heads"] * head
    sizes = {"self_attn.q_proj": (wide, hidden), "self_attn.k_proj": (narrow, hidden), "self_attn.v_proj": (narrow, hidden),
             "self_attn.o_proj": (hidden, wide), "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden), "mlp.down_proj": (hidden, ffn)}  # fmt: skip
    rng, tensors = np.random.default_rng(0), {}
    for layer in range(layers):
        for module, (out, inner) in sizes.items():
            stem = f"base_model.model.model.layers.{layer}.{module}.lora_"
            tensors[f"{stem}A.weight"] = rng.normal(0, 0.02, (RANK, inner)).astype(np.float32)
            tensors[f"{stem}B.weight"] = rng.normal(0, 0.02, (out, RANK)).astype(np.float32)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    modules = [module.rpartition(".")[2] for module in sizes]
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": 32, "target_modules": modules, "task_type": "CAUSAL_LM"})
    )


def main() -> None:
    folder, python, layers = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 16
    shutil.rmtree(folder, ignore_errors=True)
    size = make(folder / "hf", layers)
    adapter(folder / "adapter", layers)
    base, own, out, other = (str(folder / name) for name in ("hf", "adapter", "out", "theirs"))
    code = (
        "import torch; from peft import PeftModel; from transformers import AutoModelForCausalLM as M; "
        f"PeftModel.from_pretrained(M.from_pretrained({base!r}, dtype=torch.bfloat16), {own!r}).merge_and_unload().save_pretrained({other!r})"
    )
    print(f"{size / 1e9:.1f} GB in bf16, rank {RANK} on all linear layers\n")
    in_turn(
        {
            "reshard merge --to hf": [sys.executable, "-m", "reshard", "merge", base, own, out, "--to", "hf", "--no-fsync", "--overwrite"],
            "PEFT merge_and_unload, save_pretrained": [python, "-c", code],
        },
        [Path(other)],
    )
    print(f"\nequal to {2**-12:.1e}: {bool(reshard.diff(out, other, atol=2**-12))}")  # values up to 2⁻⁵·1.9: a bf16 step is 2⁻¹²
    print(f"the base is that near: {bool(reshard.diff(base, other, atol=2**-12))}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
