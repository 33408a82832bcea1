"""One rank of a weight sync on a GPU, a process of its own: python scripts/gpu_rank.py ORDER, which gpu_sync.py writes.

A trainer overwrites its weights as soon as ``send`` returns, and writes the next step's with a kernel that is still running
when it is called: an engine that reads too early, or too late, holds an element of another step.
"""

import gc
import json
import os
import sys
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from gpu_common import LLAMA

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
        folder = Path(self.order["model"])
        known = (folder / "config.json").exists() and json.loads((folder / "config.json").read_text()) == config
        if known and mine is not None:
            for name, t in load(folder, format="megatron", tp=self.case.trainers, rank=self.rank, device=str(self.device)).items():
                mine[name].copy_(t) if name in mine else None
        taken, size = [], sum(t.nbytes for t in (into or {}).values())
        for step in range(self.case.large):
            stats = self.step(s, mine, into, step + 1)
            taken.append(stats.seconds)
        self.found |= {"staging": stats.staging, "note": getattr(stats, "note", "")}
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
                self.race(small if self.cuda else self.order["config"])
            if case.large:
                self.time(self.order["config"])
            self.leave()
        except Exception as error:  # noqa: BLE001  the table tells
            self.found["error"] = f"rank {self.rank}: {type(error).__name__}: {error}"[:400]
        (folder / f"{self.rank}.json.part").write_text(json.dumps(self.found))
        os.rename(folder / f"{self.rank}.json.part", folder / f"{self.rank}.json")
        os._exit(1 if "error" in self.found else 0)  # a group whose peer is gone may not end by itself


if __name__ == "__main__":
    Rank(json.loads(sys.argv[1])).run()
