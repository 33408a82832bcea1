"""NCCL's own ways, shown without it: who must be there for its first call, what a step overlaps, what a handle that nobody opens costs."""

import pytest
import torch
import torch.distributed as dist
from test_sync_devices import HOST, Recorder, group

from reshard import sync
from reshard.sync import mapping
from reshard.sync.staging import FLIGHTS, Parcel, Round
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


def test_a_round_is_packed_on_a_side_stream_while_the_one_before_it_travels(monkeypatch):
    """Issue 18: packing overlapped with sending, beside the trainer's stream"""
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
            crosses = False

        wire.run(Staging())
    steps = [what for what in devices.asked if what.split()[0] in ("packed", "sent", "landed", "unpacked", "side")]
    assert steps[0] == "side streams" and steps[-1] == "side streams left" and steps.count("side streams") == 1
    place = {what: at for at, what in enumerate(steps)}
    assert FLIGHTS == 2
    for n in range(2):
        assert place[f"sent {n}"] < place[f"packed {n + 1}"] < place[f"landed {n}"], "packed while the one before is under way"
        assert place[f"landed {n}"] < place[f"unpacked {n}"]
    assert place["landed 0"] < place["packed 2"], "two buffers by turns"


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

    published = mapping.publish({n: Held(n) for n in (1, 2, 3)}, One())
    with pytest.raises(RuntimeError, match="pidfd_getfd"):
        mapping.Mapped(published, {}, One())
    assert given == [(b"counter 2", 2), (b"counter 3", 3)], "the first was opened, and lets go by itself"
    del opened[:], given[:]
    with pytest.raises(sync.SyncError, match="is not visible"):
        mapping.Mapped([[["cuda", "GPU-z", 0, b"h".hex(), 512, 0, b"c".hex(), 7, b"e".hex(), True]], []], {}, One())
    assert given == [(b"c", 7)]
