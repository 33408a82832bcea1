"""Time conversions against `cp`, alternating in one run, and print ratios and peak memory as a Markdown table.

    python scripts/bench_convert.py FOLDER [--layers 16] [--runs 5] [--peers]

Makes a bf16 checkpoint of Llama-1B's shape in FOLDER (3.0 GB at 16 layers). Two comparisons, each like with like:
durable (reshard's default, fsync) against `cp -r` + `sync -f`, and --no-fsync against plain `cp -r`. Before each timing
all earlier dirty pages are written out, so that no run pays for the one before it.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from bench_checkpoint import make

RESHARD = [sys.executable, "-m", "reshard"]
CASES = (  # name, source, target, options
    ("HF → vLLM TP4", "hf", "vllm-tp4", ["--to", "vllm", "--tp", "4"]),
    ("HF → Megatron TP4", "hf", "megatron-tp4", ["--to", "megatron", "--tp", "4"]),
    ("vLLM TP4 → TP2", "vllm-tp4", "vllm-tp2", ["--to", "vllm", "--tp", "2"]),
    ("Megatron TP2 → HF", "megatron-tp2", "hf-back", ["--to", "hf"]),
)
SAVE = "import sys, torch; from transformers import AutoModelForCausalLM as M; M.from_pretrained(sys.argv[1], dtype=torch.bfloat16).save_pretrained(sys.argv[2])"


@dataclass
class Timing:
    """Seconds of the whole command and inside it, and peak resident bytes, of each run."""

    whole: list[float] = field(default_factory=list)
    inside: list[float] = field(default_factory=list)
    peak: int = 0


def measure(command: list[str], out: Path, timing: Timing) -> None:
    """Run `command`, which writes `out`, on clean caches of dirty pages; note how long it took and what it held."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    timing.whole.append(time.perf_counter() - began)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}\n{text}")
    timing.inside.append(json.loads(text)["seconds"] if text.startswith("{") else timing.whole[-1])
    timing.peak = max(timing.peak, usage.ru_maxrss * 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--peers", action="store_true", help="time transformers' from_pretrained + save_pretrained too")
    args = parser.parse_args()
    root: Path = args.folder
    shutil.rmtree(root, ignore_errors=True)
    size = make(root / "hf", args.layers)
    for source, target, options in (("hf", "vllm-tp4", CASES[0][3]), ("hf", "megatron-tp2", ["--to", "megatron", "--tp", "2"])):
        subprocess.run([*RESHARD, "convert", str(root / source), str(root / target), *options, "-q"], check=True)
    print(f"{size / 1e9:.2f} GB, {args.layers} layers, {os.cpu_count()} cores, medians of {args.runs} alternating runs\n")
    print("| conversion | durable: whole / inside | no fsync: whole / inside | seconds (no fsync) | peak memory |")
    print("| --- | --- | --- | --- | --- |")
    for name, source, target, options in CASES:
        rows = {key: Timing() for key in ("cp+sync", "durable", "cp", "fast")}
        command = [*RESHARD, "convert", str(root / source), str(root / "out"), *options, "--json"]
        copy = ["cp", "-r", str(root / source), str(root / "out")]
        for _ in range(args.runs):
            measure(["sh", "-c", f"{' '.join(copy)} && sync -f {root / 'out'}"], root / "out", rows["cp+sync"])
            measure(command, root / "out", rows["durable"])
            measure(copy, root / "out", rows["cp"])
            measure([*command, "--no-fsync"], root / "out", rows["fast"])
        mid = {key: (statistics.median(t.whole), statistics.median(t.inside)) for key, t in rows.items()}
        peak = max(rows["durable"].peak, rows["fast"].peak)
        print(f"| {name} | {mid['durable'][0] / mid['cp+sync'][0]:.2f} / {mid['durable'][1] / mid['cp+sync'][0]:.2f} × cp "
              f"| {mid['fast'][0] / mid['cp'][0]:.2f} / {mid['fast'][1] / mid['cp'][0]:.2f} × cp "
              f"| {mid['fast'][0]:.2f} (cp {mid['cp'][0]:.2f}; durable {mid['durable'][0]:.2f}, cp {mid['cp+sync'][0]:.2f}) | {peak / 1e6:.0f} MB |", flush=True)  # fmt: skip
    if args.peers:
        peer, copy = Timing(), Timing()
        for _ in range(max(2, args.runs // 2)):
            measure(["cp", "-r", str(root / "hf"), str(root / "out")], root / "out", copy)
            measure([sys.executable, "-c", SAVE, str(root / "hf"), str(root / "out")], root / "out", peer)
        ratio = statistics.median(peer.whole) / statistics.median(copy.whole)
        print(f"| transformers from_pretrained + save_pretrained (HF → HF) | | {ratio:.2f} × cp | {statistics.median(peer.whole):.2f} | {peer.peak / 1e6:.0f} MB |")
    shutil.rmtree(root / "out", ignore_errors=True)


if __name__ == "__main__":
    main()
