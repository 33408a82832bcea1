"""Time `reshard plan` on a checkpoint of DeepSeek-V3's shape: 671 B parameters, 46,000 tensors, sparse files of no size.

python scripts/bench_plan.py FOLDER
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from reshard import formats
from reshard.formats import Target
from reshard.layout import Mesh, Placement, builtin_descriptors

CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"], "num_hidden_layers": 61, "vocab_size": 129280, "hidden_size": 7168,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1,
    "num_attention_heads": 128, "num_key_value_heads": 128, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "q_lora_rank": 1536, "kv_lora_rank": 512, "first_k_dense_replace": 3, "moe_layer_freq": 1, "topk_method": "noaux_tc",
    "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "norm_topk_prob": True, "scoring_func": "sigmoid", "routed_scaling_factor": 2.5,
    "rms_norm_eps": 1e-6, "rope_theta": 10000, "max_position_embeddings": 163840, "tie_word_embeddings": False,
}  # fmt: skip
CASES = (("vLLM TP8", ["--to", "vllm", "--tp", "8"]), ("one rank of vLLM TP8", ["--to", "vllm", "--tp", "8", "--rank", "3"]),
         ("tp TP8", ["--to", "tp", "--tp", "8"]), ("Megatron TP8 EP8", ["--to", "megatron", "--tp", "8", "--ep", "8"]))  # fmt: skip


def make(folder: Path) -> None:
    """A checkpoint whose headers are real and whose tensors are holes."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    layout = builtin_descriptors()["deepseek_v3"].bind(CONFIG)
    placement = Placement(layout, layout.section("hf"), formats.get("hf").rules, Mesh())
    stored = [tensor._replace(dtype="BF16") for tensor in placement.stored()]
    written = formats.get("hf").write(Target(placement, placement.ranks), stored)
    for file in written.files:
        with open(folder / file.path, "wb") as out:
            for offset, content in file.image.segments:
                out.seek(offset)
                out.write(content)
            out.truncate(file.image.size)
    for name, content in written.small.items():
        (folder / name).write_bytes(content)


SYNCS = {
    "Megatron TP8·EP32 → vLLM TP16 × 16": ("megatron", {"tp": 8, "ep": 32, "etp": 1}, "vllm", {"tp": 16}),
    "Megatron TP8·EP32 → vLLM TP32·EP32 × 8": ("megatron", {"tp": 8, "ep": 32, "etp": 1}, "vllm", {"tp": 32, "ep": 32}),
}


def plan_of_a_sync(name: str) -> None:
    """What each of 256 + 256 ranks does before its first sync: both sides, the plan, its fingerprint, its own messages."""
    from reshard import sync
    from reshard.sync.messages import rank_plan

    source, cut, engine, into = SYNCS[name]
    layout = sync.layout(CONFIG)
    sides = sync.Side.placed(layout, source, ranks=range(256), **cut), sync.Side.placed(layout, engine, ranks=range(256, 512), **into)
    plan = sync.plan(*sides)
    assert plan.fingerprint
    print(json.dumps({"bytes_read": rank_plan(plan, 256).bytes_taken}))


def measured(name: str, command: list[str], read) -> None:
    """One row: `command` as a process of its own."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)
    text = process.stdout.read()
    _, _, usage = os.wait4(process.pid, 0)
    size = read(json.loads(text)) / 1e9
    print(f"| {name} | {time.perf_counter() - began:.1f} | {usage.ru_maxrss / 1e3:.0f} MB | {size:.1f} GB |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--sync", choices=SYNCS, help="plan this sync in this process, and print what one engine rank takes")
    args = parser.parse_args()
    if args.sync:
        return plan_of_a_sync(args.sync)
    make(args.folder)
    print("| plan | seconds | peak memory | bytes read |\n| --- | --- | --- | --- |")
    for name, options in CASES:
        one = "--rank" in options
        command = ["-m", "reshard", "plan", str(args.folder), *options, "--json"]
        measured(name, command, lambda plan, one=one: plan["ranks"][0]["bytes_read"] if one else plan["bytes_read"])
    for name in SYNCS:
        measured(f"sync, {name}: one rank", [__file__, "--sync", name], lambda plan: plan["bytes_read"])


if __name__ == "__main__":
    main()
