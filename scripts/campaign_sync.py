"""Weight syncs drawn at random, between real gloo processes, each engine tensor compared with what `reshard.load` gives, bit for bit;
then steps that are killed, stopped, aborted or fail. Prints a table, and exits 1 if anything was wrong.

    python scripts/campaign_sync.py [--pairs 60] [--breaks 30] [--seed 0]

Trainers: Megatron (tensor, pipeline, expert parallel, replicas), FSDP2 over 1 to 8 ranks, FSDP2 over tensor parallelism, stacked
experts by expert rank, tied embeddings, fp32 masters, LoRA adapters. Engines: vLLM and SGLang over 1 to 8 ranks, several of
them, in FP8 blocks, whole tensors in buckets; ranks of both apart, shared or overlapping. Three versions each, by messages or
mapped, some with another mesh in between.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from sync_world import LLAMA, QWEN3_MOE, Failure, World, blank, loaded

from reshard import PlanError, sync
from reshard.demo import make_model
from reshard.sync import staging

SIZE = 8
MODELS = {
    "llama": LLAMA,
    "wide": {**LLAMA, "num_attention_heads": 24, "num_key_value_heads": 12},
    "few kv": {**LLAMA, "num_attention_heads": 16, "num_key_value_heads": 4, "hidden_size": 64, "intermediate_size": 128},
    "tied": {**LLAMA, "tie_word_embeddings": True},
    "moe": QWEN3_MOE,
    "blocks": {**LLAMA, "num_attention_heads": 8, "num_key_value_heads": 8, "hidden_size": 64, "intermediate_size": 128},
}
KINDS = (
    "megatron",
    "megatron pp",
    "megatron ep",
    "fsdp",
    "fsdp × tp",
    "replicas",
    "stacked experts",
    "tied",
    "fp8",
    "lora",
    "select",
    "replan",
    "masters",
    "buckets",
)
LINEAR = frozenset({"q", "k", "v", "o", "gate", "up", "down"})
ROW_PARALLEL = ("o_proj.weight", "down_proj.weight")


# ----------------------------------------------------------------------------------------------------------------- drawing


def drawn(number: int, dice: random.Random) -> dict:
    """One pair, as plain data. Kinds take turns, so that each comes about as often."""
    kind = KINDS[number % len(KINDS)]
    model = {"megatron ep": "moe", "stacked experts": "moe", "tied": "tied", "fp8": "blocks"}.get(kind) or dice.choice(
        ["llama", "wide", "few kv", "moe"]
    )
    if kind == "lora":
        model = "llama"
    if kind in ("fsdp", "lora"):
        source = {"rule": "fsdp", "dp": dice.randint(1, 8), "tp": 1}
    elif kind == "fsdp × tp":
        model = dice.choice(["llama", "wide", "few kv"])
        source = {"rule": "fsdp", "dp": dice.choice([2, 3, 4]), "tp": 2}
    elif kind == "tied":
        source = dice.choice(
            [{"rule": "fsdp", "dp": dice.randint(1, 8), "tp": 1}, {"rule": "megatron", "tp": 2, "pp": dice.choice([1, 2]), "dp": 1}]
        )
    elif kind == "stacked experts":
        source = {"rule": "stacked", "dp": dice.choice([2, 4, 8]), "tp": 1}
    elif kind == "megatron ep":
        source = {"rule": "megatron", "tp": dice.choice([1, 2]), "ep": dice.choice([2, 4]), "etp": 1, "dp": 1}
    else:
        pp = dice.choice([2, 4]) if kind == "megatron pp" else 1
        tp = dice.choice([1, 2, 4]) if pp < 4 else dice.choice([1, 2])
        source = {"rule": "megatron", "tp": tp, "pp": pp, "dp": dice.choice([2, 4]) if kind == "replicas" and tp < 4 else 1}
    used = source.get("tp", 1) * source.get("pp", 1) * source.get("dp", 1)
    used = max(used, source["tp"] * source["ep"]) if "ep" in source else used
    if kind in ("lora", "buckets"):
        target = {"format": "hf", "replicas": dice.choice([1, 2])}
    else:
        tp = dice.choice([1, 2, 4] if kind == "fp8" else [1, 2, 3, 4, 6, 8])
        target = {"format": dice.choice(["vllm", "sglang"]), "tp": tp, "replicas": dice.choice([1, 2]) if tp < 5 else 1}
    size = target.get("tp", 1) * target["replicas"]
    first = 0 if used + size > SIZE and dice.random() < 0.5 else dice.randint(0, SIZE - size)
    if used + size <= SIZE and dice.random() < 0.7:
        first = used  # ranks of their own
    return {
        "kind": kind, "model": model, "source": source, "target": target, "used": used, "first": first, "transport": dice.choice(["p2p", "auto"]),
        "verify": dice.random() < 0.5, "bucket": dice.choice([4096, 16384, 1 << 20, 64 << 20]), "layer": dice.randint(0, 3), "shuffled": dice.random() < 0.3,
        "other tp": dice.choice([1, 2, 3]),
    }  # fmt: skip


def sides_of(spec: dict):
    """(layout, source side, destination side) of a pair."""
    layout = sync.layout(MODELS[spec["model"]])
    if spec["kind"] == "lora":
        layout = sync.adapter(layout, 4, ("q", "o", "gate"), name="default")
    source, target = spec["source"], spec["target"]
    own = list(range(spec["used"]))
    if spec["shuffled"]:
        own.reverse()
    dtype = "fp32" if spec["kind"] == "masters" else "bf16"
    if source["rule"] == "megatron":
        mesh = {name: source[name] for name in ("tp", "pp", "ep", "etp") if name in source}
        src = sync.Side.placed(layout, "megatron", ranks=own, dtype=dtype, **mesh)
    elif source["rule"] == "stacked":
        cuts = sync.fsdp(layout, ranks=own, replicas=len(own), variants=["stacked"])
        src = sync.Side.sharded(layout, {n: sync.Sharding(tuple(own), (0,)) if ".experts." in n else cut for n, cut in cuts.items()})
    else:
        src = sync.Side.sharded(layout, sync.fsdp(layout, dp=source["dp"], tp=source["tp"], ranks=own), dtype=dtype)
    return layout, src, destination(layout, spec, target.get("tp", 1))


def destination(layout, spec: dict, tp: int):
    target = spec["target"]
    ranks = range(spec["first"], spec["first"] + tp * target["replicas"])
    if target["format"] == "hf":
        return sync.Side.placed(layout, "hf", ranks=ranks)
    fp8 = {"fp8": sync.Fp8(LINEAR, edge=8)} if spec["kind"] == "fp8" else {}
    return sync.Side.placed(layout, target["format"], tp=tp, ranks=ranks, **fp8)


def selection(spec: dict):
    return (lambda key: len(key) > 1 and key[1] == spec["layer"]) if spec["kind"] == "select" else None


def possible(spec: dict) -> bool:
    """Whether the formats' meshes can cut the model at all, and FP8's between blocks. A plan that is refused is no such reason."""
    if spec["kind"] == "replan" and spec["first"] + spec["other tp"] * spec["target"]["replicas"] > SIZE:
        return False
    try:
        layout, src, dst = sides_of(spec)
        destination(layout, spec, spec["other tp"])
        if spec["kind"] == "fp8":
            sync.plan(src, dst)
    except PlanError:
        return False
    return True


# ------------------------------------------------------------------------------------------------------------- what is right


def whole_tensors(path: Path, spec: dict) -> dict[str, torch.Tensor]:
    """The model as its trainer's DTensors are cut from it: the file's tensors, experts stacked where the trainer stacks them."""
    if spec["kind"] == "lora":
        generator = torch.Generator().manual_seed(spec["number"])
        layout = sync.adapter(sync.layout(MODELS[spec["model"]]), 4, ("q", "o", "gate"), name="default")
        return {s.name: torch.randn(s.shape, generator=generator).bfloat16() for s in sync.Side.placed(layout, "hf", ranks=[0]).members[0]}
    files = load_file(path / "model.safetensors")
    if not any(".experts." in name for name in files) or spec["source"]["rule"] != "stacked":
        return files
    whole = {n: t for n, t in files.items() if ".experts." not in n}
    for layer in range(4):
        at = f"model.layers.{layer}.mlp.experts."
        pairs = [[files[f"{at}{e}.{x}_proj.weight"] for x in ("gate", "up")] for e in range(8)]
        whole[at + "gate_up_proj"] = torch.stack([torch.cat(pair) for pair in pairs])
        whole[at + "down_proj"] = torch.stack([files[f"{at}{e}.down_proj.weight"] for e in range(8)])
    return whole


def held_by(rank: int, path: Path, spec: dict, src) -> dict[str, torch.Tensor] | None:
    """What a trainer's rank holds: `reshard.load` for Megatron, torch.chunk of the whole tensors for DTensors."""
    if rank not in src.processes:
        return None
    source = spec["source"]
    if source["rule"] == "megatron":
        mesh = {name: source[name] for name in ("tp", "pp", "ep", "etp") if name in source}
        return loaded(path, src, rank, **mesh)
    order = list(reversed(range(spec["used"]))) if spec["shuffled"] else list(range(spec["used"]))
    d, t = divmod(order.index(rank), source["tp"])
    out = {}
    for name, tensor in whole_tensors(path, spec).items():
        if source["rule"] == "stacked":
            out[name] = chunk(tensor, spec["used"], d) if ".experts." in name else tensor
            continue
        if source["tp"] > 1 and "norm" not in name:
            tensor = tensor.chunk(source["tp"], 1 if name.endswith(ROW_PARALLEL) else 0)[t]
        out[name] = chunk(tensor, source["dp"], d)
    return {name: tensor.clone() for name, tensor in out.items()}


def chunk(tensor: torch.Tensor, parts: int, index: int) -> torch.Tensor:
    pieces = tensor.chunk(parts)
    return pieces[index] if index < len(pieces) else tensor[:0]


def quantised(weight: torch.Tensor, edge: int):
    """FP8 blocks of a whole tensor, one block at a time."""
    out, scales = torch.zeros_like(weight, dtype=torch.float8_e4m3fn), torch.zeros(-(-weight.shape[0] // edge), -(-weight.shape[1] // edge))
    for i in range(0, weight.shape[0], edge):
        for j in range(0, weight.shape[1], edge):
            block = weight[i : i + edge, j : j + edge].float()
            scale = block.abs().max() / 448
            scale = scale if scale else torch.ones(())
            out[i : i + edge, j : j + edge] = (block / scale).to(torch.float8_e4m3fn)
            scales[i // edge, j // edge] = scale
    return out, scales


def engine_fp8(path: Path, wanted: dict[str, torch.Tensor], tp: int, place: int, factor: float) -> dict[str, torch.Tensor]:
    """`wanted` with its fused matrices in blocks of 8, from the whole file's."""
    whole = load_file(path / "model.safetensors")
    for layer in range(4):
        at = f"model.layers.{layer}."
        for fused, names, dim in (
            ("self_attn.qkv_proj", "qkv", 0),
            ("self_attn.o_proj", "o", 1),
            ("mlp.gate_up_proj", ("gate", "up"), 0),
            ("mlp.down_proj", ("down",), 1),
        ):
            parts = [quantised(whole[f"{at}{fused.split('.')[0]}.{n}_proj.weight"] * factor, 8) for n in names]
            wanted[f"{at}{fused}.weight"] = torch.cat([p.chunk(tp, dim)[place] for p, _ in parts])
            wanted[f"{at}{fused}.weight_scale_inv"] = torch.cat([s.chunk(tp, dim)[place] for _, s in parts])
    return wanted


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
    )


# ---------------------------------------------------------------------------------------------------------------- one pair


def run_pair(rank: int, root: Path, spec: dict):
    """Three versions of a pair on one rank. Returns (tensors compared, bytes received, what was wrong)."""
    path = root / spec["model"]
    layout, src, dst = sides_of(spec)
    plan = sync.plan(src, dst, select=selection(spec), bucket_bytes=spec["bucket"])
    session = sync.Sync(plan, timeout=60, transport=spec["transport"], verify=spec["verify"])
    held = held_by(rank, path, spec, src)
    if held and spec["kind"] == "masters":
        held = {name: tensor.float() for name, tensor in held.items()}
    compared, received, wrong, factor, tp = 0, 0, [], 1.0, spec["target"].get("tp", 1)
    for version, scale in ((1, 1.0), (3, 2.0), (4, 0.5)):
        for tensor in (held or {}).values():
            tensor.mul_(scale)
        factor *= scale
        if spec["kind"] == "replan" and version == 4:
            tp = spec["other tp"]
            dst = destination(layout, spec, tp)
            session.replan(sync.plan(src, dst, bucket_bytes=spec["bucket"]))
        into = blank(dst, rank) if rank in dst.processes else None
        if spec["kind"] == "buckets":
            if into is not None:
                into = {name: tensor for bucket in session.buckets(held, version=version) for name, tensor in bucket.tensors}
            else:
                session.exchange(held, version=version)
        else:
            session.exchange(held, into, version=version)
        received += session.stats.received
        if into is None:
            continue
        if session.state != "clean" or session.version != version:
            wrong.append(f"state {session.state}, version {session.version}")
        place = dst.processes.index(rank) % tp
        wanted = expected(path, spec, dst, rank, tp, place, factor)
        if spec["kind"] == "select":
            old = blank(dst, rank)
            wanted = {n: wanted[n] if f".layers.{spec['layer']}." in n else old[n] for n in into}
        if set(wanted) != set(into):
            wrong.append(f"names differ: {sorted(set(wanted) ^ set(into))[:4]}")
        wrong += [f"version {version}: {n} differs on rank {rank}" for n in into if n in wanted and not equal(into[n], wanted[n])]
        compared += len(into)
    return compared, received, wrong[:5]


def expected(path: Path, spec: dict, dst, rank: int, tp: int, place: int, factor: float) -> dict[str, torch.Tensor]:
    if spec["target"]["format"] == "hf":
        own = whole_tensors(path, spec) if spec["kind"] == "lora" else load_file(path / "model.safetensors")
        return {n: t * factor for n, t in own.items()}
    wanted = loaded(path, dst, rank, tp=tp)
    wanted = {n: t * factor for n, t in wanted.items() if n in {s.name for s in dst.held_by(rank)}}
    return engine_fp8(path, wanted, tp, place, factor) if spec["kind"] == "fp8" else wanted


# ------------------------------------------------------------------------------------------------------------ steps that break

TIMEOUT = 3.0
HOWS = ("kill", "stop", "abort", "raise")


def breaking(rank: int, root: Path, how: str, who: int, moment: float, transport: str, verify: bool):
    """Steps without end on ranks 0-3, until rank `who` breaks one after `moment` seconds. Returns what this rank saw."""
    layout = sync.layout(MODELS["llama"])
    src, dst = sync.Side.placed(layout, "megatron", tp=2, ranks=range(2)), sync.Side.placed(layout, "vllm", tp=2, ranks=(2, 3))
    session = sync.Sync(sync.plan(src, dst, bucket_bytes=16384), timeout=TIMEOUT, transport=transport, verify=verify)
    held, into = loaded(root / "llama", src, rank, tp=2) if rank < 2 else None, blank(dst, rank) if rank > 1 else None
    names = list(held or into)
    real, began, due = staging.Copies.run, time.monotonic(), []

    def run(self):
        if time.monotonic() - began > moment and not due:
            due.append(1)
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif how == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            elif how == "abort":
                session.abort("told to")
            else:
                raise MemoryError("no room")
        real(self)

    if rank == who:
        staging.Copies.run = run
    version, seen = 0, {}
    try:
        while version < 4000:
            version += 1
            for tensor in (held or {}).values():
                tensor.fill_(version % 128)
            step = time.monotonic()
            session.exchange(held, into, version)
    except sync.SyncError as error:
        seen = {"kind": type(error).__name__, "text": str(error), "seconds": time.monotonic() - step, "state": session.state}
    staging.Copies.run = real
    if into is not None:
        values = {float(value) for name in names for value in into[name].float().unique()} - {0.0}
        seen["whole"] = values == {float((session.version or 0) % 128)}
    if how == "raise" and seen.get("kind") == "SyncError":  # the group is as good as before
        for tensor in (held or {}).values():
            tensor.fill_(5)
        session.exchange(held, into, version + 1)
        seen["after"] = into is None or all((into[name] == 5).all() for name in names)
    left = time.monotonic()
    session.close()
    dist.destroy_process_group()
    seen["left"] = time.monotonic() - left
    return seen


def broken(root: Path, dice: random.Random) -> tuple[str, list[str], float, float]:
    """One break: (how, what was wrong, the longest wait of a survivor in seconds, the longest it took to leave)."""
    how, who, transport = dice.choice(HOWS), dice.randrange(4), dice.choice(["p2p", "auto"])
    world, wrong, longest, leaving = World(4), [], 0.0, 0.0
    try:
        moment, verify = dice.uniform(0, 0.5), dice.random() < 0.5
        for pipe in world.pipes:
            pipe.send((breaking, (root, how, who, moment, transport, verify)))
        for r in range(4):
            if r == who and how in ("kill", "stop"):
                continue
            if not world.pipes[r].poll(60):
                wrong.append(f"rank {r} hangs")
                continue
            seen = world.pipes[r].recv()
            if isinstance(seen, Failure):
                wrong.append(f"rank {r}: {seen.text[-300:]}")
                continue
            if "kind" not in seen:
                wrong.append(f"rank {r} saw nothing")
                continue
            longest, leaving = max(longest, seen["seconds"]), max(leaving, seen["left"])
            if seen["seconds"] > 2 * TIMEOUT + 2:
                wrong.append(f"rank {r} waited {seen['seconds']:.1f} s")
            if seen["left"] > 2:
                wrong.append(f"rank {r} took {seen['left']:.1f} s to leave")
            if how == "raise" and (
                f"rank {who}: MemoryError: no room" not in seen["text"] or not seen["after"] or seen["seconds"] > TIMEOUT
            ):
                wrong.append(f"rank {r}: {seen['text'][:200]}")
            if r > 1 and not seen["whole"] and seen["state"] != "mixed":
                wrong.append(f"rank {r}: neither whole nor told to be mixed")
    finally:
        for process in world.processes:
            process.kill()
    return f"{how}, {transport}", wrong, longest, leaving


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--breaks", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    dice, began = random.Random(args.seed), time.monotonic()
    rows: dict[str, Counter] = defaultdict(Counter)
    failures: list[str] = []
    with tempfile.TemporaryDirectory(prefix="campaign-") as name:
        root = Path(name)
        for model, config in MODELS.items():
            make_model(root / model, config)
        world, drawn_out = World(SIZE) if args.pairs else None, 0
        for number in range(args.pairs):
            while not possible(spec := drawn(number, dice)):
                drawn_out += 1
            spec["number"] = number
            row = rows[spec["kind"]]
            row["pairs"] += 1
            try:
                out = world.call(run_pair, root, spec)
                wrong = [text for _, _, own in out for text in own]
                if not sum(compared for compared, _, _ in out):
                    wrong.append("nothing was compared")
                row["tensors"] += sum(compared for compared, _, _ in out)
                row["bytes"] += sum(received for _, received, _ in out)
            except (AssertionError, TimeoutError) as error:
                wrong = [str(error)[-600:]]
                for process in world.processes:
                    process.kill()
                world = World(SIZE)
            row["right"] += not wrong
            failures += [f"pair {number} {spec}: {text}" for text in wrong]
        if world:
            world.close()
        print("| pairs | drawn | right | tensors compared | bytes received |\n| --- | --- | --- | --- | --- |")
        for kind, row in rows.items():
            print(f"| {kind} | {row['pairs']} | {row['right']} | {row['tensors']:,} | {row['bytes']:,} |")
        total = sum(rows.values(), Counter())
        print(
            f"| all ({drawn_out} drawn that no mesh can cut) | {total['pairs']} | {total['right']} | {total['tensors']:,} | {total['bytes']:,} |\n",
            flush=True,
        )
        breaks: dict[str, list] = defaultdict(list)
        for number in range(args.breaks):
            how, wrong, longest, leaving = broken(root, dice)
            breaks[how].append((not wrong, longest, leaving))
            failures += [f"break {number} ({how}): {text}" for text in wrong]
        if breaks:
            print(
                f"| breaks, time-out {TIMEOUT:g} s | count | right | longest wait, s | longest to leave, s |\n| --- | --- | --- | --- | --- |"
            )
        for how, own in sorted(breaks.items()):
            print(
                f"| {how} | {len(own)} | {sum(ok for ok, _, _ in own)} | {max(s for _, s, _ in own):.2f} | {max(s for _, _, s in own):.2f} |"
            )
    print(f"\n{time.monotonic() - began:.0f} s, seed {args.seed}", *failures, sep="\n")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
