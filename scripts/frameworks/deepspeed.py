"""DeepSpeed: tiny models trained a step under every ZeRO stage on CPU; reshard reads what the engine saves as the engine and ``zero_to_fp32`` do."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from frameworks import check, same

TITLE = "DeepSpeed"
INSTALL = (
    "--no-deps",
    "--no-build-isolation",
    "setuptools",
    "wheel",
    "deepspeed==0.19.8",
    "py-cpuinfo",
    "hjson",
    "msgpack",
    "einops",
    "ninja",
)
VERSIONS = ("deepspeed", "torch", "transformers")
_TRAINER = Path(__file__).with_name("_deepspeed_rank.py")
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 320, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
         "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "dtype": "bfloat16", "tie_word_embeddings": False}  # fmt: skip
TIED = LLAMA | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}
ODD = LLAMA | {"vocab_size": 259}
QWEN = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
MOE = LLAMA | {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "intermediate_size": 48,
}
#: name → (model, ranks, settings of the trainer)
CASES = {
    "ZeRO-0": (LLAMA, 2, {"stage": 0}),
    "ZeRO-1": (LLAMA, 2, {"stage": 1}),
    "ZeRO-1, gradients in turns": (LLAMA, 3, {"stage": 1, "zero": {"round_robin_gradients": True}}),
    "ZeRO-2, tied head, biases": (TIED, 3, {"stage": 2}),
    "ZeRO-2, odd vocabulary": (ODD, 3, {"stage": 2}),
    "ZeRO-2, frozen embedding": (LLAMA, 2, {"stage": 2, "freeze": "embed_tokens"}),
    "ZeRO-2, Mixtral": (MOE, 2, {"stage": 2}),
    "ZeRO-3, odd vocabulary": (ODD, 3, {"stage": 3}),
    "ZeRO-3, tied head, biases": (TIED, 3, {"stage": 3}),
    "ZeRO-3, frozen attention": (LLAMA, 3, {"stage": 3, "freeze": "self_attn"}),
    "ZeRO-3, Qwen3, many flat groups": (QWEN, 2, {"stage": 3, "zero": {"sub_group_size": 10000}}),
    "ZeRO-1, AutoTP 2": (LLAMA, 2, {"stage": 1, "tp": 2}),
    "ZeRO-1, AutoTP 2, tied head, biases": (TIED, 2, {"stage": 1, "tp": 2}),
    "ZeRO-1, AutoTP 2, Qwen3, data parallel 2": (QWEN, 4, {"stage": 1, "tp": 2}),
    "ZeRO-2, AutoTP 2, data parallel 2": (LLAMA, 4, {"stage": 2, "tp": 2}),
}


def rows(scratch: Path, quick: bool) -> Iterator[dict]:
    for name in list(CASES)[1:2] if quick else CASES:
        config, ranks, settings = CASES[name]
        folder = scratch / "run"
        yield check(f"{name}: weights", partial(_weights, folder, config, ranks, settings), partial(_mixed, folder))
        if settings["stage"]:
            yield check(f"{name}: fp32", partial(_fp32, folder, config, settings), partial(_flipped, folder, config))
        shutil.rmtree(folder, ignore_errors=True)


def train(folder: Path, config: dict, ranks: int, settings: dict) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = os.environ | {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}  # else `import deepspeed` would find this file
    logs = [(folder / f"rank{rank}.log").open("w") for rank in range(ranks)]
    command = [sys.executable, str(_TRAINER)]
    running = [subprocess.Popen([*command, str(rank), str(ranks), str(port), folder / "config.json", folder, json.dumps(settings)], env=env, stdout=log, stderr=log)
               for rank, log in enumerate(logs)]  # fmt: skip
    try:
        failed = [rank for rank, process in enumerate(running) if process.wait(300)]
    finally:
        for process in running:
            process.kill()
    if failed:
        raise RuntimeError((folder / f"rank{failed[0]}.log").read_text()[-2000:])


def on_disk(state: dict, config: dict, folder: Path) -> dict:
    """A state dict by names of memory, as transformers' own model saves it."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = next(iter(state.values())).dtype
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32).to(dtype)
    model.load_state_dict(state)
    shutil.rmtree(folder / "saved", ignore_errors=True)
    model.save_pretrained(folder / "saved")
    return load_file(folder / "saved" / "model.safetensors")


def read(folder: Path, name: str, **options: object) -> dict:
    """The folder as reshard converts it."""
    from safetensors.torch import load_file

    import reshard

    out = folder.with_name(name)
    shutil.rmtree(out, ignore_errors=True)
    reshard.convert(reshard.open(folder / options.pop("inside", ""), config=folder), out, format="hf", fsync=False, **options)
    return load_file(out / "model.safetensors")


def _weights(folder: Path, config: dict, ranks: int, settings: dict) -> str:
    from safetensors.torch import load_file

    train(folder, config, ranks, settings)
    wanted = on_disk(load_file(folder / "expected.safetensors"), config, folder)
    return f"as the running engine holds them: {same(wanted, read(folder, 'plain', dtype='bf16'))}"


def _mixed(folder: Path) -> None:
    """A step of its own in one file's states, or (of a single file) one of its ranks missing."""
    import torch

    tag = folder / "global_step1"
    files = sorted(tag.glob("*model_states.pt"))
    held = torch.load(files[-1], weights_only=False)
    torch.save(held | ({"global_steps": 7} if len(files) > 1 else {"mp_world_size": 2}), tag / "other")
    kept = files[-1].read_bytes()
    (tag / "other").replace(files[-1])
    try:
        read(folder, "mixed")
    finally:
        files[-1].write_bytes(kept)


def _fp32(folder: Path, config: dict, settings: dict) -> str:
    judge, wanted = by_deepspeed(folder, config, settings)
    precise = read(folder, "precise", dtype="fp32")
    said = f"as {judge}: {same(wanted, precise)}"
    rounded = read(folder, "rounded", dtype="bf16")
    same({name: value.bfloat16() for name, value in precise.items()}, rounded)
    if (folder / "universal").is_dir():
        same(precise, read(folder, "from_universal", inside="universal"))
        said += "; so is the universal checkpoint"
    return said


def by_deepspeed(folder: Path, config: dict, settings: dict) -> tuple[str, dict]:
    """What DeepSpeed's own tools make of a folder, in fp32, and which of them."""
    import torch

    if settings.get("tp", 1) == 1:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        state = get_fp32_state_dict_from_zero_checkpoint(str(folder))
        return "zero_to_fp32", on_disk({name: value.contiguous().float() for name, value in state.items()}, config, folder)
    done = subprocess.run([sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", folder / "global_step1",
                           "--output_folder", folder / "universal"], capture_output=True, text=True, env=os.environ | {"PYTHONSAFEPATH": "1"})  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    files = (folder / "universal" / "zero").glob("*/fp32.pt")
    return "ds_to_universal", {file.parent.name: torch.load(file, weights_only=True)["param"] for file in files}


def _flipped(folder: Path, config: dict) -> None:
    """One bit of a partition."""
    from safetensors.torch import load_file

    import reshard

    source = reshard.open(folder).precise("fp32")
    first = next(s for s in source.stored if s.file.endswith("optim_states.pt"))
    with (folder / first.file).open("r+b") as file:
        file.seek(first.start)
        old = file.read(1)[0]
        file.seek(first.start)
        file.write(bytes([old ^ 1]))
    same(load_file(folder.with_name("precise") / "model.safetensors"), read(folder, "flipped", dtype="fp32"))
