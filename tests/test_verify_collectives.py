"""What ranks of a verification say to each other over NCCL, shown without a GPU: whole runs on torch's fake process group, rank after rank.

Nothing waits on the fake group, so that each rank's sequence of collectives and messages can be noted from beginning to end. They are
then held against NCCL's rule: a rank goes on when all members of its next call have come to that call, and not before. gloo keeps
messages for a peer that is late, and hides what would lock there.
"""

import itertools
import queue
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import reshard
from reshard.errors import FormatError

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM

from reshard.verify import group, launch, parallel, run
from reshard.verify.build import build
from reshard.verify.devices import Device
from reshard.verify.group import seats
from reshard.verify.model import empty_model, hush
from reshard.verify.request import Request
from reshard.verify.shards import open_shards
from reshard.verify.slices import Slices
from reshard.verify.tables import table

SAMPLES = Path(__file__).parents[2] / "shared" / "samples"
pytestmark = pytest.mark.models


def said_by(request: Request, world: int, number: int, monkeypatch) -> list[tuple]:
    """(what, between whom, of what shape) for each call of rank `number` in the real ``verify_rank``, from the first to the last."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    calls: list[tuple] = []

    def members(handle) -> tuple[int, ...]:
        return tuple(dist.get_process_group_ranks(handle or dist.group.WORLD))

    def note(name, between):
        real = getattr(dist, name)

        def noted(*args, **options):
            x = args[1] if name == "all_gather" else args[0]
            calls.append((name, between(*args, **options), tuple(x.shape)))
            return real(*args, **options)

        monkeypatch.setattr(dist, name, noted)

    with monkeypatch.context() as monkeypatch:
        note("all_reduce", lambda x, group=None: members(group))
        note("all_gather", lambda parts, x, group=None: members(group))
        note("send", lambda x, to: (number, to))
        note("recv", lambda x, source: (source, number))
        # what goes by gloo whatever the tensors go by, and the original
        monkeypatch.setattr(run, "control_group", lambda: None)
        monkeypatch.setattr(run, "agree", lambda problems, control: None)
        monkeypatch.setattr(run, "gather", lambda own, control: [])
        monkeypatch.setattr(dist, "broadcast_object_list", lambda objects, **_: objects.__setitem__(0, {}))
        monkeypatch.setattr(run, "run_reference", lambda *_: None)
        dist.init_process_group("fake", store=FakeStore(), rank=number, world_size=world)
        try:
            assert run.verify_rank(request, number, world, 0, 1) is None
        finally:
            dist.destroy_process_group()
    return calls


def stuck(said: list[list[tuple]]) -> dict[int, tuple]:
    """The call in which each rank waits for good by NCCL's rule; nothing where all come to their end."""
    at = [0] * len(said)
    moved = True
    while moved:
        moved = False
        for own in range(len(said)):
            if at[own] == len(said[own]):
                continue
            name, between, shape = said[own][at[own]]
            needs = [("send" if rank == between[0] else "recv") if name in ("send", "recv") else name for rank in between]
            if all(at[r] < len(said[r]) and said[r][at[r]] == (need, between, shape) for r, need in zip(between, needs)):
                for rank in between:
                    at[rank] += 1
                moved = True
    return {rank: calls[at[rank]] for rank, calls in enumerate(said) if at[rank] < len(calls)}


CUT = {
    "Megatron TP2 PP2": ("llama", {"format": "megatron", "tp": 2, "pp": 2}, 4),
    "Megatron TP2 PP2, tied": ("llama-tied", {"format": "megatron", "tp": 2, "pp": 2}, 4),
    "Megatron TP2 EP2, experts": ("qwen3_moe", {"format": "megatron", "tp": 2, "ep": 2}, 4),
    "vLLM TP4": ("llama", {"format": "vllm", "tp": 4}, 4),
    "vLLM TP2, latent attention, experts": ("deepseek_v3", {"format": "vllm", "tp": 2}, 2),
}


@pytest.mark.parametrize("case", CUT)
def test_no_rank_waits_for_one_that_waits_for_it(case, tmp_path, monkeypatch):
    """Issue 18: a forward with its pipeline's messages, all planted defects and every expert, in NCCL's strict order"""
    name, options, world = CUT[case]
    reshard.convert(SAMPLES / "hf" / name, tmp_path / "out", **options)
    request = Request(tmp_path / "out", SAMPLES / "hf" / name)
    said = [said_by(request, world, rank, monkeypatch) for rank in range(world)]
    assert all(said), "a rank that says nothing"
    kinds = {call[0] for calls in said for call in calls}
    assert kinds == {"all_reduce", "all_gather", *(("send", "recv") if options.get("pp") else ())}
    assert stuck(said) == {}
    # negative controls: what the check must see
    late = next(i for i, call in enumerate(said[0]) if call[0] == ("send" if options.get("pp") else "all_reduce"))
    for spoilt in (said[0][:late] + said[0][late + 1 :], [*said[0][:late], ("all_reduce", tuple(range(world)), (1,)), *said[0][late:]]):
        assert stuck([spoilt, *said[1:]]), "a call too few, or one too many, went unseen"


def test_a_tied_models_last_stage_without_the_embedding_has_the_logits_computed_where_it_is(tmp_path, monkeypatch):
    """Two stages as two threads: hidden states go on, and back to the first stage, and make transformers' own logits there"""
    hush()
    original = SAMPLES / "hf/llama-tied"
    reshard.convert(original, tmp_path / "out", format="tp", pp=2, fsync=False)
    shards, ids = open_shards(tmp_path / "out").named(table("llama", "hf")), torch.arange(12)[None] * 7
    assert [any("embed" in name or "head" in name for name in names) for names in shards.tables] == [True, False]
    here, sent = threading.local(), defaultdict(queue.Queue)
    monkeypatch.setattr(parallel, "send", lambda x, to: sent[here.rank, to].put(x.clone()))
    monkeypatch.setattr(parallel, "receive", lambda shape, dtype, device, source: sent[source, here.rank].get(timeout=30).view(shape))
    places = seats(shards.mesh, shards.ranks)

    def rank(number: int) -> tuple[bool, torch.Tensor]:
        here.rank = number
        with torch.no_grad():
            m = empty_model(run.read_config(Request(tmp_path / "out", original)))
            s = Slices(shards, places, number, m, {(0,): None, (1,): None}, torch.device("cpu"), torch.float32)
            build(s, m)
            assert s.problems == []
            return s.computes_logits, m.module(ids, use_cache=False).logits

    with ThreadPoolExecutor(2) as pool:
        (first, logits), (last, _) = pool.map(rank, range(2))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)(ids).logits
    assert (first, last) == (True, False) and all(messages.empty() for messages in sent.values())
    torch.testing.assert_close(logits, expected)
    assert not torch.allclose(logits, expected.roll(1, -1)), "logits that tell nothing"


def test_the_rule_itself_tells_crossed_messages_from_ordered_ones():
    ask, answer = [("send", (0, 1), (2,)), ("recv", (1, 0), (2,))], [("recv", (0, 1), (2,)), ("send", (1, 0), (2,))]
    assert stuck([ask, answer]) == {} and set(stuck([ask, answer[::-1]])) == {0, 1}
    assert set(stuck([[("send", (0, 1), (2,))], [("recv", (0, 1), (3,))]])) == {0, 1}


def test_tensors_go_as_they_are_by_nccl_and_by_way_of_the_host_by_gloo(monkeypatch):
    """Ranks that share a GPU must use gloo, which cannot read a device's memory: defects.md E2, for verify"""
    on_gpu = SimpleNamespace(is_cuda=True, cpu=lambda: "on the host")
    monkeypatch.setattr(dist, "get_backend", lambda *_: "nccl")
    assert group._carried(on_gpu) is on_gpu
    monkeypatch.setattr(dist, "get_backend", lambda *_: "gloo")
    assert group._carried(on_gpu) == "on the host" and group._carried(here := torch.ones(1)) is here


class Begun(Exception):
    """Raised where a process group would be made."""


def begun(names: list[str], monkeypatch, nccl: bool = True) -> list:
    """The backend that each rank makes its group with, or what it raises; all meet in one store, as processes would."""
    store, out = dist.HashStore(), [None] * len(names)
    monkeypatch.setattr(dist, "rendezvous", lambda where, rank, world: iter([(store, rank, world)]))
    monkeypatch.setattr(launch, "_RUNS", itertools.repeat(0))
    free = lambda *_: (9 << 30, 80 << 30)  # noqa: E731
    monkeypatch.setattr(torch.cuda, "mem_get_info", free)

    def describe(kind, rank, local):
        problem = "" if names[rank] else f"rank {rank} on h: torch sees no GPU here"
        return Device(rank, kind, names[rank], 9 << 30, 80 << 30, nccl, problem, "use --device cpu" if problem else "")

    def make(backend, **options):
        raise Begun(backend)

    monkeypatch.setattr("reshard.verify.devices.describe", describe)
    monkeypatch.setattr(dist, "init_process_group", make)

    def rank(number: int) -> None:
        try:
            launch._in_group(Request(Path("x"), Path("y"), device="cuda"), number, len(names), 0, 1, "env://")
        except (Begun, FormatError) as error:
            out[number] = error

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(len(names))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return out


@pytest.mark.parametrize(
    "names, backend",
    [(["a", "b", "c", "d"], "nccl"), (["a", "b", "c", "c"], "gloo"), (["a", "a"], "gloo"), (["a"], "nccl")],
)
def test_all_ranks_make_their_group_with_one_backend(names, backend, monkeypatch):
    """defects.md E9: chosen on each node by counts, two GPUs here and one there were NCCL here and gloo there, and hung"""
    assert [str(found) for found in begun(names, monkeypatch)] == [backend] * len(names)
    assert {str(found) for found in begun(names, monkeypatch, nccl=False)} == {"gloo"}


def test_a_rank_without_a_gpu_stops_all_before_any_group_is_made(monkeypatch):
    found = begun(["a", "", "c"], monkeypatch)
    assert all(isinstance(error, FormatError) and "rank 1 on h" in str(error) and error.hint for error in found)


def test_a_rank_that_fails_tells_the_others_before_it_aborts_anything(monkeypatch):
    """defects.md E10: an abort may itself wait for a communicator, and then nobody would ever hear"""
    from reshard.verify.watch import Watch

    done: list[str] = []
    begun(["a"], monkeypatch)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: done.append(backend))
    monkeypatch.setattr(run, "verify_rank", lambda *_: exec("raise RuntimeError('CUDA out of memory')"))
    monkeypatch.setattr(Watch, "tell", lambda self, error: done.append(f"told: {error}"))
    monkeypatch.setattr(launch, "_abort", lambda: done.append("aborted"))
    with pytest.raises(RuntimeError, match="out of memory"):
        launch._in_group(Request(Path("x"), Path("y"), device="cuda"), 0, 1, 0, 1, "env://")
    assert done == ["nccl", "told: CUDA out of memory", "aborted"]


@pytest.mark.parametrize("method", ["tp", "permute"])
def test_memory_is_added_up_before_the_original_is_run(method, monkeypatch):
    """Issue 18: beforehand, and refused; not when half of it is loaded"""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from reshard.verify import permute

    where, done = (run if method == "tp" else permute), []
    monkeypatch.setattr(where, "check_budget", lambda *_: done.append("added up"))
    monkeypatch.setattr(where, "run_reference", lambda *_: done.append("run") or exec("raise Begun", {"Begun": Begun}))
    request = Request(SAMPLES / "vllm/llama-tp2", SAMPLES / "vllm/hf/llama")
    if method == "permute":
        with pytest.raises(Begun):
            permute.verify_permuted(request)
    else:
        monkeypatch.setattr(run, "control_group", lambda: None)
        monkeypatch.setattr(run, "agree", lambda problems, control: exec("raise Begun", {"Begun": Begun}) if problems else None)
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
        try:
            with pytest.raises(Begun):
                run.verify_rank(request, 0, 2, 0, 1)
        finally:
            dist.destroy_process_group()
    assert done == ["added up", "run"]
