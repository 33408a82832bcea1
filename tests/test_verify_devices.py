"""Verification on GPUs, as far as it shows without one: devices told apart by uuid, one backend for all, memory beforehand, full precision.

Where a device is needed, torch's meta device stands for it: tensors go there, nothing is computed.
"""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from reshard.errors import FormatError
from reshard.verify import devices
from reshard.verify.devices import OVERHEAD, Device, agree, backend, check_memory, describe, forward_bytes, ranks_to_a_device
from reshard.verify.exact import refuse_override

SAMPLES = Path(__file__).parents[2] / "shared" / "samples"


def gpus(*names: str, free: int = 80 << 30, nccl: bool = True) -> list[Device]:
    return [Device(rank, "cuda", name, free, 80 << 30, nccl) for rank, name in enumerate(names)]


@pytest.mark.parametrize(
    "names, expected, shared",
    [
        (["a", "b", "c", "d"], "nccl", 1),  # one visible GPU for each rank, each of them number 0 to it
        (["a", "a", "a", "a"], "gloo", 4),  # four ranks on one
        (["a", "b", "c", "c"], "gloo", 2),  # two nodes, of two GPUs and of one: all must take the same backend
        (["a"], "nccl", 1),
    ],
)
def test_one_backend_for_the_whole_world_by_the_devices_themselves(names, expected, shared):
    """defects.md E9: chosen per node, by counts, one node took NCCL and the other gloo"""
    assert backend(gpus(*names)) == expected and ranks_to_a_device(gpus(*names)) == shared
    assert backend(gpus("a", "b", nccl=False)) == "gloo" and backend([Device(0, "cpu", "host/cpu")]) == "gloo"


def world(records: list[Device]) -> list:
    """What each rank makes of it when they all meet in one store."""
    store, out = dist.HashStore(), [None] * len(records)

    def rank(number: int) -> None:
        try:
            out[number] = agree(store, records[number], len(records))
        except FormatError as error:
            out[number] = error

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(len(records))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return out


def test_every_rank_hears_of_all_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (7 << 30, 80 << 30))
    found = world(gpus("a", "b", "c"))
    assert found[0] == found[1] == found[2] and [d.name for d in found[0]] == ["a", "b", "c"]
    assert {d.free for d in found[0]} == {7 << 30}, "measured again when every rank has its context"


def test_a_device_that_one_rank_cannot_use_is_every_ranks_error():
    """defects.md E9: a node without a GPU raised alone, and the other waited for it"""
    found = world([Device(0, "cpu", "x"), Device(1, "cpu", "y", problem="rank 1 on y: torch sees no GPU here", hint="use --device cpu")])
    assert all(isinstance(error, FormatError) and "rank 1 on y" in str(error) and error.hint == "use --device cpu" for error in found)


class Cuda:
    """The part of torch.cuda that is asked for, of a process that sees one GPU of `uuid`."""

    def __init__(self, monkeypatch, uuid: str | None, count: int = 1):
        for name, value in {
            "is_available": lambda: True, "device_count": lambda: count, "set_device": lambda device: None,
            "get_device_properties": lambda device: SimpleNamespace(uuid=uuid) if uuid else SimpleNamespace(),
            "mem_get_info": lambda *_: (60 << 30, 80 << 30),
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)


def test_one_visible_gpu_per_rank_is_known_by_its_uuid(monkeypatch):
    """defects.md E9: number 0 on every rank was taken for one shared device"""
    found = []
    for rank, uuid in enumerate(("GPU-aa", "GPU-bb")):
        Cuda(monkeypatch, uuid)
        found.append(describe("cuda", rank, rank))
    assert [d.name for d in found] == ["GPU-aa", "GPU-bb"] and ranks_to_a_device(found) == 1 and found[0].free == 60 << 30


def test_a_torch_that_tells_no_uuid_goes_by_host_and_visible_number(monkeypatch):
    Cuda(monkeypatch, None)
    names = []
    for visible in ("2", "3"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        names.append(describe("cuda", 0, 0).name)
    assert len(set(names)) == 2 and names[0].endswith("/2")


def test_memory_that_cannot_hold_it_is_refused_with_both_numbers():
    with pytest.raises(FormatError, match=r"GPU a has 10.74 GB free, the shards of 2 ranks need 1[3-9]\.\d\d GB") as error:
        check_memory(gpus("a", "a", free=10 << 30), {0: 6 << 30, 1: 6 << 30}, 6 << 30, 1 << 20)
    assert "--low-memory" in error.value.hint and "the original" not in str(error.value)
    with pytest.raises(FormatError, match="GPU b has 10.74 GB free, the original"):
        check_memory(gpus("b", "c", free=10 << 30), {0: 1 << 30, 1: 1 << 30}, 12 << 30, 1 << 20)
    check_memory(gpus("a", "a", free=16 << 30), {0: 6 << 30, 1: 6 << 30}, 12 << 30, 1 << 20)  # one after the other, not together
    check_memory(gpus("a", "b", "a", "b", free=(2 << 30) + 2 * OVERHEAD), dict.fromkeys(range(4), 1 << 30), 0, 0)


@pytest.mark.models
@pytest.mark.parametrize("low_memory", [False, True])
def test_a_models_own_sizes_are_held_against_what_is_free(low_memory):
    """Issue 18: computed beforehand, from config.json and headers, and the same error on every rank"""
    pytest.importorskip("transformers")
    from transformers import AutoConfig

    from reshard.verify.group import is_agreed
    from reshard.verify.request import Request
    from reshard.verify.run import check_budget

    folder = SAMPLES / "hf/llama"
    config, ids = AutoConfig.from_pretrained(folder), torch.zeros(2, 32, dtype=torch.long)
    request = Request(folder, folder, device="cuda", low_memory=low_memory)
    elements = {rank: 10**9 for rank in range(4)}
    check_budget(request, elements, config, gpus("a", "a", "b", "b", free=12 << 30), ids, torch.float32)
    with pytest.raises(FormatError, match=r"GPU a has 9.66 GB free, the shards of 2 ranks need 9.6\d GB") as error:
        check_budget(request, elements, config, gpus("a", "a", "b", "b", free=9 << 30), ids, torch.float32)
    assert is_agreed(error.value) and "GPU b" in str(error.value)
    check_budget(request, elements, config, gpus("a", "a", "b", "b", free=9 << 30), ids, torch.bfloat16)


def test_forward_bytes_bound_what_a_forward_holds():
    """Against torch's own count of what a tiny attention and output layer allocate."""
    assert forward_bytes((2, 32), 128256, 4096, 14336, 32, 2) > 2 * 32 * 128256 * (2 + 4)
    assert forward_bytes((2, 32), 1000, 64, 256, 4, 4) < 1 << 27


@pytest.mark.models
def test_nvidias_override_is_refused(monkeypatch):
    """defects.md E14"""
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    refuse_override("cpu")
    with pytest.raises(FormatError, match="NVIDIA_TF32_OVERRIDE=1") as error:
        refuse_override("cuda")
    assert error.value.hint == "unset NVIDIA_TF32_OVERRIDE"
    Cuda(monkeypatch, "GPU-aa")
    assert "NVIDIA_TF32_OVERRIDE" in describe("cuda", 1, 1).problem
    from reshard.verify import verify

    with pytest.raises(FormatError, match="NVIDIA_TF32_OVERRIDE=1"):
        verify("nowhere", reference="nowhere", device="cuda")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    refuse_override("cuda")


class Copies(TorchDispatchMode):
    """Records copies between devices and casts: (from device, to device, from dtype, to dtype)."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            self.seen.append((args[0].device.type, out.device.type, args[0].dtype, out.dtype))
        return out


@pytest.mark.models
def test_shards_are_cast_on_the_device():
    """defects.md E17, slices.py:43: twice the bytes over the bus, and a cast by the CPU"""
    pytest.importorskip("transformers")
    from reshard.verify.group import seats
    from reshard.verify.model import empty_model
    from reshard.verify.request import Request
    from reshard.verify.run import read_config
    from reshard.verify.shards import open_shards
    from reshard.verify.slices import Slices

    shards = open_shards(SAMPLES / "vllm/llama-tp2")
    places = seats(shards.mesh, shards.ranks)
    m = empty_model(read_config(Request(SAMPLES / "vllm/llama-tp2", SAMPLES / "vllm/hf/llama")))
    every = tuple(range(len(places)))
    s = Slices(shards, places, 0, m, {(0,): None, every: None}, torch.device("meta"), torch.float32)
    with Copies() as copies:
        s.read("model.layers.0.mlp.down_proj.weight")
    assert copies.seen == [("cpu", "meta", torch.bfloat16, torch.bfloat16), ("meta", "meta", torch.bfloat16, torch.float32)]


@pytest.mark.models
@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "deepseek_v3", "gpt_neox"])
def test_the_original_goes_straight_to_the_device(family, low_memory, tmp_path):
    """defects.md E12, E13: streamed, it ran on the CPU without a word; whole, it was built in fp32 on the host first"""
    pytest.importorskip("transformers")
    from reshard.verify.model import hush
    from reshard.verify.reference import computing_devices, load_reference

    hush()
    model = load_reference(SAMPLES / "hf" / family, torch.float32, torch.device("meta"), low_memory, tmp_path)
    assert {at.type for at in computing_devices(model)} == {"meta"}
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.models
def test_an_original_that_lands_elsewhere_is_refused(tmp_path, monkeypatch):
    """defects.md E12: whatever another accelerate makes of the map"""
    pytest.importorskip("transformers")
    from reshard.verify import reference

    monkeypatch.setattr(reference, "placement", lambda m, device, low_memory: {"": torch.device("cpu")})
    with pytest.raises(FormatError, match="would run on cpu, --device says meta"):
        reference.load_reference(SAMPLES / "hf/llama", torch.float32, torch.device("meta"), False, tmp_path)


@pytest.mark.models
def test_the_whole_original_on_the_host_is_as_it_is_stored(tmp_path):
    """defects.md E13: loading for another device holds no copy in fp32; measured by the process itself"""
    pytest.importorskip("transformers")
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=4096, hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "hf")
    size = sum(file.stat().st_size for file in (tmp_path / "hf").glob("*.safetensors"))
    assert size > 200e6
    code = f"""
import json, re, resource, torch
from pathlib import Path
from reshard.verify.model import hush
from reshard.verify.reference import load_reference
import transformers.models.llama.modeling_llama
def anonymous(): return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
hush()
before = anonymous()
most = [0]
import threading, time
def look():
    while True: most[0] = max(most[0], anonymous()); time.sleep(0.002)
threading.Thread(target=look, daemon=True).start()
load_reference(Path({str(tmp_path / "hf")!r}), torch.float32, torch.device("meta"), False, Path({str(tmp_path)!r}))
print(json.dumps([before, most[0]]))
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    before, most = json.loads(done.stdout)
    assert most - before < size, f"{most - before:,} bytes on the host for {size:,} stored"


def test_the_module_needs_no_gpu_to_be_imported():
    assert devices.choose("cpu", 3) == torch.device("cpu")
    if not torch.cuda.is_available():
        with pytest.raises(FormatError, match="sees no GPU"):
            devices.choose("cuda", 0)
