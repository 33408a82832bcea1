"""What it costs to fill vLLM's model, and to update a running one, on a CPU: reshard beside vLLM's own ways.

    python scripts/bench_vllm.py load [--layers 20] [--tp 2] [--rounds 3]     `load_weights` alone, of a Llama-1B-shaped checkpoint (20 layers: 3.0 GB)
    python scripts/bench_vllm.py sync [--layers 4] [--tp 2] [--updates 10]    per update: shards from two FSDP2 ranks, beside gather and broadcast

With the Python of an environment that has vLLM. `load`: every rank a process, all at once; cold: the files' pages dropped before; loaders take turns,
so that what else the machine does meets all. `sync`: the parameters of vLLM's model as it is loaded, with no engine around it; the
other pattern is that of vLLM's broadcast backends (each tensor gathered on all trainers, broadcast whole to all workers, each of which gives
it to `model.load_weights`), on gloo.
"""

import argparse
import gc
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE), str(HERE.parent / "examples")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import engines_vllm as vllm_side  # noqa: E402
from engines_common import forked  # noqa: E402


def counted() -> dict[str, float]:
    """Bytes from disk, seconds of CPU, most resident memory, of this process."""
    io = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {"disk": int(io["read_bytes"]), "cpu": used.ru_utime + used.ru_stime}


def anonymous() -> int:
    """Bytes of memory that are of no file."""
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")) << 10


def drop(folder: Path) -> None:
    """Put a folder's pages out of the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def meet(work: Path, rank: int, world: int, number: int) -> None:
    """Wait until all ranks are here."""
    (work / f"{number}-{rank}").touch()
    while not all((work / f"{number}-{other}").exists() for other in range(world)):
        time.sleep(0.01)


def filled(folder: Path, rank: int, tp: int, work: Path, ways: list[tuple[str, str, str]], rounds: int) -> list[dict]:
    """`load_weights` of each way, cold once and then warm, `rounds` times over."""
    import torch

    rows, number = [], 0
    for turn in range(rounds):
        for title, path, load_format in ways:
            extra = {"model_loader_extra_config": {"strict": True}} if load_format == "reshard" else {}
            with vllm_side.building(folder / path, {"tp": tp}, rank, tp, work, load_format, **extra) as (model, config):
                from vllm.model_executor.model_loader import get_model_loader

                for state in ("cold", "warm", "warm"):
                    loader = get_model_loader(config.load_config)
                    for tensor in model.state_dict().values():
                        tensor.zero_()  # its pages exist
                    if state == "cold" and rank == 0:
                        drop(folder / path)
                    meet(work, rank, tp, number := number + 1)
                    before, held, began = counted(), anonymous(), time.perf_counter()
                    loader.load_weights(model, config.model_config)
                    seconds, after = time.perf_counter() - began, counted()
                    digest = sum(int(t.view(torch.uint8).sum(dtype=torch.int64)) for t in model.state_dict().values() if t.dim() > 1)
                    rows.append({"way": title, "state": state, "turn": turn, "seconds": seconds, "grown": anonymous() - held, "digest": digest,
                                 **{key: after[key] - before[key] for key in before}})  # fmt: skip
                    meet(work, rank, tp, number := number + 1)
                config.compilation_config.static_forward_context.clear()
            del model, config, loader
            from vllm.model_executor.model_loader.reload.layerwise import LAYERWISE_INFO

            LAYERWISE_INFO.clear()
            gc.collect()
    return rows


def load(args) -> None:
    import reshard

    with tempfile.TemporaryDirectory() as scratch:
        from bench_checkpoint import make
        from check_vllm import entry_points

        entry_points(Path(scratch) / "site")
        folder = Path(scratch)
        size = make(folder / "hf", args.layers)
        made = forked(lambda: [str(reshard.convert(folder / "hf", folder / "megatron", format="megatron", tp=2 * args.tp, fsync=False)),
                               str(reshard.convert(folder / "hf", folder / "vllm", format="vllm", tp=args.tp, fsync=False, **vllm_side.options()))])()  # fmt: skip
        if made[1]:
            raise SystemExit(made[1][1])
        vllm_side.warm()
        ways = [("vLLM's default, HF", "hf", "auto"), ("reshard, HF", "hf", "reshard"), (f"reshard, Megatron TP {2 * args.tp}", "megatron", "reshard"),
                (f"sharded_state, TP {args.tp}", "vllm", "sharded_state")]  # fmt: skip
        try:
            import fastsafetensors  # noqa: F401

            ways.append(("fastsafetensors, HF", "hf", "fastsafetensors"))
        except ImportError:
            print("fastsafetensors is not installed")
        work = folder / "work"
        work.mkdir()
        waits = [forked(filled, folder, rank, args.tp, work, ways, args.rounds, seconds=1500) for rank in range(args.tp)]
        answers = [wait() for wait in waits]
        for _, error in answers:
            if error:
                raise SystemExit(error[1])
        ranks = [rows for rows, _ in answers]
        print(
            f"{size:,} bytes, {args.layers} layers, TP {args.tp}; seconds of the slower rank, the least and the most of {args.rounds} rounds"
        )
        if len({tuple(rows[i]["digest"] for rows in ranks) for i in range(len(ranks[0]))}) != 1:
            raise SystemExit("the ways do not load the same bytes")
        for title, *_ in ways:
            for state in ("cold", "warm"):
                mine = [i for i, row in enumerate(ranks[0]) if row["way"] == title and row["state"] == state]
                seconds = [max(rows[i]["seconds"] for rows in ranks) for i in mine]
                cpu = min(sum(rows[i]["cpu"] for rows in ranks) for i in mine)
                disk = max(sum(rows[i]["disk"] for rows in ranks) for i in mine)
                grown = max(rows[i]["grown"] for rows in ranks for i in mine)
                print(json.dumps({"way": title, "state": state, "s": [round(min(seconds), 2), round(max(seconds), 2)], "cpu_s": round(cpu, 2),
                                  "disk_GB": round(disk / 1e9, 2), "more_memory_MB": round(grown / 1e6)}), flush=True)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------------- updates

TRAINERS = 2


def held() -> dict[str, int]:
    """What a process must not gather: open files, mappings, shared memory, in numbers; anonymous MB."""
    shared = [name for name in os.listdir("/dev/shm") if name.startswith("torch_")]
    maps = Path("/proc/self/maps").read_text().count("\n")
    return {"files": len(os.listdir("/proc/self/fd")), "maps": maps, "shm": len(shared), "MB": anonymous() >> 20}


def peak(work) -> tuple[float, int]:
    """Seconds that `work()` took, and how far memory rose above what it was before."""
    Path("/proc/self/clear_refs").write_text("5")
    before = anonymous()
    began = time.perf_counter()
    work()
    seconds = time.perf_counter() - began
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    most = (int(status["VmHWM"].split()[0]) - int(status["RssFile"].split()[0]) - int(status["RssShmem"].split()[0])) << 10
    return seconds, max(0, most - before)


def trainer(folder: Path, rank: int, told: dict) -> list[dict]:
    """FSDP2 on gloo: sends its shards, or gathers each tensor for rank 0 to broadcast."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM

    dist.init_process_group("gloo", init_method=f"file://{told['scratch']}/trainers", rank=rank, world_size=TRAINERS)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    mesh = init_device_mesh("cpu", (TRAINERS,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)

    def broadcast(group) -> None:
        for _, parameter in model.named_parameters():
            whole = parameter.full_tensor().detach()
            if rank == 0:
                group.broadcast([whole], _from_first()).wait()

    return updated(rank, told, rank, lambda session, version: session.send(model.named_parameters(), version), broadcast)


def worker(folder: Path, rank: int, told: dict) -> list[dict]:
    """vLLM's model of one rank: receives its slices, or every tensor for `model.load_weights`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    work = Path(told["scratch"]) / "vllm"
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).named_parameters()}
    with vllm_side.building(folder, {"tp": told["tp"]}, rank, told["tp"], work, "dummy") as (model, _):

        def broadcast(group) -> None:
            for name, shape in shapes.items():
                whole = torch.empty(shape, dtype=torch.bfloat16)
                group.broadcast([whole], _from_first()).wait()
                model.load_weights([(name, whole)])

        tensors = {name: t.data for name, t in model.state_dict(keep_vars=True).items()}
        return updated(TRAINERS + rank, told, 1 + rank, lambda session, version: session.recv(tensors, version), broadcast)


def _from_first():
    import torch.distributed as dist

    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    return options


def updated(rank: int, told: dict, among: int, step, broadcast) -> list[dict]:
    """Both patterns by turns; `among` is the rank in the broadcast's group, of trainer rank 0 and the workers."""
    from reshard import sync
    from reshard.plugins.transfer import Terms

    engine = {"format": "vllm", "ranks": told["tp"], "tp": told["tp"], "dtype": "bf16", **vllm_side.options()}
    engine.pop("engine_platform")
    trainer = {"format": "fsdp", "ranks": TRAINERS, "dp": TRAINERS, "dtype": "bf16"}
    sessions = {way: Terms(told["addresses"][i], told["folder"], engine, trainer, transport=way, timeout=300).joined(rank, "gloo")
                for i, way in enumerate(("p2p", "auto"))}  # fmt: skip
    if rank == 1:  # a trainer that only gathers
        group = None
    else:
        group = sync.joined(told["addresses"][2], among, 1 + told["tp"], backend="gloo", timeout=300)
    rows, kept = [], held()
    for number in range(1, told["updates"] + 1):
        for way, session in sessions.items():
            stats: list = []
            seconds, grown = peak(lambda session=session, stats=stats, number=number: stats.append(step(session, number)))
            rows.append({"way": way, "seconds": seconds, "grown": grown, "taken": stats[0].received, "sent": stats[0].sent})
        if number <= told["broadcasts"]:
            seconds, grown = peak(lambda: broadcast(group))
            rows.append({"way": "gather and broadcast", "seconds": seconds, "grown": grown})
        if number == 3:
            kept = held()
    bound = sessions["p2p"].plan.cost().ranks[rank].bound
    return [*rows, {"way": "held", "after 3": kept, "at the end": held(), "bound": bound}]


def sync(args) -> None:
    from bench_checkpoint import make
    from check_vllm import entry_points
    from grpo_vllm import free_port

    with tempfile.TemporaryDirectory() as scratch:
        entry_points(Path(scratch) / "site")
        folder = Path(scratch) / "hf"
        size = make(folder, args.layers)
        (Path(scratch) / "vllm").mkdir()
        vllm_side.warm()
        told = {"scratch": scratch, "folder": str(folder), "tp": args.tp, "updates": args.updates, "broadcasts": min(args.updates, 10),
                "addresses": [f"tcp://127.0.0.1:{free_port()}" for _ in range(3)]}  # fmt: skip
        waits = [forked(trainer, folder, rank, told, seconds=1500) for rank in range(TRAINERS)]
        waits += [forked(worker, folder, rank, told, seconds=1500) for rank in range(args.tp)]
        answers = [wait() for wait in waits]
        if errors := [error for _, error in answers if error]:
            raise SystemExit(errors[0][1])
        ranks = [rows for rows, _ in answers]
        print(f"{size:,} bytes, FSDP2 over {TRAINERS} → vLLM TP {args.tp}, {args.updates} updates; per update")
        for way in ("p2p", "auto", "gather and broadcast"):
            mine = [i for i, row in enumerate(ranks[0]) if row["way"] == way][1:]  # the first makes what lasts
            seconds = sorted(max(rows[i]["seconds"] for rows in ranks) for i in mine)
            row = {"way": way, "s": round(seconds[0], 3), "median_s": round(seconds[len(seconds) // 2], 3),
                   "more_memory_MB": {"trainer": max(rows[i]["grown"] for rows in ranks[:2] for i in mine) >> 20,
                                      "worker": max(rows[i]["grown"] for rows in ranks[2:] for i in mine) >> 20}}  # fmt: skip
            if way != "gather and broadcast":
                row |= {
                    "received_per_worker": [rows[mine[0]]["taken"] for rows in ranks[2:]],
                    "bound": [rows[-1]["bound"] for rows in ranks[2:]],
                }
            else:
                row |= {"received_per_worker": [size] * args.tp}
            print(json.dumps(row))
        print(json.dumps({"after 3": [rows[-1]["after 3"] for rows in ranks], "at the end": [rows[-1]["at the end"] for rows in ranks]}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["load", "sync"])
    parser.add_argument("--layers", type=int)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=10)
    args = parser.parse_args()
    args.layers = args.layers or (20 if args.what == "load" else 4)
    if args.what == "load":
        load(args)
    else:
        sync(args)


if __name__ == "__main__":
    main()
