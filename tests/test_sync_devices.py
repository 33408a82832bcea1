"""What a sync does on accelerators, shown without one: the order of what it asks of a device, where it stages, how it posts messages.

A ``Devices`` that records stands for the CUDA API; torch's fake process group and its meta device stand for NCCL and a GPU.
"""

import tempfile
import time
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from sync_world import LLAMA, blank, free_ports, loaded, loopback
from torch.distributed import distributed_c10d as c10d
from torch.utils._python_dispatch import TorchDispatchMode

import reshard
from reshard import sync
from reshard.demo import make_model
from reshard.sync import mapping
from reshard.sync.device import Devices
from reshard.sync.fp8 import quantise
from reshard.sync.fp8_blocks import Blocks
from reshard.sync.groups import joined
from reshard.sync.messages import rank_plan
from reshard.sync.staging import Copies, Peers, Staging
from reshard.sync.tensors import Bound
from reshard.sync.transport import Wire

HOST = torch.device("cpu")


class Recorder(Devices):
    """Devices whose host tensors count as an accelerator's; `asked` lists what was asked, in order."""

    def __init__(self, *accelerators: torch.device):
        self.asked: list[str] = []
        self.accelerators = accelerators or (HOST,)

    def accelerated(self, device):
        return device in self.accelerators

    def current(self):
        return HOST

    def synchronize(self, devices):
        self.asked.append("synchronize " + " ".join(sorted(map(str, devices))))

    @contextmanager
    def side_streams(self, devices):
        self.asked.append("side streams")
        yield

    def settle(self, devices):
        self.asked.append("settle")

    def event(self, device):
        class Done:
            def query(self):
                return True

        return Done()

    def identity(self, device):
        return f"GPU-{device}"

    def index(self, identity):
        return {"GPU-a": 0, "GPU-b": 1}.get(identity)

    def pinned(self, size):
        self.asked.append(f"pinned {size}")
        return torch.empty(size, dtype=torch.uint8)


@contextmanager
def group(backend: str | None, size: int = 1, rank: int = 0):
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if backend == "fake":
        dist.init_process_group(backend, store=FakeStore(), rank=rank, world_size=size)
    else:
        dist.init_process_group(backend, init_method=f"file://{tempfile.mktemp()}", rank=rank, world_size=size)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("sync") / "llama"
    make_model(path, LLAMA)
    return path


def one_rank():
    layout = sync.layout(LLAMA)
    return sync.Side.placed(layout, "hf", ranks=[0]), sync.Side.placed(layout, "vllm", tp=1, ranks=[0])


def test_devices_are_synchronised_before_peers_may_read_and_before_the_end_is_told(model):
    """defects.md E1: whatever the backend; here gloo, as for ranks that share a GPU."""
    src, dst = one_rank()
    devices = Recorder()
    with group("gloo"):
        session = sync.Sync(sync.plan(src, dst), devices=devices)
        for name in ("gather", "run"):
            real = getattr(session._wire, name)
            tell = (lambda *a: a[-1]) if name == "gather" else (lambda *a: "messages")
            setattr(session._wire, name, lambda *a, real=real, tell=tell: (devices.asked.append(tell(*a)), real(*a))[1])
        held = loaded(model, src, 0)
        for step in (1, 2):
            del devices.asked[:]
            session.exchange(held, blank(dst, 0), step)
            asked = [what for what in devices.asked if what.split()[0] in ("synchronize", "agreeing", "messages", "finishing")]
            assert asked == ["synchronize cpu", "agreeing on a step", "messages", "synchronize cpu", "finishing a step"]


def plan_of_two(bucket: int = 4096):
    layout = sync.layout(LLAMA)
    src = sync.Side.placed(layout, "megatron", tp=2, ranks=range(2))
    return sync.plan(src, sync.Side.placed(layout, "vllm", tp=3, ranks=range(2, 5)), bucket_bytes=bucket)


def on(device, side, rank):
    """Tensors of `rank` on another device than the host's, bound."""
    return {s.id: Bound(s, torch.empty(s.shape, dtype=torch.bfloat16, device=device)) for s in side.held_by(rank)}


@pytest.mark.parametrize("tensors, wire", [("meta", "cpu"), ("cpu", "meta")])
def test_tensors_of_another_device_than_the_group_sends_from_go_by_pinned_memory(tensors, wire):
    """defects.md E2: gloo read CUDA addresses and the process was killed; NCCL refused host tensors."""
    plan = plan_of_two(1 << 20)
    devices = Recorder(torch.device("meta"))
    for rank, side, role in ((0, plan.source, "sends"), (2, plan.destinations[0], "takes")):
        bound = on(tensors, side, rank)
        part = rank_plan(plan, rank, staged=range(5))
        args = (bound, {}) if role == "sends" else ({}, bound)
        made = Staging(part, *args, torch.device(wire), Peers(), devices)
        parcels = [parcel for here in made.rounds for parcel in getattr(here, role)]
        assert parcels and {p.bytes.device.type for p in parcels} == {wire} and not any(p.straight for p in parcels)
        moved = [copies for here in made.rounds for copies in (here.leave if role == "sends" else here.arrive,)]
        ends = {(a.device.type, b.device.type) for c in moved for a, b in zip(c.into, c.values)}
        assert ends == {(wire, tensors) if role == "sends" else (tensors, wire)}
        assert sum(len(c.into) for c in moved) == len(parcels)  # one copy a message, not one a tensor
        packed = [t.device.type for here in made.rounds for t in (here.pack.into if role == "sends" else here.unpack.values)]
        assert set(packed) == {tensors}
        assert made.crosses and [a for a in devices.asked if a.startswith("pinned")]


def test_messages_that_cross_devices_are_cut_to_the_bucket():
    """defects.md E2: what is one run at both ends is staged all the same, and no message is larger than its share of a bucket."""
    layout = sync.layout({**LLAMA, "vocab_size": 6144, "hidden_size": 192})
    sides = [sync.Side.placed(layout, "tp", tp=2, ranks=ranks) for ranks in (range(2), range(2, 4))]
    plan = sync.plan(*sides, bucket_bytes=1 << 18)
    assert max(m.bytes for m in rank_plan(plan, 0).sends) > 1 << 18
    for staged in ([0], [2], range(4)):
        sends, takes = rank_plan(plan, 0, staged=staged).sends, rank_plan(plan, 2, staged=staged).takes
        assert [(m.bytes, m.round, m.tag) for m in sends] == [(m.bytes, m.round, m.tag) for m in takes]
        for number in range(1 + max(m.round for m in sends)):
            assert sum(m.bytes for m in sends if m.round == number) <= 1 << 18


def test_values_are_right_by_way_of_another_device(model, monkeypatch):
    """defects.md E2, with values: the host as `cpu:0` is another device than `cpu`, and holds real bytes."""
    import sync_world

    devices = Recorder(HOST)
    monkeypatch.setattr(sync_world, "Staging", lambda part, s, i, d, p: Staging(part, s, i, torch.device("cpu", 0), p, devices))
    plan = plan_of_two()
    sources = {r: loaded(model, plan.source, r, tp=2) for r in range(2)}
    targets = {r: blank(plan.destinations[0], r) for r in range(2, 5)}
    loopback(plan, sources, targets)
    assert any(what.startswith("pinned") for what in devices.asked)
    for r in range(2, 5):
        wanted = loaded(model, plan.destinations[0], r, tp=3)
        assert all(torch.equal(t, wanted[n]) for n, t in targets[r].items())


def test_a_comparison_posts_all_its_messages_as_one_batch(monkeypatch):
    """defects.md E3: NCCL makes a communicator per pair and waits in it; posted one by one, colocated ranks wait in a circle."""
    batches = []
    monkeypatch.setattr(dist, "batch_isend_irecv", lambda ops: batches.append([(op.op.__name__, op.peer) for op in ops]) or [])
    for name in ("isend", "irecv", "send", "recv"):
        monkeypatch.setattr(dist, name, getattr(dist, name))
    with group("fake", size=4, rank=1):
        wire = Wire(None, 5, Recorder())
        assert not wire.host and not wire.gloo
        one = torch.zeros(3, dtype=torch.int64)
        wire.exchange([(0, one), (2, one)], [(0, one), (3, one)], "comparing sums")
    assert batches == [[("irecv", 0), ("irecv", 3), ("isend", 0), ("isend", 2)]]


def test_a_device_peer_that_is_silent_is_lost_in_time():
    """defects.md E11: NCCL's own time-out aborts the communicator and may end the process; works are polled instead."""

    class Never:
        def is_completed(self):
            return False

        def wait(self, *_):
            raise AssertionError("blocks the host")

    with group("fake", size=2):
        wire = Wire(None, 0.3, Recorder())
        began = time.monotonic()
        with pytest.raises(sync.PeerLost, match="silent for 0.3 s"):
            wire.wait(Never(), "exchanging weights")
        assert 0.25 < time.monotonic() - began < 60


@pytest.mark.parametrize("backend", ["gloo", "cpu:gloo", None, "cpu:gloo,cuda:fake"])
def test_groups_whose_backend_has_several_names(backend, model):
    """defects.md E16: `get_backend` says "undefined" or "cpu:gloo" for groups that send CPU tensors well."""
    src, dst = one_rank()
    with group(backend):
        wire = Wire(None, 5)
        assert wire.gloo and wire.device == HOST and wire.gather(torch.arange(3), "x").tolist() == [[0, 1, 2]]
        into = blank(dst, 0)
        sync.Sync(sync.plan(src, dst), verify=True).exchange(loaded(model, src, 0), into, 1)
        assert all(torch.equal(t, reshard.load(model, format="vllm", tp=1, rank=0)[n]) for n, t in into.items())


def test_a_joined_group_leaves_the_default_group_whole(monkeypatch):
    """defects.md E5: torch splits a new group's communicator off a default group that is bound to a device; engines of another
    world do not take part in that."""
    asked = []
    monkeypatch.setattr(c10d, "_get_split_source", lambda pg: asked.append(pg))
    address = f"tcp://127.0.0.1:{free_ports(1)}"
    with group("fake") as default:
        default.bound_device_id = torch.device("cuda", 0)
        groups = [joined(address, 0, 1, backend="gloo", timeout=20) for _ in range(2)]
        assert asked == []
        assert default.bound_device_id == torch.device("cuda", 0)
        assert groups[0].group_name != groups[1].group_name and [g.size() for g in groups] == [1, 1]
        for own in groups:
            dist.destroy_process_group(own)


def test_copies_are_grouped_by_dtypes_and_dense_ones_apart():
    """defects.md E6: before torch#173531 CUDA took the first destination's dtype for the whole list."""
    copies, wide = Copies(), torch.zeros(4, 8)
    kinds = [torch.bfloat16, torch.float32, torch.bfloat16, torch.float16]
    ends = [(torch.zeros(4, dtype=kind), torch.arange(4.0) + i) for i, kind in enumerate(kinds)]
    for into, value in ends:
        copies.add(into, value)
    copies.add(wide[:, 3], torch.ones(4))
    groups = copies.groups()
    for into, values in groups:
        keys = {(a.dtype, b.dtype, a.device, b.device, a.is_contiguous() and b.is_contiguous()) for a, b in zip(into, values)}
        assert len(keys) == 1
    assert sorted(len(into) for into, _ in groups) == [1, 1, 1, 2]
    copies.run()
    assert all(torch.equal(into, value.to(into.dtype)) for into, value in ends) and wide.sum() == 4 == wide[:, 3].sum()


def test_a_cuda_handle_names_the_device_and_opens_on_the_local_number(monkeypatch):
    """defects.md E7: under a CUDA_VISIBLE_DEVICES of its own each process counts its devices from 0."""
    opened = []
    monkeypatch.setattr(mapping, "_open_cuda", lambda *handle: opened.append(handle))
    devices = Recorder()
    mapping.open_storage(["cuda", "GPU-b", 0, b"handle".hex(), 512, 0, b"counter".hex(), 3, b"event".hex(), True], devices)
    assert opened == [(1, b"handle", 512, 0, b"counter", 3, b"event", True)]
    with pytest.raises(sync.SyncError, match="GPU-c is not visible"):
        mapping.open_storage(["cuda", "GPU-c", 0, b"h".hex(), 512, 0, b"c".hex(), 3, b"e".hex(), True], devices)
    places = {mapping.place([torch.device("cuda", n)], "auto", Numbered(f"GPU-{n}")) for n in (0, 1)}
    assert len(places) == 2
    assert mapping.place([torch.device("cuda", 0)], "auto", Numbered("a")) == mapping.place(
        [torch.device("cuda", 3)], "auto", Numbered("a")
    )
    assert mapping.place([torch.device("cuda", 0), HOST], "mapped", Numbered("a")) < 0


class Numbered(Devices):
    def __init__(self, name):
        self.name = name

    def identity(self, device):
        return self.name


def test_scales_are_divided_by_a_number_of_their_own_device():
    """defects.md E15: CUDA divides by a Python number as a product with its reciprocal: other bits in half of all scales."""

    class Divisions(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "div" in str(function):
                seen.append(args)
            return function(*args, **(kwargs or {}))

    seen = []
    with Divisions():
        quantise(torch.empty(256, 128, device="meta"), Blocks(256, 128, 128))
    assert seen and all(isinstance(x, torch.Tensor) and x.device.type == "meta" for args in seen for x in args)
    fp8, scales = quantise(torch.arange(128.0 * 128).view(128, 128), Blocks(128, 128, 128))
    assert scales.item() == torch.tensor(128.0 * 128 - 1).div(torch.tensor(448.0)).item() and fp8.float().max() == 448


def test_the_reference_of_these_tests_is_the_checkpoint(model):
    """The comparisons above would notice another tensor."""
    state = loaded(model, one_rank()[1], 0)
    assert torch.equal(state["model.norm.weight"], load_file(model / "model.safetensors")["model.norm.weight"])
