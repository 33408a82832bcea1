"""One rank's shard from a Hub on loopback: `reshard convert hf://… --rank 0` against snapshot_download and slicing.

    python scripts/bench_hub.py FOLDER [--layers 16] [--runs 3] [--rate 100MB/s]

The Hub is tests/hubserver.py in a process of its own, with a line of `--rate` (0: as fast as it can, which is the machine's
speed and not a network's). The peer is what one does without reshard: huggingface_hub downloads the snapshot, safetensors'
get_slice cuts rank 0 of TP8, save_file writes it. Both results must hold the same tensors, bit for bit. Alternating runs.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from bench_checkpoint import make

PEER = """
import json, sys
from pathlib import Path
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file
import torch
folder, out, tp, rank = Path(snapshot_download("org/model")), Path(sys.argv[1]), 8, 0
files = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
opened = {file: safe_open(folder / file, "pt") for file in set(files.values())}
def cut(name, dim):
    part = opened[files[name]].get_slice(name)
    size = part.get_shape()[dim] // tp
    return part[rank * size : (rank + 1) * size] if dim == 0 else part[:, rank * size : (rank + 1) * size]
state = {}
for name in files:
    if "q_proj" in name:
        state[name.replace("q_proj", "qkv_proj")] = torch.cat([cut(name.replace("q_proj", p), 0) for p in ("q_proj", "k_proj", "v_proj")])
    elif "gate_proj" in name:
        state[name.replace("gate_proj", "gate_up_proj")] = torch.cat([cut(name.replace("gate_proj", p), 0) for p in ("gate_proj", "up_proj")])
    elif "o_proj" in name or "down_proj" in name:
        state[name] = cut(name, 1).contiguous()
    elif "embed_tokens" in name or "lm_head" in name:
        state[name] = cut(name, 0)
    elif "norm" in name:
        state[name] = opened[files[name]].get_tensor(name)
out.mkdir()
save_file(state, out / "model-rank-0-part-0.safetensors")
"""
SAME = """
import sys, torch
from safetensors.torch import load_file
a, b = (load_file(f"{folder}/model-rank-0-part-0.safetensors") for folder in sys.argv[1:3])
assert set(b) <= set(a), set(b) - set(a)
assert all(torch.equal(a[name], b[name]) for name in b), "the shards differ"
print(f"{len(b)} tensors equal; reshard's file has the engine's {len(set(a) - set(b))} constants besides")
"""


def serve(folder: Path, source: Path, rate: float, pipe) -> None:
    """The Hub's process: says where it is, then how many bytes it sent each time it is asked."""
    from hubserver import Hub

    with Hub(folder, rate=rate) as hub:
        hub.add_folder("org/model", source)
        pipe.send(hub.url)
        while pipe.recv() == "sent":
            pipe.send((hub.sent(), len(hub.log)))
            hub.clear()


def held(folder: Path) -> int:
    """Bytes on disk under `folder`, each file once."""
    return sum(p.stat().st_blocks * 512 for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rate", default="100MB/s")
    args = parser.parse_args()
    from reshard.cli import Size

    rate = Size().convert(args.rate, None, None)
    shutil.rmtree(args.folder, ignore_errors=True)
    size = make(args.folder / "source", args.layers)
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(
        target=serve, args=(args.folder / "hub", args.folder / "source", rate, theirs), daemon=True
    )
    server.start()
    env = {**os.environ, "HF_ENDPOINT": ours.recv(), "HF_HOME": str(args.folder / "home"), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1",
           "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1,localhost"}  # fmt: skip
    commands = {
        "reshard convert hf://… --rank 0": [
            sys.executable,
            "-m",
            "reshard",
            "convert",
            "hf://org/model",
            str(args.folder / "out-reshard"),
            "--to",
            "vllm",
            "--tp",
            "8",
            "--rank",
            "0",
            "-q",
        ],
        "snapshot_download + slicing": [sys.executable, "-c", PEER, str(args.folder / "out-peer")],
    }
    rows = {name: [] for name in commands}
    for _ in range(args.runs):
        for name, command in commands.items():
            for used in ("home", "out-reshard" if "reshard" in name else "out-peer"):
                shutil.rmtree(args.folder / used, ignore_errors=True)
            os.sync()
            began = time.perf_counter()
            process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - began
            if os.waitstatus_to_exitcode(status):
                raise SystemExit(f"{name} failed")
            ours.send("sent")
            sent, requests = ours.recv()
            out = args.folder / ("out-reshard" if "reshard" in name else "out-peer")
            rows[name].append((sent, requests, seconds, usage.ru_maxrss * 1024, held(out) + held(args.folder / "home")))
    same = subprocess.run(
        [sys.executable, "-c", SAME, str(args.folder / "out-reshard"), str(args.folder / "out-peer")],
        capture_output=True,
        text=True,
        check=False,
    )
    if same.returncode:
        raise SystemExit(same.stderr)
    job = subprocess.run([sys.executable, "-m", "reshard", "plan", str(args.folder / "source"), "--to", "vllm", "--tp", "8", "--rank", "0", "--json"],
                         env=env, capture_output=True, text=True, check=True)  # fmt: skip
    needed = json.loads(job.stdout)["least_bytes_read"]
    print(
        f"{size / 1e9:.2f} GB of weights, {needed / 1e9:.3f} GB of them rank 0's; {args.runs} alternating runs, a line of {args.rate}; {same.stdout.strip()}\n"
    )
    print("| | bytes sent | requests | seconds | peak memory | disk |\n| --- | --- | --- | --- | --- | --- |")
    for name, runs in rows.items():
        sent, requests, seconds, peak, disk = (statistics.median(column) for column in zip(*runs))
        print(f"| {name} | {sent / 1e9:.3f} GB | {requests:.0f} | {seconds:.1f} | {peak / 1e6:.0f} MB | {disk / 1e9:.2f} GB |")
    first, second = ([statistics.median(column) for column in zip(*runs)] for runs in rows.values())
    print(
        f"| ratio | {first[0] / second[0]:.2f} | | {first[2] / second[2]:.2f} | {first[3] / second[3]:.2f} | {first[4] / second[4]:.2f} |"
    )
    ours.send("stop")
    shutil.rmtree(args.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
