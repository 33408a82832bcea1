"""Steps in which one rank fails, between real gloo processes: all hear of it in its words, soon, and all can go on or leave."""

import os
import resource
import time

import pytest
import torch
import torch.distributed as dist
from sync_world import LLAMA, QWEN3_MOE, Failure, World, blank, loaded, models_of, world_of

from reshard import sync
from reshard.sync import mapping, sharing, staging

TIMEOUT = 100  # seconds: a rank that waits for this has not been told
SOON = 60  # seconds, on a machine that has other things to do


models = models_of({"llama": LLAMA, "moe": QWEN3_MOE})
world = world_of(4)


def pair(rank, root, **options):
    """Megatron TP2 on ranks 0-1 to vLLM TP2 on ranks 2-3: (session, source, into, what `into` must become)."""
    layout = sync.layout(LLAMA)
    src, dst = sync.Side.placed(layout, "megatron", tp=2, ranks=range(2)), sync.Side.placed(layout, "vllm", tp=2, ranks=(2, 3))
    held = loaded(root / "llama", src, rank, tp=2) if rank < 2 else None
    into, wanted = (blank(dst, rank), loaded(root / "llama", dst, rank, tp=2)) if rank > 1 else (None, {})
    return sync.Sync(sync.plan(src, dst, bucket_bytes=16384), **{"timeout": TIMEOUT, "transport": "p2p", **options}), held, into, wanted


def failed(call) -> tuple[str, str, float]:
    """(message, type of what it was raised from, seconds) of the SyncError that `call` raises."""
    began = time.monotonic()
    try:
        call()
    except sync.PeerLost as error:
        raise AssertionError(f"lost a peer: {error}") from None
    except sync.SyncError as error:
        return str(error), type(error.__cause__).__name__, time.monotonic() - began
    raise AssertionError("not refused")


def right(into, wanted) -> bool:
    return all(torch.equal(t, wanted[n]) for n, t in (into or {}).items())


def raising_case(rank, root, who, where, verify):
    session, held, into, wanted = pair(rank, root, verify=verify)
    session.exchange(held, into, 1)
    real, calls = staging.Copies.run, []

    def run(self):
        calls.append(self)
        if len(calls) == where:
            raise MemoryError("no room")
        real(self)

    if rank == who:
        staging.Copies.run = run
    try:
        text, cause, seconds = failed(lambda: session.exchange(held, into, 2))
    finally:
        staging.Copies.run = real
    state = session.state
    session.exchange(held, into, 3)  # the group is as good as before
    assert right(into, wanted) and session.state == ("clean" if into else "empty")
    return text, cause, seconds, state


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("who, where", [(1, 3), (1, 7), (3, 4), (2, 12)])
def test_an_error_in_packing_or_unpacking_reaches_all_in_its_own_words(world, models, who, where, verify):
    """defects.md D5: peers waited for the time-out and said only that somebody was silent."""
    for rank, (text, cause, seconds, state) in enumerate(world.call(raising_case, models, who, where, verify)):
        assert f"rank {who}: MemoryError: no room" in text and "mixed" in text
        assert cause == ("MemoryError" if rank == who else "SyncError" if f"rank {rank}: " in text else "NoneType")
        assert seconds < SOON
        assert state == ("mixed" if rank > 1 else "empty")


def making_case(rank, root):
    session, held, into, wanted = pair(rank, root)
    make = session._make
    if rank == 3:

        def fail(*_):
            raise MemoryError("no buffer")

        session._make = fail
    out = failed(lambda: session.exchange(held, into, 1))
    session._make = make
    session.exchange(held, into, 1)
    assert right(into, wanted)
    return out


def test_buffers_that_cannot_be_made_are_a_refusal(world, models):
    """defects.md D5: nothing has moved, no engine is mixed."""
    for rank, (text, cause, seconds) in enumerate(world.call(making_case, models)):
        assert text == "the sync was refused before its first byte: rank 3: MemoryError: no buffer"
        assert cause == ("MemoryError" if rank == 3 else "NoneType") and seconds < SOON


def version_case(rank, root, version):
    session, held, into, _ = pair(rank, root)
    out = failed(lambda: session.exchange(held, into, version if rank == 1 else 1))
    session.exchange(held, into, 1)
    return out


@pytest.mark.parametrize(
    "version, said", [("seven", "'seven' is no whole number"), (2**70, "is not between"), (-1, "is not between"), (1.5, "1.5 is no")]
)
def test_a_version_that_is_none_is_refused_by_all(world, models, version, said):
    """defects.md D14: it raised on one rank before the agreement; the others waited for it."""
    for text, _, seconds in world.call(version_case, models, version):
        assert "rank 1: version" in text and said in text and seconds < SOON


def settings_case(rank, root, options):
    session, held, into, wanted = pair(rank, root, **(options if rank == 2 else {}))
    return failed(lambda: session.exchange(held, into, 1))


@pytest.mark.parametrize("options", [{"verify": True}, {"transport": "auto"}])
def test_ranks_with_other_settings_are_refused(world, models, options):
    """One rank would wait for sums, or for memory to map, that the others do not give."""
    (name, value), *_ = options.items()
    for text, _, seconds in world.call(settings_case, models, options):
        assert f"different settings of {name}" in text and f"{value} on ranks [2]" in text and seconds < SOON


def buckets_case(rank, root, how):
    layout = sync.layout(QWEN3_MOE)
    src = sync.Side.placed(layout, "megatron", ep=2, etp=1, ranks=range(2))
    dst = sync.Side.placed(layout, "hf", ranks=(2, 3))
    session = sync.Sync(sync.plan(src, dst, bucket_bytes=1 << 15), timeout=TIMEOUT)
    held = loaded(root / "moe", src, rank, ep=2, etp=1) if rank < 2 else None

    def take():
        for number, _ in enumerate(session.buckets(version=1)):
            if rank == 3 and number == 2:
                if how == "raises":
                    raise OSError("the engine cannot load it")
                break

    began = time.monotonic()
    try:
        take() if rank > 1 else session.exchange(held, version=1)
        out = "nothing"
    except (sync.SyncError, OSError) as error:
        out = str(error)
    seconds, state = time.monotonic() - began, session.state
    if rank > 1:
        assert sum(len(bucket.tensors) for bucket in session.buckets(version=2)) > 0
    else:
        session.exchange(held, version=2)
    return out, seconds, state


@pytest.mark.parametrize("how", ["breaks", "raises"])
def test_a_taker_that_stops_between_buckets_is_told_to_all(world, models, how):
    """defects.md D11: the trainers waited for the time-out."""
    out = world.call(buckets_case, models, how)
    for rank in (0, 1, 2):
        text, seconds, state = out[rank]
        assert "rank 3: it stopped before the last window" in text and seconds < SOON
        assert state == ("mixed" if rank == 2 else "empty")
    assert out[3][0] == ("nothing" if how == "breaks" else "the engine cannot load it") and out[3][2] == "mixed"


# ---------------------------------------------------------------------------------------------- memory that cannot be mapped


def unmapped_case(rank, root, how, transport):
    session, held, into, wanted = pair(rank, root, transport=transport)
    kept = mapping.room, sharing.publish, mapping.open_storage, resource.getrlimit(resource.RLIMIT_NOFILE)

    def fail(*_):
        raise RuntimeError("expandable segments cannot be shared")

    if how == "room":  # each rank's need fits, their sum does not
        mapping.room = lambda: 300_000
    if how == "publish" and rank == 1:
        sharing.publish = fail
    if how == "open" and rank == 2:
        mapping.open_storage = fail
    if how == "files" and rank == 0:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 70, kept[3][1]))
    try:
        if transport == "mapped":
            return failed(lambda: session.exchange(held, into, 1))[0]
        stats = session.exchange(held, into, 1)
    finally:
        mapping.room, sharing.publish, mapping.open_storage = kept[:3]
        resource.setrlimit(resource.RLIMIT_NOFILE, kept[3])
    assert right(into, wanted)
    session.exchange(held, into, 2)
    return stats.mapped, stats.taken, stats.note


@pytest.mark.parametrize("how, said", [("room", "bytes of shared memory and has 300,000"), ("publish", "rank 1: RuntimeError: expandable segments cannot be shared"),
                                       ("open", "rank 2: RuntimeError: expandable"), ("files", "rank 0: 27 tensors in shared memory take a file descriptor each")])  # fmt: skip
def test_auto_sends_where_memory_cannot_be_mapped_and_mapped_is_refused_by_all(world, models, how, said):
    """defects.md D7, E8: one process raised, the others waited for it and lost it. Without any hint of room per node."""
    out = world.call(unmapped_case, models, how, "auto")
    for rank, (mapped, taken, note) in enumerate(out):
        assert said in note and note.startswith("by message, not mapped: ")
        if rank > 1:
            assert (taken > 0) == (how != "open" or rank == 2) and (mapped > 0) == (how != "room" and (how != "open" or rank == 3))
    out = world.call(unmapped_case, models, how, "mapped")
    assert len(set(out)) == 1 and said in out[0] and "refused before its first byte" in out[0]


def apart_case(rank, root):
    """Trainers on one node, engines on another, as far as they know."""
    published, real, own = [], sharing.publish, mapping.node
    sharing.publish = lambda *a: published.append(1) or real(*a)
    mapping.node = lambda: 1000 + rank // 2
    try:
        session, held, into, wanted = pair(rank, root, transport="auto")
        stats = session.exchange(held, into, 1)
    finally:
        sharing.publish, mapping.node = real, own
    assert right(into, wanted)
    return len(published), stats.mapped, any(t.is_shared() for t in (held or {}).values())


def test_nothing_is_published_for_takers_of_another_node(world, models):
    """defects.md E4: handles that nobody opened kept a model's memory for each step; on the CPU they filled /dev/shm."""
    assert world.call(apart_case, models) == [(0, 0, False)] * 4


# ------------------------------------------------------------------------------------------------------- leaving a broken group


def leaving_case(rank, root, how, who):
    session, held, into, _ = pair(rank, root, timeout=3 if how == "silent" else TIMEOUT)
    session.exchange(held, into, 1)
    if rank == who:
        if how == "silent":
            time.sleep(3600)  # until it is killed
        session.abort("the disk is full")
        return 0.0, "", True
    began = time.monotonic()
    try:
        session.exchange(held, into, 2)
    except sync.PeerLost as error:
        text = str(error)
    lost = time.monotonic() - began
    again = failed_again(session, held, into)
    del session
    began = time.monotonic()
    dist.destroy_process_group()
    left = time.monotonic() - began
    assert left < 30, left
    return lost, text, again


def failed_again(session, held, into) -> bool:
    try:
        session.exchange(held, into, 3)
    except sync.SyncError as error:
        return "is broken" in str(error)
    return False


@pytest.mark.parametrize("how, who", [("silent", 0), ("silent", 3), ("aborts", 1), ("aborts", 2)])
def test_processes_leave_a_broken_group_at_once(models, how, who):
    """defects.md D6: destroy_process_group waited for gloo's threads, which sat in a collective with the silent peer."""
    world = World(4)
    others, texts = [r for r in range(4) if r != who], []
    try:
        for r in range(4):
            world.pipes[r].send((leaving_case, (models, how, who)))
        for r in others:
            assert world.pipes[r].poll(90), f"rank {r} hangs"
            answer = world.pipes[r].recv()
            assert not isinstance(answer, Failure), answer.text
            lost, text, again = answer
            assert again and "a peer is gone" in text
            assert lost < SOON
            texts.append(text)
        # the store that carries the reason ends with the process that keeps it, which may leave before another has looked
        assert how != "aborts" or any(f"rank {who}: the disk is full" in text for text in texts)
        for r in others:
            world.pipes[r].send(None)
            world.processes[r].join(60)
            assert world.processes[r].exitcode == 0
    finally:
        for process in world.processes:
            process.kill()
