"""The weight sync on one GPU or more, for gpu_check.py: every rank is a process of its own, started from here."""

import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from gpu_common import Bench, environment, gb
from gpu_rank import Case


def cases(b: Bench) -> list[Case]:
    if not b.cuda:
        return [Case("auto", steps=3), Case("p2p", 2, 2, verify=True, steps=3, large=1)]
    one = Case("auto", large=5)
    return [
        one,
        Case("auto", careless=True, steps=30),
        Case("mapped", 2, 2, large=5),
        Case("auto", 2, 2, verify=True, large=5),
        Case("p2p", large=2),
        Case("p2p", 2, 2, verify=True, large=2),
        Case(
            "auto", env={"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}, large=3
        ),
        Case("auto", 2, 2, apart=True, large=3),
        Case("auto", 1, 0, backend="nccl", large=3),
    ]


def sync(b: Bench) -> None:
    """Steps that are raced against, by every transport; then a large model, timed; memory at its peak and after."""
    b.model()
    with ThreadPoolExecutor(b.at_once(3, 14e9)) as pool:
        list(pool.map(lambda case: run(b, case), cases(b)))


def ipc(b: Bench) -> None:
    """How fast one process copies out of another's memory on the same GPU, in a step of 11 GB (less on a small one), against a copy
    within the device."""
    rate = b.copy_rate()
    layers = min(32, max(1, int((0.35 * b.memory - 1e9) / 0.36e9))) if b.cuda else 2
    if b.cuda:
        torch.cuda.empty_cache()
    for found in run(b, Case("mapped", steps=0, large=9, timeout=90), layers=layers):
        if found["rank"] == 1 and "rate" in found:
            share = found["rate"] / rate
            b.row(
                "one step, all in it",
                f"{gb(found['rate'])}/s, {share:.0%} of {gb(rate)}/s",
                "≥ 80 % of a copy's rate" if b.cuda else "",
                share >= 0.8 if b.cuda else None,
                share=share,
            )


def nccl(b: Bench) -> None:
    """NCCL: a send to itself by one rank; then several ranks on one GPU, which only new releases take."""
    if not b.cuda:
        b.row("not run", "NCCL needs a GPU")
        return
    torch.cuda.set_device(b.device)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("nccl", init_method=f"file://{folder}/meet", rank=0, world_size=1, timeout=timedelta(seconds=40))
        a = torch.randn(1 << 20, device=b.device)
        c = torch.zeros_like(a)
        for work in dist.batch_isend_irecv([dist.P2POp(dist.irecv, c, 0), dist.P2POp(dist.isend, a, 0)]):
            work.wait()
        b.wait()
        b.row("batched send to itself", "arrived" if torch.equal(a, c) else "WRONG", "arrived", torch.equal(a, c))
        dist.destroy_process_group()
    several = torch.cuda.device_count() >= 4
    more = {} if several else {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_NVLS_ENABLE": "0"}
    for case in (
        Case("p2p", 1, 1, backend="nccl", steps=50, large=3, timeout=45, env=more),
        Case("p2p", 2, 2, verify=True, backend="nccl", steps=50, large=3, timeout=45, env=more),
    ):
        run(b, case, expected=several)


# --------------------------------------------------------------------------------------------------------- one case, many ranks


def run(b: Bench, case: Case, layers: int | None = None, expected: bool = True) -> list[dict]:
    """Start the ranks, wait, and tell what they found; what they print goes to the log. `expected`: a failure is a defect."""
    world = case.trainers + case.engines
    config = {**b.config, "num_hidden_layers": layers or b.config["num_hidden_layers"]}
    visible = [f"GPU-{torch.cuda.get_device_properties(i).uuid}" for i in range(torch.cuda.device_count())] if b.cuda else []
    with tempfile.TemporaryDirectory(dir=b.work) as folder:
        ranks = []
        for rank in range(world):
            more = dict(case.env) | ({"CUDA_VISIBLE_DEVICES": visible[rank % len(visible)]} if case.apart and visible else {})
            order = {
                "case": asdict(case),
                "rank": rank,
                "device": b.device.type,
                "folder": folder,
                "config": config,
                "model": str(b.work / "model"),
            }
            command = [sys.executable, str(Path(__file__).with_name("gpu_rank.py")), json.dumps(order)]
            ranks.append(subprocess.Popen(command, env=environment(**more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        until, said = time.monotonic() + case.timeout, []
        with ThreadPoolExecutor(world) as pool:  # all pipes are read, or a rank that says much would wait
            said = list(pool.map(lambda process: _until(process, until), ranks))
        found = []
        for rank, (process, text) in enumerate(zip(ranks, said)):
            result = Path(folder) / f"{rank}.json"
            last = next(
                (line for line in reversed(text.strip().splitlines()) if "Error" in line), (text.strip().splitlines() or ["no output"])[-1]
            )
            failure = {"rank": rank, "error": f"rank {rank} ended with {process.returncode}: {last[:240]}"}
            found.append(json.loads(result.read_text()) if result.exists() else failure)
            if process.returncode or text.strip():
                print(f"--- {case.name}, rank {rank}, exit code {process.returncode}\n{text[-3000:]}", flush=True)
    _tell(b, case, found, expected)
    return found


def _until(process: subprocess.Popen, until: float) -> str:
    try:
        return process.communicate(timeout=max(until - time.monotonic(), 1))[0]
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()[0] + "\nError: not done in time"


def _tell(b: Bench, case: Case, found: list[dict], expected: bool) -> None:
    errors = [one["error"] for one in found if one.get("error")]
    if errors:
        b.row(case.name, "; ".join(errors)[:400], "no error" if expected else "", False if expected else None)
        return
    takers = [one for one in found if "wrong" in one]
    if case.steps:
        wrong, steps, checked = (
            sum(one["wrong"] for one in takers),
            min(one["steps"] for one in takers),
            sum(one["checked"] for one in takers),
        )
        value = f"{wrong} elements of another step in {steps} steps ({checked / 1e9:.3g} billion looked at); "
        value += f"{max(one['ms'] for one in takers):.2f} ms a step"
        if case.careless:
            b.row(case.name, value, "some: the check sees them", wrong > 0, wrong=wrong, steps=steps)
        else:
            b.row(case.name, value, f"0 in {case.steps}", wrong == 0 and steps == case.steps, wrong=wrong, steps=steps)
    for one in takers:
        if "rate" in one:
            value = (
                f"rank {one['rank']}: {gb(one['size'])} in {one['seconds'] * 1e3:.2f} ms, {gb(one['rate'])}/s; mapped {gb(one['mapped'])}, "
            )
            value += f"messages {gb(one['taken'])}, local {gb(one['local'])}; bits {one['bits']}" + (
                f"; {one['note']}" if one["note"] else ""
            )
            compared = one["bits"] != "not compared"
            b.row(f"{case.name}: large", value, "bits equal" if compared else "", one["bits"] == "equal" if compared else None)
    if b.cuda and case.large:
        peak = max(found, key=lambda one: one["peak"])
        value = f"at most {gb(peak['peak'])} at rank {peak['rank']}, whose tensors take {gb(peak['held'])}; "
        b.row(f"{case.name}: memory", value + f"staging {gb(max(one['staging'] for one in found))}")
        left = [f"rank {one['rank']} {one['left'] >> 20} MiB" for one in found]
        b.row(f"{case.name}: held when all is deleted", ", ".join(left), "≤ 64 MiB", all(one["left"] <= 64 << 20 for one in found))
