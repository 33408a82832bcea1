"""Weight sync between real processes over gloo, judged by `reshard.load` of the same checkpoint, bit for bit.

One process group of eight serves all cases but those that break it.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sync_world import LLAMA, QWEN3_MOE, Failure, World, blank, loaded, models_of, world_of

from reshard import sync

MODELS = {"llama": LLAMA, "moe": QWEN3_MOE}
TP4 = ("megatron", range(4), {"tp": 4})
CASES = {
    "tp4→tp2": ("wide", TP4, ("vllm", range(4, 6), {"tp": 2})),
    "tp4→tp3": ("wide", ("tp", range(4), {"tp": 4}), ("vllm", range(4, 7), {"tp": 3})),
    "tp2×pp2→tp4": ("wide", ("megatron", range(4), {"tp": 2, "pp": 2}), ("sglang", range(4, 8), {"tp": 4})),
    "ep4→tp2": ("moe", ("megatron", range(4), {"ep": 4, "etp": 1}), ("vllm", range(4, 6), {"tp": 2})),
    "dp2 replicas": ("llama", ("megatron", range(4), {"tp": 2}), ("vllm", range(4, 7), {"tp": 3})),
    "tp2·dp4→tp4": ("wide", ("megatron", range(8), {"tp": 2}), ("vllm", range(4, 8), {"tp": 4})),
    "colocated": ("wide", ("megatron", range(8), {"tp": 4, "pp": 2}), ("vllm", range(8), {"tp": 2})),
    "two engines": ("llama", ("megatron", range(2), {"tp": 2}), ("vllm", range(2, 8), {"tp": 3})),
}
MODELS["wide"] = {**LLAMA, "num_attention_heads": 24, "num_key_value_heads": 12}


models = models_of(MODELS)
world = world_of(8)


def placed(layout, side):
    format, ranks, mesh = side
    return sync.Side.placed(layout, format, ranks=ranks, **mesh)


def run_case(rank, root, name, options):
    """Three steps, the weights changed between them; returns bytes (sent, received, their bounds) and what was compared."""
    model, source, target = CASES[name]
    layout = sync.layout(MODELS[model])
    src, dst = placed(layout, source), placed(layout, target)
    plan = sync.plan(src, dst, bucket_bytes=16384)
    session = sync.Sync(plan, timeout=30, verify=True, **options)
    held = loaded(root / model, src, rank, **source[2]) if rank in src.processes else None
    into = blank(dst, rank) if rank in dst.processes else None
    wanted = loaded(root / model, dst, rank, **target[2]) if into else {}
    compared = 0
    for step in (1, 2, 5):
        for state in (held or {}, wanted):
            for tensor in state.values():  # what an optimizer does: the same elementwise change on both sides, in place
                tensor.mul_(step)
        stats = session.exchange(held, into, version=step)
        assert session.version == step and session.state == ("clean" if into else "empty")
        for n, tensor in (into or {}).items():
            assert torch.equal(tensor, wanted[n]), (rank, step, n)
            compared += 1
    cost = plan.cost().ranks.get(rank)
    replicas = len(plan.shared(rank)) if held else 0
    assert stats.checks < 16 * len(session._parts["tensors"][0].transfers) + 8 * 8 * replicas + 1
    return (stats.sent, stats.received, cost.sent, cost.bound, compared) if cost else (stats.sent, stats.received, 0, 0, 0)


@pytest.mark.parametrize("transport", ["p2p", "auto"])
@pytest.mark.parametrize("name", CASES)
def test_engines_hold_what_load_gives(world, models, name, transport):
    out = world.call(run_case, models, name, {"transport": transport})
    assert sum(compared for *_, compared in out) > 0
    for sent, received, planned, bound, _ in out:
        assert received == bound  # counted at the transport; the bound from the two layouts alone
        assert sent == (planned if transport == "p2p" else 0)
    if name == "tp2·dp4→tp4" and transport == "p2p":
        loads = [sent for sent, *_ in out]
        assert max(loads[:4]) <= sum(o[1] for o in out) / 4  # replicas share; engines' own ranks hold a part of what they want


def fsdp_case(rank, root, transport):
    """A module under FSDP2 over tensor parallelism, by torch; its DTensors are read, nothing is said of them."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    layout = sync.layout(LLAMA)
    mesh = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("dp", "tp"))
    declared = sync.fsdp(layout, dp=2, tp=2, ranks=range(4))
    model = None
    if rank < 4:
        model = torch.nn.Module()
        for name, tensor in load_file(root / "llama/model.safetensors").items():
            *path, leaf = name.split(".")
            at = model
            for part in path:
                if not hasattr(at, part):
                    at.add_module(part, torch.nn.Module())
                at = getattr(at, part)
            cut = Replicate() if "norm" in name else Shard(1) if name.endswith(("o_proj.weight", "down_proj.weight")) else Shard(0)
            at.register_parameter(leaf, torch.nn.Parameter(distribute_tensor(tensor, mesh["tp"], [cut])))
        for layer in model.model.layers.children():
            fully_shard(layer, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
        read = sync.shardings(model.named_parameters())
        assert any(isinstance(cut, tuple) for s in read.values() for cut in s.cuts), "expected strided shards"
        assert sync.plan(sync.Side.sharded(layout, read), sync.Side.placed(layout, "vllm", tp=3, ranks=range(3, 6))).loads
    plan = sync.plan(sync.Side.sharded(layout, declared), dst := sync.Side.placed(layout, "vllm", tp=3, ranks=range(3, 6)))
    session = sync.Sync(plan, timeout=30, transport=transport, verify=True)
    into = blank(dst, rank) if rank in dst.processes else None
    stats = session.exchange(model.named_parameters() if model else None, into, 1)
    if into:
        wanted = loaded(root / "llama", dst, rank, tp=3)
        assert all(torch.equal(t, wanted[n]) for n, t in into.items())
        assert stats.received == plan.cost().ranks[rank].bound
    return stats.received


@pytest.mark.parametrize("transport", ["p2p", "auto"])
def test_fsdp2_over_tp_to_tp3(world, models, transport):
    assert sum(world.call(fsdp_case, models, transport)) > 0


def bucket_case(rank, root):
    layout = sync.layout(QWEN3_MOE)
    src = sync.Side.placed(layout, "megatron", ep=4, etp=1, ranks=range(4))
    dst = sync.Side.placed(layout, "hf", ranks=range(3, 6))
    session = sync.Sync(sync.plan(src, dst, bucket_bytes=1 << 15), timeout=30, verify=True)
    held = loaded(root / "moe", src, rank, ep=4, etp=1) if rank < 4 else None
    if rank not in dst.processes:
        session.exchange(held, version=1)
        return None
    seen, kept = {}, []
    for bucket in session.buckets(held, version=1):
        assert bucket.flat.numel() <= 1 << 15 or len(bucket.tensors) == 1
        for (name, tensor), (same, shape, dtype, low, high) in zip(bucket.tensors, bucket.layout):
            assert same == name and torch.equal(bucket.flat[low:high].view(dtype).view(shape), tensor)
            seen[name] = tensor
        kept.append(bucket)
    assert session.state == "clean" and len(kept) > 3
    whole = load_file(root / "moe/model.safetensors")
    assert set(seen) == set(whole) and all(torch.equal(seen[n], whole[n]) for n in whole)
    return session.stats.received


def test_buckets_of_whole_tensors_for_engines_that_load_by_name(world, models):
    out = world.call(bucket_case, models)
    size = sum(t.numel() * 2 for t in load_file(models / "moe/model.safetensors").values())
    assert out[4] == out[5] == size and out[3] < size


def replan_case(rank, root):
    layout = sync.layout(LLAMA)
    src = sync.Side.placed(layout, "megatron", tp=2, ranks=range(2))
    sides = [sync.Side.placed(layout, "vllm", tp=tp, ranks=range(2, 2 + tp)) for tp in (2, 3)]
    held = loaded(root / "llama", src, rank, tp=2) if rank < 2 else None
    session = sync.Sync(sync.plan(src, sides[0]), timeout=30)
    for step, dst in enumerate(sides, 1):
        if step == 2:
            session.replan(sync.plan(src, dst))
        into = blank(dst, rank) if rank in dst.processes else None
        session.exchange(held, into, version=step)
        wanted = loaded(root / "llama", dst, rank, tp=step + 1) if into else {}
        assert all(torch.equal(t, wanted[n]) for n, t in (into or {}).items())


def test_another_mesh_with_the_same_object(world, models):
    world.call(replan_case, models)


# --------------------------------------------------------------------------------------------------------------- what goes wrong


def worlds_case(rank, root, port):
    """A trainer's world and an engine's, each of two processes that call themselves 0 and 1, joined by a third group."""
    import torch.distributed as dist

    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port + rank // 2}", rank=rank % 2, world_size=2)
    group = sync.joined(f"tcp://127.0.0.1:{port + 2}", rank, 4, backend="gloo", timeout=30)
    layout = sync.layout(LLAMA)
    src, dst = sync.Side.placed(layout, "megatron", tp=2, ranks=range(2)), sync.Side.placed(layout, "vllm", tp=2, ranks=(2, 3))
    for step, transport in enumerate(("p2p", "auto"), 1):
        session, into = (
            sync.Sync(sync.plan(src, dst), group, timeout=30, transport=transport, verify=True),
            blank(dst, rank) if rank > 1 else None,
        )
        session.exchange(loaded(root / "llama", src, rank, tp=2) if rank < 2 else None, into, step)
        wanted = loaded(root / "llama", dst, rank, tp=2) if into else {}
        assert all(torch.equal(t, wanted[n]) for n, t in (into or {}).items())


def test_a_group_that_joins_two_worlds(models):
    from sync_world import free_ports

    world = World(4)
    try:
        world.call(worlds_case, models, free_ports(3))
    finally:
        world.close()


def pair(rank, root, **options):
    """Megatron TP2 on ranks 0-1 to vLLM TP2 on ranks 2-3: (session, source, into)."""
    layout = sync.layout(LLAMA)
    src, dst = sync.Side.placed(layout, "megatron", tp=2, ranks=range(2)), sync.Side.placed(layout, "vllm", tp=2, ranks=(2, 3))
    held = loaded(root / "llama", src, rank, tp=2) if rank < 2 else None
    return (
        sync.Sync(sync.plan(src, dst), **{"timeout": 30, "transport": "p2p", **options}),
        held,
        blank(dst, rank) if rank in (2, 3) else None,
    )


def refused(call) -> str:
    try:
        call()
    except sync.SyncError as error:
        return str(error)
    raise AssertionError("not refused")


def refusal_case(rank, root):
    session, held, into = pair(rank, root)
    out = {}
    bad = {**held, "decoder.final_layernorm.weight": torch.zeros(47, dtype=torch.bfloat16)} if rank == 1 else held
    out["shape"] = refused(lambda: session.exchange(bad, into, 1))
    assert session.state == "empty" and (not into or all((t == 7).all() for t in into.values()))
    out["missing"] = refused(lambda: session.exchange(held, None, 1))
    session.exchange(held, into, 3)
    before = {n: t.clone() for n, t in (into or {}).items()}
    out["stale"] = refused(lambda: session.exchange(held, into, 3))
    out["versions"] = refused(lambda: session.exchange(held, into, 4 + (rank == 2)))
    layout = sync.layout(LLAMA)
    other = sync.plan(sync.Side.placed(layout, "megatron", tp=2, ranks=range(2)), sync.Side.placed(layout, "vllm", tp=2, ranks=(3, 2)))
    mine = session.plan
    if rank == 2:
        session.replan(other)
    out["plans"] = refused(lambda: session.exchange(held, into, 4))
    session.replan(mine)
    assert all(torch.equal(t, before[n]) for n, t in (into or {}).items()) and session.version == 3
    session.exchange(held, into, 4)
    return out


def test_nothing_moves_unless_all_ranks_agree(world, models):
    answers = world.call(refusal_case, models)
    for out in answers:
        assert out == answers[0]
    out = answers[0]
    assert "rank 1: source: decoder.final_layernorm.weight: shape [47], expected [48] on rank 1 of megatron tp2" in out["shape"]
    assert "rank 2 is among the destination's ranks: it has to pass tensors to fill" in out["missing"]
    assert out["stale"] == "version 3 is stale: rank 2 already holds 3" or "already holds 3" in out["stale"]
    assert "rank 2 at 5" in out["versions"]
    assert "ranks made different plans" in out["plans"] and "on ranks [2]" in out["plans"]


def spoilt_case(rank, root, transport, how):
    """On rank 3 one bit flips, or two heads change places, or unpacking raises, after the bytes came; once."""
    session, held, into = pair(rank, root, verify=True, transport=transport)
    session.exchange(held, into, 1)
    run = session._ready.move

    def spoil(*args):
        run(*args)
        if rank == 3:
            q = into["model.layers.1.self_attn.qkv_proj.weight"]
            if how == "bit":
                q.view(torch.int16)[3, 3] ^= 1
            elif how == "heads":
                q[:16] = q[:16].view(2, 8, 48).flip(0).reshape(16, 48)
            else:
                raise MemoryError("no room")

    session._ready.move = spoil
    text = refused(lambda: session.exchange(held, into, 2))
    assert session.version == 1 and session.state == ("mixed" if into else "empty")
    session.exchange(held, into, 3)
    assert session.state == ("clean" if into else "empty")
    return text


@pytest.mark.parametrize("how, transport", [("bit", "p2p"), ("bit", "auto"), ("heads", "p2p"), ("heads", "auto"), ("error", "auto")])
def test_a_spoilt_sync_is_told_to_all_and_leaves_the_engine_mixed(world, models, transport, how):
    answers = world.call(spoilt_case, models, transport, how) if how != "error" else world.call(error_case, models)
    for text in answers:
        assert text == answers[0]
    expected = "MemoryError: no room" if how == "error" else "tensors arrived with other values than were sent: q of layer 1 from rank 1"
    assert f"rank 3: {'1 ' if how != 'error' else ''}{expected}" in answers[0]
    assert "the engines' weights are mixed: sync again before they are used" in answers[0]


def error_case(rank, root):
    """An error of no peer's making. By messages its peers would wait for it until the time-out, as for a silent one."""
    session, held, into = pair(rank, root, transport="auto")
    session.exchange(held, into, 1)
    if rank == 3:

        def fail(*_):
            raise MemoryError("no room")

        session._ready.move = fail
    text = refused(lambda: session.exchange(held, into, 2))
    assert session.state == ("mixed" if into else "empty")
    return text


def lost_case(rank, root, timeout, dies, how):
    session, held, into = pair(rank, root, timeout=timeout)
    session.exchange(held, into, 1)
    if rank == dies:
        if how == "dies":
            session._wire.run = lambda staging: os._exit(1)
        else:
            session._wire.run = lambda staging: os.kill(os.getpid(), signal.SIGSTOP)
    began = time.monotonic()
    try:
        session.exchange(held, into, 2)
    except sync.PeerLost as error:
        return time.monotonic() - began, str(error), session.state
    return None


@pytest.mark.parametrize("dies", [1, 2])
@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_lost_peer_is_an_error_in_time(models, dies, how):
    world = World(4)
    others = [r for r in range(4) if r != dies]
    try:
        for r in range(4):
            world.pipes[r].send((lost_case, (models, 4.0, dies, how)))
        for r in others:
            assert world.pipes[r].poll(120), f"rank {r} hangs"
            answer = world.pipes[r].recv()
            assert not isinstance(answer, Failure), answer.text
            seconds, text, state = answer
            assert seconds < 2 * 4 + 60  # its own wait, then that for the others' last word, on a machine that has other things to do
            assert "a peer is gone" in text
            assert state == ("mixed" if r >= 2 else "empty")
    finally:
        for process in world.processes:
            process.kill()


@pytest.mark.models
def test_the_grpo_example_learns_and_its_engine_follows():
    root = Path(__file__).parents[1]
    run = subprocess.run([sys.executable, "examples/grpo_loop.py", "--steps", "8"], check=False, cwd=root, capture_output=True, text=True, timeout=300,
                         env={**os.environ, "PYTHONPATH": str(root)})  # fmt: skip
    assert run.returncode == 0, run.stderr
    steps = [line.split() for line in run.stdout.splitlines() if line.startswith("step")]
    assert len(steps) == 8
    assert float(steps[-1][3]) > float(steps[0][3]) + 0.1  # the reward rises: the engine samples from the weights just learnt
    assert {step[5] for step in steps} == {"90,752"}
