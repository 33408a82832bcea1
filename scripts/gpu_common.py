"""What the parts of gpu_check.py share: rows of the table, timing, and the models they run on."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

_CASE = 150  # seconds: one run of the command line

#: a vocabulary that Megatron pads (249 × 128); matrices as large as a 7B model's
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 8,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 31872, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False, "dtype": "bfloat16",
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
#: less than a megabyte, for a run without a GPU, which shows that nothing is misspelt
TINY = {
    **LLAMA,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": 249,
    "num_hidden_layers": 2,
}


class Bench:
    """One part's arguments, and the file its rows go to."""

    def __init__(self, args: argparse.Namespace):
        self.device = torch.device("cuda", 0) if args.device == "cuda" else torch.device("cpu")
        self.cuda = args.device == "cuda"
        self.work, self.rows, self.part = Path(args.work), Path(args.rows), args.part
        self.config = dict(LLAMA if self.cuda else TINY)
        #: bytes of the device, by which a model is chosen that fits: eight layers take 3.4 GB in bf16, and 12 GB of a proof in fp32
        self.memory = torch.cuda.get_device_properties(self.device).total_memory if self.cuda and torch.cuda.is_available() else 0
        if self.cuda:
            self.config["num_hidden_layers"] = 8 if self.memory > 36e9 else 2 if self.memory > 14e9 else 1
        if args.layers:
            self.config["num_hidden_layers"] = args.layers

    def row(self, case: str, value: str, goal: str = "", ok: bool | None = None, **figures) -> None:
        """One line of the table. `ok`: whether the goal is met, None where there is none."""
        line = json.dumps({"part": self.part, "case": case, "value": value, "goal": goal, "ok": ok, "figures": figures}, default=str)
        with open(self.rows, "a") as out:  # lines are short: those of several processes do not mix
            out.write(line + "\n")
        print(f"{self.part}: {case}: {value}" + (f"  [{goal}: {'met' if ok else 'NOT MET'}]" if goal else ""), flush=True)

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], runs: int = 5) -> float:
        """The median of `runs` runs, after one that does not count."""
        work()
        self.wait()
        taken = []
        for _ in range(runs):
            began = time.perf_counter()
            work()
            self.wait()
            taken.append(time.perf_counter() - began)
        return statistics.median(taken)

    def copy_rate(self) -> float:
        """Bytes per second of a large copy within the device, counted once."""
        x = torch.empty(min(4 << 30, self.memory // 8) if self.cuda else 8 << 20, dtype=torch.uint8, device=self.device)
        y = torch.empty_like(x)
        return x.numel() / self.seconds(lambda: y.copy_(x))

    def at_once(self, most: int, each: float) -> int:
        """How many cases that take `each` bytes of the device may run side by side, `most` at most."""
        return max(1, min(most, int(0.8 * self.memory / each))) if self.cuda else 1

    def model(self) -> Path:
        """A Llama of random bf16 numbers as the Hub has such models, made once in the folder for scratch."""
        folder = self.work / "model"
        if not (folder / "config.json").exists():
            make_model(folder, self.config, self.device)
        return folder


def make_model(folder: Path, config: dict, device: torch.device) -> None:
    """Write the model in two files. Matrices have the spread of trained ones (1/√columns): attention tells positions apart."""
    from safetensors.torch import save_file

    from reshard import formats
    from reshard.layout import Mesh, Placement, builtin_descriptors

    folder.mkdir(parents=True)
    layout = builtin_descriptors()["llama"].bind(config)
    stored = list(Placement(layout, layout.section("hf"), formats.get("hf").rules, Mesh()).stored())
    random = torch.Generator(device).manual_seed(0)
    index, total = {}, 0
    for number, part in enumerate((stored[: len(stored) // 2], stored[len(stored) // 2 :]), 1):
        file, tensors = f"model-{number:05d}-of-00002.safetensors", {}
        for s in part:
            noise = torch.randn(s.shape, generator=random, device=device)
            tensors[s.name] = (noise / s.shape[-1] ** 0.5 if len(s.shape) > 1 else 1 + 0.1 * noise).bfloat16().cpu()
            index[s.name], total = file, total + tensors[s.name].nbytes
        save_file(tensors, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def gb(rate: float) -> str:
    """Bytes, or bytes per second, in gigabytes, as text."""
    return f"{rate / 1e9:.3g} GB"


def environment(**more: str) -> dict[str, str]:
    """For processes that run reshard from this checkout, on one machine."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **more}


def reshard(*words, **more: str) -> subprocess.CompletedProcess:
    """The command line of this checkout. One that takes too long counts as failed."""
    command = [sys.executable, "-m", "reshard", *map(str, words)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(**more), timeout=_CASE, check=False)
    except subprocess.TimeoutExpired as error:
        done = subprocess.CompletedProcess(command, 124, "", f"{(error.stderr or b'').decode()[-300:]}\nnot done after {_CASE} s")
    if done.returncode:
        print("$", *command[2:], f"\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}", flush=True)
    return done


def last(done: subprocess.CompletedProcess) -> str:
    return ((done.stderr if done.returncode else "").strip() or done.stdout.strip() or "no output").splitlines()[-1][:300]
