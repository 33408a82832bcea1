"""NCCL's own ways, shown without it: who must be there for its first call, what a step overlaps, what a handle that nobody opens costs."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from sync_world import LLAMA, blank, loaded
from test_sync_devices import HOST, Recorder, group, on, one_rank

from reshard import sync
from reshard.demo import make_model
from reshard.sync import mapping, session, sharing
from reshard.sync.agreement import Trial
from reshard.sync.device import Devices
from reshard.sync.messages import rank_plan
from reshard.sync.staging import FLIGHTS, Parcel, Peers, Round, Staging
from reshard.sync.transport import Wire


def test_all_ranks_make_the_communicator_before_a_round_between_a_few(monkeypatch):
    """`batch_isend_irecv`: where it is a group's first call, all ranks must take part. A group of both backends (torch's default)
    agrees by gloo, so that a round was NCCL's first call, and ranks whose peers map their memory had no part in it."""
    asked, real = [], dist.all_reduce
    monkeypatch.setattr(dist, "all_reduce", lambda x, **options: asked.append(x.device) or real(x, **options))
    with group("cpu:gloo,cuda:fake"):
        wire = Wire(None, 5, Recorder())
        wire.choose(False)
        assert wire.gloo and asked == []
        wire.choose(True, HOST)
        assert not wire.gloo and asked == [HOST]
        wire.choose(False)
        wire.choose(True, HOST)
        assert asked == [HOST], "once"
    with group("fake", size=4, rank=1):
        Wire(None, 5, Recorder()).choose(True, HOST)
    assert asked == [HOST], "without gloo the first agreement is NCCL's"


class Steps:
    """A stand-in for a round's copies, that notes when it ran and within what."""

    def __init__(self, asked: list, name: str):
        self.asked, self.name = asked, name

    def run(self):
        self.asked.append(self.name)


class Streams(Recorder):
    """Notes when the side streams are left, too."""

    def side_streams(self, devices):
        within, asked = super().side_streams(devices), self.asked

        class Noted:
            def __enter__(self):
                return within.__enter__()

            def __exit__(self, *error):
                asked.append("side streams left")
                return within.__exit__(*error)

        return Noted()


@pytest.mark.parametrize("crossing", [False, True])
def test_a_round_is_packed_on_a_side_stream_while_the_one_before_it_travels(crossing, monkeypatch):
    """Issue 18: packing overlapped with sending, beside the trainer's stream; what crosses to the host is there before it is sent"""
    devices = Streams()
    with group("fake", size=2, rank=0):
        wire = Wire(None, 5, devices)
        number = iter(range(9))
        monkeypatch.setattr(wire, "_batch", lambda ops, doing: [devices.asked.append(f"sent {(n := next(number))}") or f"work {n}"])
        monkeypatch.setattr(wire, "wait", lambda work, doing: devices.asked.append(work.replace("work", "landed")))

        class Staging:
            rounds = [
                Round(Steps(devices.asked, f"packed {n}"), Steps(devices.asked, "left"), [Parcel(1, torch.zeros(8, dtype=torch.uint8), n, False)], [],
                      Steps(devices.asked, "arrived"), Steps(devices.asked, f"unpacked {n}"))
                for n in range(3)
            ]  # fmt: skip
            devices = {HOST}
            crosses = crossing

        wire.run(Staging())
    steps = [what for what in devices.asked if what.split()[0] in ("packed", "sent", "landed", "unpacked", "side")]
    assert steps[0] == "side streams" and steps[-1] == "side streams left" and steps.count("side streams") == 1
    place = {what: at for at, what in enumerate(steps)}
    assert FLIGHTS == 2
    assert [devices.asked[devices.asked.index(f"sent {n}") - 1] == "settle" for n in range(3)] == [crossing] * 3
    for n in range(2):
        assert place[f"sent {n}"] < place[f"packed {n + 1}"] < place[f"landed {n}"], "packed while the one before is under way"
        assert place[f"landed {n}"] < place[f"unpacked {n}"]
    assert place["landed 0"] < place["packed 2"], "two buffers by turns"


class Storage:
    """As torch's `_share_cuda_` answers: eight fields, three of them bytes."""

    def __init__(self, n):
        self.n, self.device = n, torch.device("cuda", 0)

    def data_ptr(self):
        return self.n

    def _share_cuda_(self):
        return 0, b"handle", 512, 0, f"counter {self.n}".encode(), self.n, b"event", True


class Tensor:
    def __init__(self, n):
        self.storage, self.device = Storage(n), torch.device("cuda", 0)

    def untyped_storage(self):
        return self.storage

    def storage_offset(self):
        return 0

    def stride(self):
        return (1,)


class Held:
    def __init__(self, n):
        self.tensor = Tensor(n)
        self.stored = type("Stored", (), {"size": 1, "rank": 0, "name": f"t{n}"})


class One(Recorder):
    def identity(self, device):
        return "GPU-a"


def test_a_handle_that_cannot_be_opened_is_given_back(monkeypatch):
    """torch keeps memory that it published until each handle was opened and let go: a container without pidfd_getfd, where
    expandable segments cannot be opened, cost the trainer a model's memory with each model that it made anew."""
    opened, given = [], []

    def open_cuda(*handle):
        if len(opened) == 1:
            raise RuntimeError("pidfd_getfd: Operation not permitted")
        opened.append(handle)
        return torch.UntypedStorage(4)

    monkeypatch.setattr(mapping, "_open_cuda", open_cuda)
    monkeypatch.setattr(mapping, "_release_cuda", lambda counter, at: given.append((counter, at)))

    published = mapping.publish({n: Held(n) for n in (1, 2, 3)}, One())
    with pytest.raises(RuntimeError, match="pidfd_getfd"):
        mapping.Mapped(published, {}, One())
    assert given == [(b"counter 2", 2), (b"counter 3", 3)], "the first was opened, and lets go by itself"
    del opened[:], given[:]
    with pytest.raises(sync.SyncError, match="is not visible"):
        mapping.Mapped([[["cuda", "GPU-z", 0, b"h".hex(), 512, 0, b"c".hex(), 7, b"e".hex(), True]], []], {}, One())
    assert given == [(b"c", 7)]


def test_handles_of_a_publish_that_fails_midway_are_given_back(monkeypatch):
    """Nobody hears of them: what they name would stay in the trainer's memory for good"""
    given = []
    monkeypatch.setattr(mapping, "_release_cuda", lambda counter, at: given.append((counter, at)))
    held = {n: Held(n) for n in (1, 2, 3)}
    assert len(mapping.publish(held, One())[0]) == 3 and given == [], "of one that succeeds none"

    def broken():
        raise RuntimeError("expandable segments")

    held[3].tensor.storage._share_cuda_ = broken
    with pytest.raises(RuntimeError, match="expandable segments"):
        mapping.publish(held, One())
    assert given == [(b"counter 1", 1), (b"counter 2", 2)]


class Meeting:
    """Ranks as threads: what each gives to a gather, all get."""

    def __init__(self, size: int):
        self.size, self.met, self.given = size, threading.Barrier(size, timeout=30), {}

    def wire(self, rank: int):
        def gather(own, doing):
            self.given[doing, rank] = own
            self.met.wait()
            return [self.given[doing, r] for r in range(self.size)]

        return SimpleNamespace(rank=rank, gather=lambda own, doing: torch.stack(gather(own, doing)), gather_bytes=gather)


@pytest.mark.parametrize("transport", ["auto", "p2p"])
@pytest.mark.parametrize("places", [(1, 1, 2, 3), (1, 1, 2, 2), (1, 2, 2, 3), (1, 1, 1, 1), (1, 1, -1, -1), (-1, -1, -1, -1)], ids=str)
def test_handles_are_published_for_takers_of_the_same_node_alone(places, transport, monkeypatch):
    """defects.md E4: rank 0 gives to 1 and 2, near or far, rank 3 to 2. A handle that nobody opens keeps its memory; to a taker that
    counts as near no message would be sent."""
    published, real = [], sharing.publish
    monkeypatch.setattr(sharing, "publish", lambda tensors, devices: published.append(tensors["t"].rank) or real(tensors, devices))
    meeting, pairs = Meeting(4), {(0, 1), (0, 2), (3, 2)}
    held = {r: SimpleNamespace(rank=r, tensor=torch.arange(8.0) + r, stored=SimpleNamespace(size=8, rank=r, name="t")) for r in (0, 3)}
    made = [sharing.Sharing(meeting.wire(rank), transport, Devices()) for rank in range(4)]

    def renew(rank: int) -> list[str]:
        source, into = ([place if r in own else -1 for r, place in enumerate(places)] for own in ((0, 3), (1, 2)))
        return made[rank].renew({pair for pair in pairs if rank in pair}, source, into, {"t": held[rank]} if rank in held else {}, Trial())

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(renew, range(4))) == [[]] * 4
    near = {(s, t) for s, t in pairs if transport == "auto" and places[s] == places[t] >= 0}
    assert sorted(published) == sorted({s for s, _ in near})
    for rank, own in enumerate(made):
        assert own.peers == Peers(frozenset(t for s, t in near if s == rank), frozenset(s for s, t in near if t == rank)) and not own.note
        assert own.memory.keys() == own.peers.out_of
        for sender, memory in own.memory.items():
            assert torch.equal(torch.tensor([]).set_(memory._storages[0]), held[sender].tensor)


def test_a_tensor_of_another_device_is_never_sent_as_it_lies():
    """defects.md E2: also in a plan that was laid out without a thought of devices"""
    layout = sync.layout({**LLAMA, "vocab_size": 6144, "hidden_size": 192})
    plan = sync.plan(*(sync.Side.placed(layout, "tp", tp=2, ranks=ranks) for ranks in (range(2), range(2, 4))), bucket_bytes=1 << 18)
    for rank, side, role in ((0, plan.source, "sends"), (2, plan.destinations[0], "takes")):
        for lying, straight in (("cpu", True), ("meta", False)):
            bound = on(lying, side, rank)
            args = (bound, {}) if role == "sends" else ({}, bound)
            made = Staging(rank_plan(plan, rank), *args, HOST, Peers(), Recorder(torch.device("meta")))
            parcels = [parcel for here in made.rounds for parcel in getattr(here, role)]
            assert any(p.straight for p in parcels) == straight and {p.bytes.device.type for p in parcels} == {"cpu"}


def test_a_session_cuts_messages_of_ranks_whose_tensors_the_group_cannot_reach(tmp_path, monkeypatch):
    """defects.md E2: gloo, and weights on an accelerator"""
    make_model(tmp_path / "llama", LLAMA)
    src, dst = one_rank()
    found, real = [], session.windows
    monkeypatch.setattr(session, "windows", lambda plan, me, staged, by: found.append(staged) or real(plan, me, staged, by))
    for devices in (Recorder(), Recorder(torch.device("meta"))):
        with group("gloo"):
            into = blank(dst, 0)
            sync.Sync(sync.plan(src, dst), devices=devices).exchange(loaded(tmp_path / "llama", src, 0), into, 1)
    assert found == [frozenset({0}), frozenset()]
