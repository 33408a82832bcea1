"""Time conversions against `cp`, alternating in one run, and print ratios and peak memory as a Markdown table.

    python scripts/bench_convert.py FOLDER [--layers 16] [--runs 5] [--peers] [--memory]

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
DCP = """import sys, torch.distributed.checkpoint as dcp; from pathlib import Path; from safetensors.torch import load_file
dcp.save({k: v for f in Path(sys.argv[1]).glob('*.safetensors') for k, v in load_file(f).items()}, checkpoint_id=sys.argv[2], no_dist=True)"""


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


def ratio(ours: list[float], theirs: list[float]) -> str:
    """Median against median, and the best of ours against the best of theirs: the machine's noise is one-sided."""
    return f"{statistics.median(ours) / statistics.median(theirs):.2f} ({min(ours) / min(theirs):.2f})"


def speed(root: Path, runs: int) -> None:
    """Every case against cp, alternating."""
    print("ratios to cp: median (best)\n")
    print("| conversion | durable, whole | durable, inside | no fsync, whole | no fsync, inside | seconds, no fsync | cp | peak memory |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, source, _, options in CASES:
        rows = {key: Timing() for key in ("cp+sync", "durable", "cp", "fast")}
        command = [*RESHARD, "convert", str(root / source), str(root / "out"), *options, "--json"]
        copy = ["cp", "-r", str(root / source), str(root / "out")]
        for _ in range(runs):
            measure(["sh", "-c", f"{' '.join(copy)} && sync -f {root / 'out'}"], root / "out", rows["cp+sync"])
            measure(command, root / "out", rows["durable"])
            measure(copy, root / "out", rows["cp"])
            measure([*command, "--no-fsync"], root / "out", rows["fast"])
        slow, fast, cp, cps = rows["durable"], rows["fast"], rows["cp"].whole, rows["cp+sync"].whole
        print(f"| {name} | {ratio(slow.whole, cps)} | {ratio(slow.inside, cps)} | {ratio(fast.whole, cp)} | {ratio(fast.inside, cp)} "
              f"| {statistics.median(fast.whole):.2f} | {statistics.median(cp):.2f} | {max(slow.peak, fast.peak) / 1e6:.0f} MB |", flush=True)  # fmt: skip


def peers(root: Path, runs: int) -> None:
    """What others take for moving the same bytes."""
    subprocess.run([sys.executable, "-c", DCP, str(root / "hf"), str(root / "dcp")], check=True, stderr=subprocess.DEVNULL)
    accelerate = [str(Path(sys.executable).with_name("accelerate")), "merge-weights", str(root / "dcp"), str(root / "out")]
    cases = (("transformers from_pretrained + save_pretrained (HF → HF)", [sys.executable, "-c", SAVE, str(root / "hf"), str(root / "out")]),
             ("accelerate merge-weights (DCP → HF)", accelerate))  # fmt: skip
    for name, command in cases:
        peer, copy = Timing(), Timing()
        for _ in range(runs):
            measure(["cp", "-r", str(root / "hf"), str(root / "out")], root / "out", copy)
            measure(command, root / "out", peer)
        print(
            f"| {name} | | | {ratio(peer.whole, copy.whole)} | | {statistics.median(peer.whole):.2f} | {statistics.median(copy.whole):.2f} | {peer.peak / 1e6:.0f} MB |",
            flush=True,
        )
    shutil.rmtree(root / "dcp")


def memory(root: Path) -> None:
    """Peak memory of every case at three sizes, and of a cast, for which torch is imported."""
    print("\n| peak memory | " + " | ".join(f"{make_size} layers" for make_size in (1, 16, 40)) + " |\n| --- | --- | --- | --- |")
    cases = [*CASES, ("HF → HF fp32 (imports torch)", "hf", "", ["--to", "hf", "--dtype", "fp32"])]
    peaks: dict[str, list[int]] = {name: [] for name, *_ in cases}
    sizes = []
    for layers in (1, 16, 40):
        sizes.append(prepare(root, layers))
        for name, source, _, options in cases:
            timing = Timing()
            measure([*RESHARD, "convert", str(root / source), str(root / "out"), *options, "--json", "--no-fsync"], root / "out", timing)
            peaks[name].append(timing.peak)
    print("| size | " + " | ".join(f"{size / 1e9:.1f} GB" for size in sizes) + " |")
    for name, row in peaks.items():
        print(f"| {name} | " + " | ".join(f"{peak / 1e6:.0f} MB" for peak in row) + " |", flush=True)


def prepare(root: Path, layers: int) -> int:
    """The sources: a checkpoint of so many layers, and its vLLM and Megatron shards. Returns its bytes."""
    shutil.rmtree(root, ignore_errors=True)
    size = make(root / "hf", layers)
    for target, options in (("vllm-tp4", CASES[0][3]), ("megatron-tp2", ["--to", "megatron", "--tp", "2"])):
        subprocess.run([*RESHARD, "convert", str(root / "hf"), str(root / target), *options, "-q"], check=True)
    return size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--peers", action="store_true", help="time transformers and accelerate too")
    parser.add_argument("--memory", action="store_true", help="peak memory at 1, 3 and 6 GB instead of times")
    args = parser.parse_args()
    if args.memory:
        memory(args.folder)
    else:
        size = prepare(args.folder, args.layers)
        print(f"{size / 1e9:.2f} GB, {args.layers} layers, {os.cpu_count()} cores, {args.runs} alternating runs")
        speed(args.folder, args.runs)
        if args.peers:
            peers(args.folder, max(2, args.runs // 2))
    shutil.rmtree(args.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
