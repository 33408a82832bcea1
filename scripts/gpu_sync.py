"""The weight sync on one GPU or more, for gpu_check.py: every rank is a process of its own, started from here.

Trainer ranks overwrite their weights as soon as ``send`` returns, and write the next step's with a kernel that is still
running when it is called: an engine that reads too early, or too late, holds an element of another step.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from gpu_common import LLAMA, Bench, environment, gb

_CYCLE = 15  # steps after which the numbers in the weights repeat: 1 to 15, and an eighth for each sender, which bf16 tells apart


@dataclass(frozen=True)
class Case:
    """`trainers` Megatron ranks and `engines` vLLM ranks. `steps` of a small model are checked for elements of another step,
    `large` of a large one are timed. `apart`: each process sees the one GPU that it is to use, by uuid."""

    transport: str
    trainers: int = 1
    engines: int = 1
    verify: bool = False
    backend: str = "gloo"
    apart: bool = False
    careless: bool = False  # control: nobody waits for the GPU, which the check must see
    steps: int = 200
    large: int = 0
    timeout: int = 100  # seconds
    env: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        extra = (
            [", sums compared"] * self.verify
            + [", CUDA_VISIBLE_DEVICES by uuid"] * self.apart
            + [f", {k}={v}" for k, v in self.env.items()]
        )
        return f"{self.transport}, {self.trainers} to {self.engines}, {self.backend}{''.join(extra)}"


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
    with ThreadPoolExecutor(2 if b.cuda else 1) as pool:
        list(pool.map(lambda case: run(b, case), cases(b)))


def ipc(b: Bench) -> None:
    """How fast one process copies out of another's memory on the same GPU, in a step of 11 GB, against a copy within the device."""
    rate = b.copy_rate()
    if b.cuda:
        torch.cuda.empty_cache()
    for found in run(b, Case("mapped", steps=0, large=9, timeout=90), layers=32 if b.cuda else 2):
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
                "layers": layers,
                "model": str(b.work / "model"),
            }
            command = [sys.executable, str(Path(__file__)), json.dumps(order)]
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
        value = f"{wrong} elements of another step in {steps} steps ({checked / 1e9:.3g} billion looked at); {max(one['ms'] for one in takers):.2f} ms a step"
        if case.careless:
            b.row(case.name, value, "some: the check sees them", wrong > 0, wrong=wrong, steps=steps)
        else:
            b.row(case.name, value, f"0 in {case.steps}", wrong == 0 and steps == case.steps, wrong=wrong, steps=steps)
    for one in takers:
        if "rate" in one:
            value = f"rank {one['rank']}: {gb(one['size'])} in {one['seconds'] * 1e3:.2f} ms, {gb(one['rate'])}/s; mapped {gb(one['mapped'])}, messages {gb(one['taken'])}, local {gb(one['local'])}; bits {one['bits']}"
            compared = one["bits"] != "not compared"
            b.row(f"{case.name}: large", value, "bits equal" if compared else "", one["bits"] == "equal" if compared else None)
    if b.cuda and case.large:
        peak = max(found, key=lambda one: one["peak"])
        b.row(
            f"{case.name}: memory",
            f"at most {gb(peak['peak'])} at rank {peak['rank']}, whose tensors take {gb(peak['held'])}; staging {gb(max(one['staging'] for one in found))}",
        )
        left = [f"rank {one['rank']} {one['left'] >> 20} MiB" for one in found]
        b.row(f"{case.name}: held when all is deleted", ", ".join(left), "≤ 64 MiB", all(one["left"] <= 64 << 20 for one in found))


# ------------------------------------------------------------------------------------------------------------------- one rank


def sides(config: dict, trainers: int, engines: int):
    """(trainer, engine) sides; with no engine ranks of its own, the engine is on the trainer's."""
    from reshard import sync as s

    layout = s.layout(config)
    width = engines or trainers
    places = range(trainers, trainers + engines) if engines else range(trainers)
    return s.Side.placed(layout, "megatron", tp=trainers, ranks=range(trainers)), s.Side.placed(layout, "vllm", tp=width, ranks=places)


def tensors(side, rank: int, device: torch.device, seed: int | None = None) -> dict[str, torch.Tensor]:
    """What `rank` holds: random numbers, or zeros."""
    random = torch.Generator(device).manual_seed(seed or 0)
    out = {}
    for s in side.held_by(rank):
        out[s.name] = torch.zeros(s.shape, dtype=torch.bfloat16, device=device)
        if seed is not None:
            out[s.name].normal_(generator=random)
    return out


class Rank:
    """One process of a case."""

    def __init__(self, order: dict):
        self.case, self.rank, self.order = Case(**order["case"]), order["rank"], order
        self.cuda = order["device"] == "cuda"
        if self.cuda:
            self.device = torch.device("cuda", self.rank % torch.cuda.device_count())
            torch.cuda.set_device(self.device)
        else:
            torch.set_num_threads(1)
            self.device = torch.device("cpu")
        self.trains, self.takes = self.rank < self.case.trainers, self.rank >= self.case.trainers or not self.case.engines
        self.found: dict = {"rank": self.rank, "peak": 0, "held": 0, "left": 0, "staging": 0}

    def step(self, s, mine, into, version: int):
        if mine is not None and into is not None:
            return s.exchange(mine, into, version=version)
        return s.send(mine, version=version) if mine is not None else s.recv(into, version=version)

    def start(self, config: dict, seed: int | None = None):
        """(Sync, trainer's tensors, engine's tensors) of a model."""
        from reshard import sync as s

        src, dst = sides(config, self.case.trainers, self.case.engines)
        mine = tensors(src, self.rank, self.device, seed) if self.trains else None
        into = tensors(dst, self.rank, self.device) if self.takes else None
        return s.Sync(s.plan(src, dst), transport=self.case.transport, verify=self.case.verify, timeout=40), mine, into

    def race(self, config: dict) -> None:
        """Steps of one number for each step and sender, written late and overwritten early."""
        s, mine, into = self.start(config)
        if self.case.careless and self.cuda:
            torch.cuda.synchronize = torch.cuda.Stream.synchronize = torch.cuda.Event.synchronize = lambda *some: None
        size = 4096 if self.cuda else 64
        busy, wrong, checked, taken = (
            torch.randn(size, size, device=self.device),
            torch.zeros((), dtype=torch.int64, device=self.device),
            0,
            [],
        )
        for step in range(1, self.case.steps + 1):
            number = 1 + step % _CYCLE
            if mine is not None:
                for _ in range(8):  # some 20 ms of an H200 before the weights are written
                    busy = torch.mm(busy, busy).clamp_(-1, 1)
                for t in mine.values():
                    t.fill_(number + (self.rank / 8 if t.dim() > 1 else 0))  # replicas, which vectors are, must be equal
            stats = self.step(s, mine, into, step)
            if mine is not None:
                for t in mine.values():
                    t.fill_(-1)
            if into is not None:
                taken.append(stats.seconds)
                for t in into.values():
                    wrong += ((t < number) | (t >= number + 1)).sum()
                    checked += t.numel()
        if into is not None:
            padding = sum(
                x.padding for x in s.plan.destinations[0].held_by(self.rank) if x.name in into
            )  # zero by design, and in no step's range
            self.found |= {
                "wrong": int(wrong) - padding * self.case.steps,
                "steps": len(taken),
                "checked": checked,
                "ms": 1e3 * sorted(taken)[len(taken) // 2],
            }

    def time(self, config: dict) -> None:
        """A model whose bits are known, `large` times."""
        from reshard.api import load

        s, mine, into = self.start(config, seed=1 + self.rank)
        folder, known = Path(self.order["model"]), False
        if not self.order["layers"] and (folder / "config.json").exists():
            known = json.loads((folder / "config.json").read_text()) == config
        if known and mine is not None:
            for name, t in load(folder, format="megatron", tp=self.case.trainers, rank=self.rank, device=str(self.device)).items():
                mine[name].copy_(t) if name in mine else None
        taken, size = [], sum(t.nbytes for t in (into or {}).values())
        for step in range(self.case.large):
            stats = self.step(s, mine, into, step + 1)
            taken.append(stats.seconds)
        self.found["staging"] = stats.staging
        if into is not None:
            seconds = sorted(taken[1:] or taken)[len(taken[1:]) // 2]  # the first makes buffers and opens peers' memory
            bits = "not compared"
            if known:
                width = self.case.engines or self.case.trainers
                wanted = load(folder, format="vllm", tp=width, rank=self.rank - self.case.trainers if self.case.engines else self.rank)
                bits = (
                    "equal"
                    if all(torch.equal(wanted[n].view(torch.int16), t.cpu().view(torch.int16)) for n, t in into.items())
                    else "DIFFERENT"
                )
            self.found.setdefault("wrong", 0)
            self.found |= {
                "size": size,
                "seconds": seconds,
                "rate": size / seconds,
                "mapped": stats.mapped,
                "taken": stats.taken,
                "local": stats.local,
                "bits": bits,
            }
        self.found["held"] = size + sum(t.nbytes for t in (mine or {}).values())

    def leave(self) -> None:
        """What is still held when tensors and syncs are gone: engines let go first, then trainers."""
        for turn in (self.takes, self.trains):
            if turn and self.cuda:
                gc.collect()
                torch.cuda.ipc_collect()
                torch.cuda.synchronize()
            dist.barrier()
        if self.cuda:
            gc.collect()
            torch.cuda.ipc_collect()
            torch.cuda.empty_cache()
            self.found |= {"peak": torch.cuda.max_memory_allocated(), "left": torch.cuda.memory_allocated()}

    def run(self) -> None:
        folder = Path(self.order["folder"])
        case, world = self.case, self.case.trainers + self.case.engines
        dist.init_process_group(
            case.backend, init_method=f"file://{folder}/meet", rank=self.rank, world_size=world, timeout=timedelta(seconds=60)
        )
        tiny = json.loads((Path(self.order["model"]) / "config.json").read_text()) if not self.cuda else LLAMA
        small = {
            **LLAMA,
            "hidden_size": 1024,
            "intermediate_size": 2816,
            "num_attention_heads": 16,
            "vocab_size": 7968,
            "head_dim": 64,
            "num_hidden_layers": 2,
        }
        try:
            if case.steps:
                self.race(small if self.cuda else tiny)
            if case.large:
                self.time({**tiny, **({"num_hidden_layers": self.order["layers"]} if self.order["layers"] else {})})
            self.leave()
        except Exception as error:  # noqa: BLE001  the table tells
            self.found["error"] = f"rank {self.rank}: {type(error).__name__}: {error}"[:400]
        (folder / f"{self.rank}.json.part").write_text(json.dumps(self.found))
        os.rename(folder / f"{self.rank}.json.part", folder / f"{self.rank}.json")
        os._exit(1 if "error" in self.found else 0)  # a group whose peer is gone may not end by itself


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_known_args()
    Rank(json.loads(sys.argv[1])).run()
