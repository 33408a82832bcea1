"""What only a GPU can show. Everything else about GPUs is tested without one; scripts/gpu_check.py measures."""

import pytest
import torch

import reshard
from reshard import loading
from reshard.demo import make_model
from reshard.executor import devices

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch sees none here")]

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "intermediate_size": 640,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "vocab_size": 4001, "num_hidden_layers": 3,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
TARGETS = [{"format": "vllm", "tp": 4, "rank": 3}, {"format": "megatron", "tp": 2, "pp": 3, "rank": 5, "dtype": "fp32"}, {"format": "hf"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu") / "model"
    make_model(folder, CONFIG)
    return folder


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("smallest", "options"), [(64 << 10, {}), (4096, {"buffer": 1, "jobs": 3})])
def test_load_gives_the_cpus_bits(model, target, smallest, options, monkeypatch):
    monkeypatch.setattr(loading, "_SMALLEST", smallest)  # buffers that are used once, or some hundred times
    state, expected = reshard.load(model, device="cuda", **target, **options), reshard.load(model, **target)
    assert list(state) == list(expected)
    for name, tensor in state.items():
        assert tensor.device == torch.device("cuda", torch.cuda.current_device())
        assert torch.equal(tensor.cpu().view(-1).view(torch.uint8), expected[name].view(-1).view(torch.uint8)), name


def test_a_reader_on_another_stream_needs_no_wait(model):
    """Also while the caller's own stream is busy: the tensors' memory is zeroed on it, and filled on another."""
    busy = torch.randn(4096, 4096, device="cuda")
    for _ in range(40):
        busy = (busy @ busy).clamp_(-1, 1)
    state = reshard.load(model, format="hf", device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        seen = {name: tensor.clone() for name, tensor in state.items()}
    torch.cuda.synchronize()
    expected = reshard.load(model, format="hf")
    assert all(torch.equal(seen[name].cpu(), expected[name]) for name in expected)


def test_host_buffers_are_page_locked():
    assert devices.device_of("cuda").host(1 << 20).is_pinned()


def test_a_model_that_does_not_fit_is_refused_with_both_numbers(model):
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(
        (torch.cuda.memory_allocated() + (1 << 20)) / torch.cuda.get_device_properties(0).total_memory, 0
    )
    try:
        with pytest.raises(reshard.ReshardError, match=r"rank 0 takes .* on cuda:0, which has .* free"):
            reshard.load(model, format="hf", dtype="fp32", device="cuda:0")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)


def test_a_number_that_no_gpu_has_is_one_clear_error(model):
    with pytest.raises(reshard.ReshardError, match="torch sees"):
        reshard.load(model, format="hf", device="cuda:99")


def test_fp8_scales_have_the_cpus_bits():
    """defects.md E15"""
    from reshard.sync.fp8 import quantise
    from reshard.sync.fp8_blocks import Blocks

    weight = torch.randn(1000, 700, generator=torch.Generator().manual_seed(0))
    values, scales = quantise(weight, Blocks(1000, 700, 128))
    there, scales_there = quantise(weight.cuda(), Blocks(1000, 700, 128))
    assert torch.equal(scales, scales_there.cpu())
    assert torch.equal(values.view(torch.uint8), there.cpu().view(torch.uint8))
