"""Time a weight sync on gloo against its bound and its peers, alternating in one run, and print ratios as a Markdown table.

    python scripts/bench_sync.py [--layers 10] [--runs 5] [--cases tp4:tp4 tp4:tp2 tp2:tp4 tp4:tp3] [--fused] [--megatron DIR]

Trainer and engine ranks are processes on this machine, joined by one gloo group. `bound` is the same bytes between the same
pairs, each as one flat send/recv. `all-gather + broadcast` is what frameworks do: each parameter gathered whole by the
trainer's ranks, then broadcast to the engine's. Awex 0.9 (pip install awex==0.9.0 cloudpickle requests aiohttp; its own
planner and transport on gloo) and megatron-core's resharding (--megatron: an unpacked wheel of 0.19.2) run where they are
found. Every mode must leave the same bits. The model is bf16, Llama-like, hidden 2048; 10 layers are 1.16 GB.
"""

import argparse
import os
import socket
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from reshard import sync

CONFIG = {"architectures": ["LlamaForCausalLM"], "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 24,
          "num_key_value_heads": 12, "head_dim": 128, "vocab_size": 31872, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}  # fmt: skip


def values(side: sync.Side, rank: int, whole: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """What `rank` holds: bits that depend on the tensor's name and the place in it, so that any mistake shows."""
    out = {}
    for s in side.held_by(rank):
        tensor = torch.empty(s.shape, dtype=torch.bfloat16)
        flat = tensor.view(-1).view(torch.int16)
        for key, block in s.blocks:
            index = torch.zeros(block.shape, dtype=torch.int64)
            for axis, (start, stop) in enumerate(block.box):
                steps = torch.arange(start, stop) * (7919 ** (axis + 1) % 65521)
                index += steps.view([-1 if a == axis else 1 for a in range(len(block.shape))])
            index = (index + sum(map(ord, str(key)))) % 30011
            torch.as_strided(flat, block.shape, block.strides, block.offset).copy_(index.to(torch.int16))
        out[s.name] = tensor
    return out


class Case:
    """One pair of meshes: the tensors of this rank, and every mode as a function that fills the engine's tensors."""

    def __init__(self, rank: int, layers: int, source: int, target: int, fused: bool, megatron: str | None):
        self.rank, self.source, self.target = rank, source, target
        self.layout = sync.layout({**CONFIG, "num_hidden_layers": layers})
        names = ("megatron", "vllm") if fused else ("tp", "tp")
        self.src = sync.Side.placed(self.layout, names[0], tp=source, ranks=range(source))
        self.dst = sync.Side.placed(self.layout, names[1], tp=target, ranks=range(source, source + target))
        self.plan = sync.plan(self.src, self.dst)
        self.mine = values(self.src, rank) if rank < source else None
        self.into = {n: torch.zeros_like(t) for n, t in values(self.dst, rank).items()} if rank >= source else None
        self.wanted = values(self.dst, rank) if rank >= source else None
        self.shared: dict[str, torch.Tensor] | None = None
        self.modes = {"bound": self._bound()}
        for transport in ("p2p", "mapped"):
            self.modes[f"reshard {transport}"] = self._reshard(transport)
            self.modes[f"reshard {transport}, verify"] = self._reshard(transport, verify=True)
        if not fused:
            self.modes["all-gather + broadcast"] = self._gather()
            from bench_sync_peers import awex, megatron_core

            for name, make in (("awex", awex), ("megatron-core", lambda case: megatron_core(case, megatron))):
                found = make(self)
                if found:
                    self.modes[name] = found

    def _bound(self):
        from reshard.sync.messages import rank_plan

        part, sizes = rank_plan(self.plan, self.rank), {}
        for m in (*part.sends, *part.takes):
            sizes[m.sender, m.taker] = sizes.get((m.sender, m.taker), 0) + m.bytes
        flat = {pair: torch.ones(size, dtype=torch.uint8) for pair, size in sizes.items()}

        def run():
            works = [dist.irecv(b, s) for (s, t), b in flat.items() if t == self.rank] + [
                dist.isend(b, t) for (s, t), b in flat.items() if s == self.rank
            ]
            for work in works:
                work.wait()

        return run

    def _reshard(self, transport: str, verify: bool = False):
        if self.mine and transport == "mapped" and self.shared is None:  # the tensors move to shared memory; other modes keep theirs
            self.shared = {n: t.clone() for n, t in self.mine.items()}
        mine = self.shared if transport == "mapped" else self.mine
        session = sync.Sync(self.plan, transport=transport, verify=verify)
        return lambda: session.exchange(mine, self.into)

    def _gather(self):
        """Each parameter gathered whole by the trainer's ranks, broadcast whole from rank 0, sliced by the engine's."""
        trainers = dist.new_group(range(self.source))
        receivers = dist.new_group([0, *range(self.source, self.source + self.target)])
        whole = next(iter(sync.Side.placed(self.layout, "hf", ranks=[0]).members))
        dims = {
            s.name: next((d for d, (a, b) in enumerate(zip(s.shape, t.shape)) if a != b), None) for s, t in zip(self.src.members[0], whole)
        }

        def run():
            for s in whole:
                dim = dims[s.name]
                if self.rank < self.source:
                    full = self.mine[s.name]
                    if dim is not None:
                        parts = [torch.empty_like(full) for _ in range(self.source)]
                        dist.all_gather(parts, full, group=trainers)
                        full = torch.cat(parts, dim)
                else:
                    full = torch.empty(s.shape, dtype=torch.bfloat16)
                if self.rank == 0 or self.rank >= self.source:
                    dist.broadcast(full, 0, group=receivers)
                if self.rank >= self.source:
                    part = full if dim is None else full.chunk(self.target, dim)[self.rank - self.source]
                    self.into[s.name].copy_(part)

        return run

    def time(self, mode: str, check: bool) -> float:
        if self.into and check:
            for t in self.into.values():
                t.zero_()
        dist.barrier()
        began = time.perf_counter()
        self.modes[mode]()
        dist.barrier()
        seconds = time.perf_counter() - began
        if check and self.into and mode != "bound":
            for name, tensor in self.into.items():
                if not torch.equal(tensor.view(torch.int16), self.wanted[name].view(torch.int16)):
                    raise SystemExit(f"{mode}: {name} differs on rank {self.rank}")
        return seconds


def work(rank: int, args, port: int, source: int, target: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=source + target)
    case = Case(rank, args.layers, source, target, args.fused, args.megatron)
    seconds: dict[str, list[float]] = {mode: [] for mode in case.modes}
    for turn in range(args.runs + 1):
        for mode in case.modes:
            if mode == "all-gather + broadcast" and turn > args.slow:
                continue  # seconds each, and far from the rest
            taken = case.time(mode, check=turn == 0)
            if turn:
                seconds[mode].append(taken)
    if rank == 0:
        bound = seconds["bound"]
        gathered = seconds.get("all-gather + broadcast")
        total = case.plan.cost().total
        for mode, own in seconds.items():
            if not own:
                continue
            ratio = statistics.median(b / s for b, s in zip(bound, own))
            against = f"{statistics.median(g / s for g, s in zip(gathered, own)):.1f}" if gathered else ""
            print(
                f"| {'Megatron ' if args.fused else ''}TP{source} → {'vLLM ' if args.fused else ''}TP{target} | {mode} | {total / 1e9:.2f} GB | {min(own):.3f} | {statistics.median(own):.3f} | {ratio:.2f} | {against} |",
                flush=True,
            )
    dist.barrier()
    os._exit(0)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


EXPERTS = {"architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 16, "num_experts": 176, "head_dim": 8,
           "num_hidden_layers": 95, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}  # fmt: skip


def overhead(rank: int, port: int, runs: int) -> None:
    """Seconds per step of a plan of 50,000 copies of 512 bytes, from one tensor per expert into stacked ones, nothing sent."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    layout = sync.layout(EXPERTS)
    began = time.perf_counter()
    src, dst = sync.Side.placed(layout, "tp", ranks=[0]), sync.Side.placed(layout, "vllm", ranks=[1])
    plan = sync.plan(src, dst)
    made = time.perf_counter() - began
    session = sync.Sync(plan, transport="p2p")
    tensors = {s.name: torch.zeros(s.shape, dtype=torch.bfloat16) for s in (src, dst)[rank].held_by(rank)}
    session._wire.run = lambda staging: [copies.run() for here in staging.rounds for copies in (here.pack, here.unpack)]
    seconds = []
    for _ in range(runs + 1):
        dist.barrier()
        began = time.perf_counter()
        session.exchange(*((tensors, None) if rank == 0 else (None, tensors)))
        seconds.append(time.perf_counter() - began)
    part = session._parts["tensors"][0]
    copies = sum(len(m.copies) for m in (*part.sends, *part.takes))
    print(
        f"| {'sender' if rank == 0 else 'taker'} | {copies:,} | {made:.2f} | {seconds[0]:.2f} | {statistics.median(seconds[1:]) * 1000:.0f} |",
        flush=True,
    )
    dist.barrier()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cases", nargs="+", default=["tp4:tp4", "tp4:tp2", "tp2:tp4", "tp4:tp3"])
    parser.add_argument("--fused", action="store_true", help="Megatron's fused tensors to vLLM's, which no peer does")
    parser.add_argument("--megatron", help="folder of an unpacked megatron-core wheel")
    parser.add_argument("--slow", type=int, default=2, help="runs of all-gather + broadcast, which takes seconds each")
    parser.add_argument("--overhead", action="store_true", help="a step of 50,000 small copies with no transport")
    args = parser.parse_args()
    if args.overhead:
        print("| rank | copies | plan s | first step s | step ms |\n| --- | --- | --- | --- | --- |", flush=True)
        mp.start_processes(overhead, args=(free_port(), args.runs), nprocs=2, start_method="forkserver")
        return
    sys.path.insert(0, str(Path(__file__).parent))
    print(
        "| meshes | mode | moved | best s | median s | bound / it | all-gather + broadcast / it |\n| --- | --- | --- | --- | --- | --- | --- |",
        flush=True,
    )
    for case in args.cases:
        source, target = (int(side.removeprefix("tp")) for side in case.split(":"))
        port = free_port()
        mp.start_processes(work, args=(args, port, source, target), nprocs=source + target, start_method="forkserver")


if __name__ == "__main__":
    main()
