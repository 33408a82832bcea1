"""The parts of gpu_check.py, each run by itself: python scripts/gpu_parts.py PART --device cuda --work DIR --rows FILE."""

import argparse
import os
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
from gpu_common import ROOT, Bench, environment, gb, last, reshard
from gpu_verify import cuts, verify


def env(b: Bench) -> None:
    """What this machine is, and the ceilings that other parts are held against."""
    b.row("python, torch", f"{sys.version.split()[0]}, {torch.__version__}, {os.cpu_count()} cores")
    names = ("TF32", "NCCL", "PYTORCH", "CUDA_VISIBLE")
    b.row("environment", ", ".join(f"{k}={v}" for k, v in sorted(os.environ.items()) if any(n in k for n in names)) or "nothing set")
    if b.cuda:
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        driver = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
        b.row("CUDA, NCCL, driver", f"{torch.version.cuda}, {nccl}, {driver}", nccl=nccl)
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            b.row(f"GPU {i}", f"{p.name}, {p.total_memory >> 30} GiB, uuid {p.uuid} ({type(p.uuid).__name__})")
        b.row("TF32 at the start", f"matmul {torch.backends.cuda.matmul.allow_tf32}, cudnn {torch.backends.cudnn.allow_tf32}")
    rate = b.copy_rate()
    b.row("copy within the device", f"{gb(rate)}/s (bytes counted once)", rate=rate)
    if b.cuda:
        for case, rate in host_rates(b).items():
            b.row(case, f"{gb(rate)}/s", rate=rate)


def host_rates(b: Bench) -> dict[str, float]:
    """Bytes per second between host and device, of one large copy."""
    on = torch.empty(1 << 30, dtype=torch.uint8, device=b.device)
    ordinary = torch.ones(1 << 30, dtype=torch.uint8)
    locked = ordinary.pin_memory()
    n = on.numel()
    return {
        "host to device, pageable": n / b.seconds(lambda: on.copy_(ordinary)),
        "host to device, page-locked": n / b.seconds(lambda: on.copy_(locked, non_blocking=True)),
        "device to host, page-locked": n / b.seconds(lambda: locked.copy_(on, non_blocking=True)),
    }


def foreach(b: Bench) -> None:
    """Whether torch's _foreach_copy_ casts each tensor to its own destination's dtype, and the sync's copies do."""
    from reshard.sync.staging import Copies

    values = [torch.randn(64, device=b.device) for _ in range(3)]

    def rooms() -> list[torch.Tensor]:
        return [torch.zeros(64, dtype=d, device=b.device) for d in (torch.bfloat16, torch.float32, torch.bfloat16)]

    def right(into: list[torch.Tensor]) -> bool:
        return all(torch.equal(x, y.to(x.dtype)) for x, y in zip(into, values))

    into = rooms()
    torch._foreach_copy_(into, values)
    b.row("torch's own, mixed dtypes", "right" if right(into) else "wrong: this torch casts all as the first")
    into = rooms()
    copies = Copies()
    for x, y in zip(into, values):
        copies.add(x, y)
    copies.run()
    b.row("a sync's copies, mixed dtypes", "right" if right(into) else "WRONG", "right", right(into))


def fp8(b: Bench) -> None:
    """The same weight quantised here and on the CPU: scales and values, bit for bit."""
    from reshard.sync.fp8 import quantise
    from reshard.sync.fp8_blocks import Blocks

    size = 4096 if b.cuda else 256
    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    for kind in (torch.float32, torch.bfloat16):
        w, blocks = weight.to(kind), Blocks(size, size, 128)
        values, scales = quantise(w, blocks)
        there, scales_there = quantise(w.to(b.device), blocks)
        off = int((scales.view(torch.int32) != scales_there.cpu().view(torch.int32)).sum())
        bytes_off = int((values.view(torch.uint8) != there.cpu().view(torch.uint8)).sum())
        b.row(
            f"{kind}, {size}²",
            f"{off} of {scales.numel()} scales, {bytes_off} of {values.numel()} values differ",
            "none differs",
            off == bytes_off == 0,
        )
        on = w.to(b.device)
        b.row(f"{kind}, speed", f"{gb(on.nbytes / b.seconds(partial(quantise, on, blocks)))}/s read")


def model(b: Bench) -> None:
    """The model on disk, as other parts want it, cut three ways."""
    began = time.perf_counter()
    folder = b.model()
    size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    b.row(
        "made",
        f"{gb(size)}, {b.config['num_hidden_layers']} layers of {b.config['hidden_size']}, {time.perf_counter() - began:.1f} s",
        bytes=size,
    )
    for name, options in cuts(b).items():
        began = time.perf_counter()
        done = reshard("convert", folder, b.work / name, *options, "-q")
        b.row(
            f"cut: {' '.join(options)}",
            f"{time.perf_counter() - began:.1f} s" if not done.returncode else last(done),
            "done",
            not done.returncode,
        )


def load(b: Bench) -> None:
    """load(device=…) against the CPU's bytes, against a whole rank in ordinary memory, and against the host's ceilings."""
    from reshard.api import load as load_

    folder, at = b.model(), str(b.device)
    torch.ones(1, device=b.device)  # CUDA's own memory is not the load's
    targets = [{"format": "vllm"}, {"format": "megatron", "tp": 4, "rank": 3}, {"format": "vllm", "tp": 2, "rank": 1}]

    def timed(**options) -> tuple[float, dict]:
        began = time.perf_counter()
        state = load_(folder, **options)
        b.wait()
        return time.perf_counter() - began, state

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    first, state = timed(device=at, **targets[0])
    size = sum(t.nbytes for t in state.values())
    del state
    held = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before
    b.row(
        "host memory, the whole model",
        f"{gb(held)} resident more than before, for {gb(size)} of weights",
        "≤ 0.6 GB",
        held < 0.6e9,
        bytes=held,
    )
    rates = host_rates(b) if b.cuda else {}
    for target in targets:
        name = " ".join(str(v) for v in target.values())
        fast, state = min((timed(device=at, **target) for _ in range(2)), key=lambda one: one[0])
        size = sum(t.nbytes for t in state.values())
        began = time.perf_counter()
        plain = load_(folder, **target)
        middle = time.perf_counter()
        moved = {k: t.to(b.device) for k, t in plain.items()}
        b.wait()
        slow = time.perf_counter() - began
        same = list(moved) == list(state) and all(
            torch.equal(state[k].view(-1).view(torch.uint8), moved[k].view(-1).view(torch.uint8)) for k in moved
        )
        b.row(f"{name}: bits", "equal to the CPU's" if same else "DIFFERENT", "equal", same)
        value = f"{gb(size)}: {gb(size / fast)}/s; CPU alone {gb(size / (middle - began))}/s, CPU then .to(device) {gb(size / slow)}/s"
        b.row(f"{name}: speed", value, "faster than by way of the CPU", not b.cuda or fast < slow, rate=size / fast, before=size / slow)
        for ceiling, rate in rates.items():
            if ceiling.startswith("host to device"):
                b.row(f"{name}: share of {ceiling}", f"{size / fast / rate:.0%} of {gb(rate)}/s")
        del state, plain, moved
    b.row("first call of a process", f"{gb(size_of(folder) / first)}/s, CUDA's start and page-locking in it")
    for jobs in (1, 2, 4, 8, 16) if b.cuda else (2,):
        taken, state = timed(device=at, jobs=jobs, **targets[0])
        b.row(f"vllm whole, {jobs} threads", f"{gb(sum(t.nbytes for t in state.values()) / taken)}/s")
        del state


def size_of(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.glob("*.safetensors"))


def pack(b: Bench) -> None:
    """Packing messages from a trainer's tensors and unpacking them into an engine's, against a copy within the device."""
    from gpu_rank import sides, tensors

    from reshard import sync
    from reshard.sync.messages import rank_plan
    from reshard.sync.staging import Peers, Staging
    from reshard.sync.tensors import bind

    rate = b.copy_rate()
    for trainers, engines in ((4, 4), (4, 2), (2, 4), (1, 1)):
        src, dst = sides(b.config, trainers, engines)
        plan = sync.plan(src, dst)
        for role, rank, side in (("pack", 0, src), ("unpack", trainers, dst)):
            bound = bind(tensors(side, rank, b.device, 1), side, rank, "source" if role == "pack" else "destination")
            source, into = (bound, {}) if role == "pack" else ({}, bound)
            staging = Staging(rank_plan(plan, rank), source, into, b.device, Peers())
            runs = [getattr(here, role) for here in staging.rounds]
            size, count = sum(v.nbytes for c in runs for v in c.values), sum(len(c.values) for c in runs)
            straight = sum(p.bytes.numel() for r in staging.rounds for p in (r.sends if role == "pack" else r.takes) if p.straight)
            seconds = b.seconds(lambda runs=runs: [c.run() for c in runs], 9) if count else 0
            share = size / seconds / rate if count else 1
            value = f"{gb(size)} in {count} copies, {seconds * 1e3:.2f} ms, {share:.0%} of {gb(rate)}/s; "
            value += f"{gb(straight)} straight; buffers {staging.bytes >> 20} MiB"
            large = b.cuda and size > 1e8
            b.row(
                f"TP{trainers} to TP{engines}: {role}",
                value,
                "≥ 60 % of a copy's rate" if large else "",
                share >= 0.6 if large else None,
                share=share,
                bytes=size,
            )
            del bound, source, into, staging, runs


def tests(b: Bench) -> None:
    """The tests that are marked for a GPU."""
    file = ROOT / "tests/test_gpu.py"
    if not file.exists():
        b.row("tests/test_gpu.py", "not there")
        return
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", str(file)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(),
        check=False,
    )
    print(done.stdout[-6000:], done.stderr[-2000:], flush=True)
    b.row("tests/test_gpu.py", last(done), "all passed", done.returncode == 0)


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout.strip().splitlines()[0]
    except (OSError, IndexError, subprocess.TimeoutExpired):
        return "unknown"


def main() -> None:
    import gpu_sync

    parts = {f.__name__: f for f in (env, foreach, fp8, model, load, pack, verify, tests, gpu_sync.ipc, gpu_sync.sync, gpu_sync.nccl)}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=parts)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--work", default="/tmp/gpu-check")
    parser.add_argument("--rows", default="/dev/stdout")
    parser.add_argument("--layers", type=int)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        Bench(args).row("not run", f"torch {torch.__version__} sees no GPU here")
        return
    parts[args.part](Bench(args))


if __name__ == "__main__":
    main()
