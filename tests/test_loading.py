"""``reshard.load`` on a device: a stub that finishes its copies late stands for the GPU; host buffers and their order are the real ones."""

import threading
import warnings
from itertools import pairwise

import pytest
import torch
from hubcases import hub  # noqa: F401  a fixture

import reshard
from reshard import loading
from reshard.api import load
from reshard.checkpoint import open_checkpoint
from reshard.conversion.placing import one_rank, place
from reshard.demo import make_model
from reshard.executor import devices
from reshard.executor.sources import Source
from reshard.layout import Mesh

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, "vocab_size": 131, "num_hidden_layers": 3,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip


class Event:
    def __init__(self, device):
        self.device, self.after = device, device.queued

    def query(self) -> bool:
        return self.device.done >= self.after

    def synchronize(self) -> None:
        self.device.log.append("wait")
        self.device.run_until(self.after)


class Late(devices.Device):
    """Copies are done when something waits for them, and not a moment before: what their buffer holds by then arrives."""

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.log: list[str] = []
        self.copies: list = []
        self.queued = self.done = self.host_bytes = 0
        self.lock = threading.Lock()

    def begin(self):
        self.log.append("begin")

    def host(self, size):
        self.host_bytes += size
        return torch.full((size,), 0xEE, dtype=torch.uint8)

    def copy(self, into, value):
        with self.lock:
            self.log.append("copy")
            self.copies.append((into, value))
            self.queued += 1

    def mark(self):
        self.log.append("mark")
        return Event(self)

    def finish(self):
        self.log.append("finish")
        self.run_until(self.queued)

    def run_until(self, count: int) -> None:
        with self.lock:
            while self.done < count:
                into, value = self.copies[self.done]
                into.copy_(value)
                self.done += 1


class NeverWaits(Late):
    """Says that every copy is done as soon as it is queued."""

    def mark(self):
        event = super().mark()
        event.query = lambda: True
        event.synchronize = lambda: None
        return event


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("load") / "model"
    make_model(folder, CONFIG)
    return folder


def on(device, folder, *, format="vllm", rank=0, jobs=1, buffer=1, dtype=None, **mesh):
    """What ``load`` gives on a stub of a device; with one thread and `buffer` bytes, which means two buffers of the smallest size."""
    source = open_checkpoint(folder)
    placement = place(source, format, Mesh(**mesh))
    return loading.load_rank(source, placement, one_rank(placement.ranks, placement.mesh, rank), dtype, device, jobs=jobs, buffer=buffer)


def same(a: dict, b: dict) -> bool:
    def bits(t: torch.Tensor) -> tuple:
        return t.dtype, t.shape, t.view(-1).view(torch.uint8).tolist()

    return list(a) == list(b) and all(bits(x) == bits(y) for x, y in zip(a.values(), b.values()))


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch):
    """Buffers far smaller than the model, so that each is used many times."""
    monkeypatch.setattr(loading, "_SMALLEST", 4096)


TARGETS = [
    {"format": "vllm", "tp": 2, "rank": 1},
    {"format": "vllm", "tp": 8, "rank": 7},
    {"format": "megatron", "tp": 2, "rank": 1},
    {"format": "megatron", "tp": 2, "pp": 3, "rank": 5},
    {"format": "hf"},
    {"format": "tp", "tp": 3, "rank": 2},
]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("jobs", [1, 4])
def test_a_device_that_copies_late_gets_the_bytes_that_the_cpu_gets(model, target, jobs):
    """defects.md E17: load(device=…) went through a whole rank in ordinary memory"""
    device = Late()
    state = on(device, model, jobs=jobs, **target)
    assert same(state, load(model, **target))
    assert device.done == device.queued > 4


def test_padding_is_zero_and_values_are_cast_as_on_the_cpu(model):
    target = {"format": "megatron", "tp": 2, "rank": 1, "dtype": "fp32"}
    state = on(Late(), model, **target)
    assert same(state, load(model, **target))
    rows = next(tensor for name, tensor in state.items() if "word_embeddings" in name)
    assert rows.dtype == torch.float32 and rows.shape[0] == 128 and not rows[131 - 128 :].any() and rows[: 131 - 128].all()


def test_one_that_does_not_wait_for_its_buffers_would_be_seen(model):
    """Negative control: with the wait left out, the stub shows bytes of another tensor."""
    assert not same(on(NeverWaits(), model, format="hf"), load(model, format="hf"))


def test_the_last_wait_is_for_all_copies(model, monkeypatch):
    """Negative control: without it, the stub shows tensors that were never filled."""
    device = Late()
    on(device, model, format="hf")
    assert device.log.index("begin") < device.log.index("copy") and device.log[-1] == "finish" and device.log.count("begin") == 1
    monkeypatch.setattr(Late, "finish", lambda self: None)
    assert not same(on(Late(), model, format="hf"), load(model, format="hf"))


def test_an_event_follows_the_copies_of_each_buffer(model):
    device = Late()
    on(device, model, format="hf")
    steps = [step for step in device.log if step in ("copy", "mark")]
    assert steps[0] == "copy" and steps[-1] == "mark"
    assert not any(a == b == "mark" for a, b in pairwise(steps)), "an event behind nothing"
    assert "wait" in device.log  # two buffers for some dozen fillings


@pytest.mark.parametrize("jobs", [1, 3])
def test_host_memory_is_a_few_buffers_whatever_the_size_of_the_rank(model, jobs):
    device = Late()
    state = on(device, model, format="hf", jobs=jobs, buffer=64 << 10)
    assert device.host_bytes <= 64 << 10 < sum(t.nbytes for t in state.values()) / 2


def test_by_default_host_buffers_take_at_most_a_quarter_of_a_gigabyte():
    from reshard.planner.tiles import BUFFER

    for threads in (1, 2, 8, 16):
        staged = loading.Staged(Late(), {"w": torch.empty(10**12, dtype=torch.uint8, device="meta")}, threads, BUFFER)
        assert staged.size * staged._most <= 256 << 20 and staged._most > threads


def test_a_failed_read_waits_for_the_copies_under_way(model, monkeypatch):
    """Memory that a copy still goes to must not be freed: it may be another tensor's next."""
    device, read = Late(), Source.read

    def fails(self, *args):
        if device.queued > 20:
            raise OSError(5, "Input/output error")
        return read(self, *args)

    monkeypatch.setattr(Source, "read", fails)
    with pytest.raises(OSError, match="Input/output error"):
        on(device, model, format="hf")
    assert device.log[-1] == "finish" and device.done == device.queued > 20


@pytest.mark.parametrize("device", [None, Late()])
def test_a_file_that_changes_meanwhile_is_an_error(tmp_path, monkeypatch, device):
    """As for a conversion, defects.md H2: what was read is then a mixture."""
    make_model(tmp_path / "m", CONFIG)
    file, read = next((tmp_path / "m").glob("*.safetensors")), Source.read

    def disturbed(self, *args):
        with open(file, "r+b") as other:
            other.seek(-2, 2)
            other.write(b"xy")
        return read(self, *args)

    monkeypatch.setattr(Source, "read", disturbed)
    with pytest.raises(reshard.FormatError, match="was changed after its header was read"):
        on(device, tmp_path / "m", format="hf")


def test_short_runs_at_even_distances_are_one_copy():
    flat = {"w": torch.zeros(10_000, dtype=torch.uint8)}
    device = Late()
    staged = loading.Staged(device, flat, 1, 64 << 10)
    stored = loading.Stored(0, "w", "U8", (100, 100), ())
    data = torch.randint(0, 256, (100, 30), dtype=torch.uint8)
    for row in range(100):
        staged.write(stored, 100 * row + 7, memoryview(data[row].numpy()))
    staged.flush()
    assert device.queued <= 5  # one to a buffer, and what is cut at its end
    device.finish()
    expected = torch.zeros(100, 100, dtype=torch.uint8)
    expected[:, 7:37] = data
    assert torch.equal(flat["w"].view(100, 100), expected)


def test_long_runs_and_uneven_ones_are_copied_where_they_belong():
    flat = {"w": torch.zeros(50_000, dtype=torch.uint8), "v": torch.zeros(50, dtype=torch.uint8)}
    device, expected = Late(), {name: t.clone() for name, t in flat.items()}
    staged = loading.Staged(device, flat, 1, 1)
    order = torch.randperm(500, generator=torch.Generator().manual_seed(1)).tolist()
    for i in order:  # each hundred bytes, in parts of uneven length, in any order
        for at, size in ((0, 1), (1, 33), (34, 33), (67, 33)):
            data = torch.randint(1, 256, (size,), dtype=torch.uint8)
            expected["w"][100 * i + at : 100 * i + at + size] = data
            staged.write(loading.Stored(0, "w", "U8", (50_000,), ()), 100 * i + at, memoryview(data.numpy()))
        if i < 50:
            expected["v"][i] = i
            staged.write(loading.Stored(0, "v", "U8", (50,), ()), i, memoryview(bytes([i])))
    staged.flush()
    device.finish()
    assert all(torch.equal(flat[name], expected[name]) for name in flat)


@pytest.mark.skipif(torch.cuda.is_available(), reason="pinning succeeds where there is a GPU")
def test_memory_that_cannot_be_pinned_is_replaced_and_said(monkeypatch):
    gpu = object.__new__(devices.Cuda)
    gpu.device, gpu._pins = torch.device("cuda", 0), True
    monkeypatch.setattr(torch.cuda, "device", lambda device: warnings.catch_warnings())  # any context; torch's own refuses without CUDA
    with pytest.warns(RuntimeWarning, match="no page-locked memory is to be had"):
        assert gpu.host(100).shape == (100,)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gpu.host(100).shape == (100,)  # said once


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_where_there_is_none_is_one_clear_error(model):
    with pytest.raises(reshard.ReshardError, match="sees no GPU") as error:
        load(model, format="hf", device="cuda")
    assert error.value.hint
    with pytest.raises(reshard.ReshardError, match="unknown device 'gpu'"):
        load(model, format="hf", device="gpu")


def test_shapes_alone_on_the_meta_device(model):
    state, full = load(model, format="vllm", tp=2, device="meta"), load(model, format="vllm", tp=2)
    assert all(t.is_meta for t in state.values())
    assert {n: (t.shape, t.dtype) for n, t in state.items()} == {n: (t.shape, t.dtype) for n, t in full.items()}


@pytest.mark.parametrize("when", ["made", "filled"])
def test_a_device_that_is_full_is_told_with_both_numbers(model, monkeypatch, when):
    """Also while it is filled: a copy to rows that are apart takes memory of its own there."""

    class Full(Late):
        def copy(self, into, value):
            if when == "filled":
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")
            super().copy(into, value)

    monkeypatch.setattr(loading, "free_bytes", lambda device: 12345)
    if when == "made":
        monkeypatch.setattr(torch, "zeros", lambda *a, **k: exec("raise torch.cuda.OutOfMemoryError('CUDA out of memory')"))
    size = sum(t.nbytes for t in load(model, format="hf", device="meta").values()) if when == "filled" else None
    with pytest.raises(reshard.ReshardError, match=r"rank 0 takes [\d.]+ kB on cpu, which has 12.35 kB free") as error:
        on(Full(), model, format="hf")
    assert error.value.hint and (size is None or loading.human(size) in str(error.value))


def test_reading_goes_on_while_copies_are_under_way(model, monkeypatch):
    """Issue 18: with one buffer, or a wait behind each copy, every read would find the device idle."""
    device, read, seen = Late(), Source.read, []

    def watched(self, *args):
        seen.append(device.queued - device.done)
        return read(self, *args)

    monkeypatch.setattr(Source, "read", watched)
    on(device, model, format="hf", jobs=1, buffer=16 << 10)
    assert max(seen) > 1 and sum(under_way > 0 for under_way in seen) > len(seen) / 2


def test_threads_and_buffers_are_the_callers_choice(model):
    assert same(load(model, format="vllm", tp=2, jobs=3, buffer=1 << 20), load(model, format="vllm", tp=2))


def test_what_is_on_the_hub_goes_to_a_device_the_same_way(model, hub):  # noqa: F811
    hub.add_folder("org/name", model)
    device = Late()
    assert same(on(device, "hf://org/name", tp=2, rank=1, jobs=4), load(model, format="vllm", tp=2, rank=1))
    assert device.host_bytes <= 5 * 4096  # one more buffer than threads, of the smallest size


def test_constants_are_made_before_the_copies_begin(model, monkeypatch):
    """They are queued on the caller's stream, which is waited for when the copies begin, and not afterwards."""
    device, made = Late(), torch.full
    monkeypatch.setattr(
        torch, "full", lambda *args, **kw: (device.log.append("constant" if "device" in kw else "host"), made(*args, **kw))[1]
    )
    on(device, model, format="vllm", tp=2)
    assert "constant" not in device.log[device.log.index("begin") :] and "constant" in device.log
