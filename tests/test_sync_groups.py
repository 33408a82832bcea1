"""Groups that come and go beside an engine that stays, and what many steps leave behind."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from sync_world import LLAMA, Failure, World, blank, free_ports, loaded, models_of

from reshard import sync
from reshard.demo import make_model

models = models_of({"llama": LLAMA})


def held_by_process() -> dict[str, int]:
    """What a process must not gather: open files, mappings, threads, shared memory, in numbers; resident MiB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    shared = [name for name in os.listdir("/dev/shm") if name.startswith("torch_")]
    mappings = Path("/proc/self/maps").read_text().count("\n")
    return {"files": len(os.listdir("/proc/self/fd")), "maps": mappings, "shm": len(shared), "threads": int(status["Threads"]),
            "MiB": int(status["VmRSS"].split()[0]) >> 10}  # fmt: skip


def again_case(rank, root, address):
    """The same address and name, ten times over; each group is closed before the next, by some ranks later than by others."""
    layout = sync.layout(LLAMA)
    src, dst = sync.Side.placed(layout, "megatron", tp=1, ranks=[0]), sync.Side.placed(layout, "vllm", tp=2, ranks=(1, 2))
    plan, seen, names = sync.plan(src, dst), [], set()
    held, into = loaded(root / "llama", src, 0) if rank == 0 else None, blank(dst, rank) if rank else None
    wanted = loaded(root / "llama", dst, rank, tp=2) if rank else {}
    for _ in range(10):
        group = sync.joined(address, rank, 3, backend="gloo", timeout=30, name="weights")
        names.add(group.group_name)
        session = sync.Sync(plan, group, timeout=30)
        for tensor in (into or {}).values():
            tensor.zero_()
        session.exchange(held, into, 1)
        assert all(torch.equal(t, wanted[n]) for n, t in (into or {}).items())
        session.close(leave=True)
        with pytest.raises(sync.SyncError, match="this Sync was closed"):
            session.exchange(held, into, 2)
        session.close(leave=True)  # once more does nothing
        seen.append(held_by_process())
    assert len(names) == 10 and dist.is_initialized(), "the process's own group is left alone"
    return seen


def test_the_name_and_address_of_a_closed_group_serve_the_next(models):
    world = World(3)
    try:
        for seen in world.call(again_case, models, f"tcp://127.0.0.1:{free_ports(1)}"):
            assert seen[-1]["files"] <= seen[2]["files"] + 2 and seen[-1]["threads"] <= seen[2]["threads"] + 2, seen
    finally:
        world.close()


def trainer_case(rank, root, address, step, dies):
    layout = sync.layout(LLAMA)
    src, dst = sync.Side.placed(layout, "megatron", tp=1, ranks=[0]), sync.Side.placed(layout, "vllm", tp=1, ranks=[1])
    session = sync.Sync(sync.plan(src, dst), sync.joined(address, 0, 2, backend="gloo", timeout=30), timeout=30, transport="p2p")
    held = {n: t * step for n, t in loaded(root / "llama", src, 0).items()}
    session.send(held, step)
    if dies:
        os._exit(9)
    session.close(leave=True)


def engine_case(rank, root, address, dies):
    """Two trainers one after another; the first leaves, or dies and is noticed by the step that follows."""
    layout = sync.layout(LLAMA)
    src, dst = sync.Side.placed(layout, "megatron", tp=1, ranks=[0]), sync.Side.placed(layout, "vllm", tp=1, ranks=[1])
    into, out = blank(dst, 1), []
    for step in (1, 2):
        session = sync.Sync(sync.plan(src, dst), sync.joined(address, 1, 2, backend="gloo", timeout=60), timeout=30, transport="p2p")
        session.recv(into, step)
        wanted = {n: t * step for n, t in loaded(root / "llama", dst, 1).items()}
        assert session.state == "clean" and all(torch.equal(t, wanted[n]) for n, t in into.items())
        if dies and step == 1:
            with pytest.raises(sync.PeerLost):
                session.recv(into, 5)
            assert all(torch.equal(t, wanted[n]) for n, t in into.items()), "nothing had been written"
        out.append(session.state)
        session.close(leave=True)
    return out


@pytest.mark.parametrize("dies", [False, True])
def test_an_engine_outlives_its_trainer_and_takes_from_the_next(models, dies):
    world, address = World(3), f"tcp://127.0.0.1:{free_ports(1)}"
    try:
        engine, first, second = world.pipes
        engine.send((engine_case, (models, address, dies)))
        first.send((trainer_case, (models, address, 1, dies)))
        if dies:
            world.processes[1].join(60)
            assert world.processes[1].exitcode == 9
        else:
            assert first.poll(60) and not isinstance(first.recv(), Failure)
        second.send((trainer_case, (models, address, 2, False)))
        assert engine.poll(90)
        answer = engine.recv()
        assert answer == ["clean", "clean"], getattr(answer, "text", answer)
    finally:
        world.close()


def many_case(rank, root, steps, transport):
    """Tensors made anew at every step, on both sides; windows, streams and whole steps by turns."""
    layout = sync.layout({**LLAMA, "num_hidden_layers": 2})
    src, dst = sync.Side.placed(layout, "hf", ranks=range(2)), sync.Side.placed(layout, "vllm", tp=2, ranks=(2, 3))
    session = sync.Sync(sync.plan(src, dst, bucket_bytes=1 << 16), timeout=60, transport=transport, verify=True)
    whole, seen, right = (
        (loaded(root / "small", src, rank) if rank < 2 else {}),
        [],
        loaded(root / "small", dst, rank, tp=2) if rank > 1 else {},
    )
    for step in range(1, steps + 1):
        if rank < 2:
            fresh = {n: t.clone() for n, t in whole.items()}
            session.send(iter(fresh.items()), step, windows=step % 3 == 1)
        elif step % 2:
            session.recv(blank(dst, rank), step)
        else:
            done = []
            here = blank(dst, rank)
            session.recv(lambda names, here=here: {n: here[n] for n in names}, step, complete=done.extend)
            assert set(done) == set(here) and all(torch.equal(t, right[n]) for n, t in here.items())
        if step in (steps // 4, steps):
            seen.append(held_by_process())
    return seen


@pytest.mark.parametrize("transport", ["p2p", "auto"])
def test_two_hundred_updates_leave_nothing_behind(tmp_path, transport):
    make_model(tmp_path / "small", {**LLAMA, "num_hidden_layers": 2})
    world = World(4)
    try:
        for early, late in world.call(many_case, tmp_path, 200, transport):
            assert late["files"] <= early["files"] + 2 and late["shm"] <= early["shm"] + 2, (early, late)
            assert late["maps"] <= early["maps"] + 40 and late["MiB"] <= early["MiB"] + 24 and late["threads"] <= early["threads"], (
                early,
                late,
            )
    finally:
        world.close()
