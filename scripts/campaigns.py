"""What the campaigns share: sources to convert, processes forked from one that has everything loaded, folders compared.

Starting Python takes longer than converting a small model: each run is forked from this process instead, and killed or not.
"""

import filecmp
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import reshard
import reshard.comparison.compare
import reshard.conversion.transaction
import reshard.executor.rearrange
from reshard.demo import CONFIG, make_model

LLAMA = {**CONFIG, "hidden_size": 256, "intermediate_size": 704, "vocab_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 8,
         "num_key_value_heads": 4, "head_dim": 32, "tie_word_embeddings": False}  # fmt: skip
MIXTRAL = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8,
           "num_key_value_heads": 4, "head_dim": 16, "vocab_size": 1024, "num_hidden_layers": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
           "rms_norm_eps": 1e-5, "rope_theta": 1e6, "max_position_embeddings": 512, "sliding_window": None, "tie_word_embeddings": False, "dtype": "bfloat16"}  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """A conversion: `source` as made by ``sources``, and the options of the target."""

    name: str
    source: str
    options: dict


PAIRS = (
    Pair("hf → vllm tp4", "hf", {"format": "vllm", "tp": 4}),
    Pair("hf → megatron tp2 pp2", "hf", {"format": "megatron", "tp": 2, "pp": 2}),
    Pair("hf → tp tp3", "hf", {"format": "tp", "tp": 3, "max_file": 1_500_000}),
    Pair("hf → hf, in shards", "hf", {"format": "hf", "max_file": 2_000_000}),
    Pair("hf → sglang tp2", "hf", {"format": "sglang", "tp": 2}),
    Pair("vllm tp4 → vllm tp2", "vllm4", {"format": "vllm", "tp": 2}),
    Pair("megatron tp2 pp2 → hf", "megatron22", {"format": "hf"}),
    Pair("megatron tp2 pp2 → megatron tp4", "megatron22", {"format": "megatron", "tp": 4}),
    Pair("tp tp3 → rank-pt tp2", "tp3", {"format": "rank-pt", "tp": 2}),
    Pair("mixtral hf → megatron tp2 ep2", "moe", {"format": "megatron", "tp": 2, "ep": 2}),
    Pair("mixtral megatron tp2 ep2 → vllm tp2", "moe-megatron", {"format": "vllm", "tp": 2}),
)


def sources(root: Path) -> dict[str, Path]:
    """The sources of ``PAIRS``, and ``other``: a small checkpoint that stands where a run shall overwrite it."""
    made = {name: root / name for name in ("hf", "vllm4", "megatron22", "tp3", "moe", "moe-megatron", "other")}
    make_model(made["hf"], LLAMA)
    make_model(made["moe"], MIXTRAL)
    make_model(made["other"], CONFIG, seed=1)
    for target, source, options in (("vllm4", "hf", {"format": "vllm", "tp": 4}), ("megatron22", "hf", {"format": "megatron", "tp": 2, "pp": 2}),
                                    ("tp3", "hf", {"format": "tp", "tp": 3}), ("moe-megatron", "moe", {"format": "megatron", "tp": 2, "ep": 2})):  # fmt: skip
        reshard.convert(made[source], made[target], fsync=False, **options)
    return made


class Child:
    """A function that runs in a forked process; what it returns comes back as JSON."""

    def __init__(self, work: Callable[[], object]):
        read, write = os.pipe()
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            code = 1
            try:
                os.close(read)
                try:
                    answer, code = {"result": work()}, 0
                except (reshard.ReshardError, OSError) as error:
                    answer = {"error": str(error), "kind": type(error).__name__}
                except BaseException as error:  # noqa: BLE001  it is what the campaign looks for
                    answer = {"error": traceback.format_exc(), "kind": f"TRACEBACK {type(error).__name__}"}
                os.write(write, json.dumps(answer).encode()[:60_000])
            finally:
                os._exit(code)
        os.close(write)
        self._read = read

    def kill_after(self, seconds: float) -> None:
        """SIGKILL, unless it ends before."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return
            time.sleep(min(0.001, max(0, until - time.monotonic())))
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> dict:
        """``result``, or ``error`` and ``kind``; ``killed`` where it died of a signal."""
        with os.fdopen(self._read, "rb") as pipe:
            text = pipe.read()
        _, status = os.waitpid(self.pid, 0)
        return (
            {"killed": os.WTERMSIG(status)}
            if os.WIFSIGNALED(status)
            else json.loads(text or b'{"error": "nothing said", "kind": "TRACEBACK"}')
        )


def same(a: Path, b: Path, ignore: tuple[str, ...] = ("journal.jsonl",)) -> bool:
    """Whether two folders hold the same files, byte for byte, and the same folders."""
    left, right = ({str(p.relative_to(x)): p for p in x.rglob("*") if p.name not in ignore} for x in (a, b))
    return left.keys() == right.keys() and all(
        p.is_dir() == right[n].is_dir() and (p.is_dir() or filecmp.cmp(p, right[n], shallow=False)) for n, p in left.items()
    )


def state_of(folder: Path, old: Path | None, new: Path) -> str:
    """absent, old, new or OTHER: what stands at a destination."""
    if not folder.exists():
        return "absent"
    if same(folder, new):
        return "new"
    return "old" if old and same(folder, old) else "OTHER"


def stamps(folder: Path) -> list:
    """What tells that a folder was not touched."""
    return sorted((str(p), s.st_size, s.st_mtime_ns, s.st_ino) for p in folder.rglob("*") for s in [p.stat()])


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
