"""``reshard.load(into=…, at=…)``: the tensors of an engine's rank filled where they lie; vLLM's own files say with what."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import reshard
from reshard.demo import CONFIG, make_model

SAMPLES = Path(__file__).parents[2] / "shared" / "samples" / "vllm"


def garbage(shape, dtype=torch.bfloat16):
    """A tensor that no byte of its content can have come out right by chance, its dimensions in the other order in memory."""
    return torch.full(tuple(reversed(shape)), 77.0, dtype=dtype).permute(tuple(reversed(range(len(shape)))))


@pytest.mark.samples
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name, mesh, at", [
    ("llama-tp2", {"tp": 2}, (1, 0)), ("llama-kv2-tp4", {"tp": 4}, (3, 0)), ("llama-tp2-pp2", {"tp": 2, "pp": 2}, (0, 1)),
    ("qwen2-tp2", {"tp": 2}, (0, 0)), ("gpt-oss-tp2", {"tp": 2}, (1, 0)), ("qwen3-moe-tp2", {"tp": 2}, (1, 0)),
])  # fmt: skip
def test_what_vllm_saved_is_what_its_tensors_hold(name, mesh, at, dtype):
    file = f"model-pp-{at[1]}-tp-{at[0]}-part-0.safetensors" if mesh.get("pp") else f"model-rank-{at[0]}-part-0.safetensors"
    genuine = load_file(SAMPLES / name / file)
    into = {key: garbage(t.shape, t.dtype if "_scale" in key or t.dtype == torch.float32 else dtype) for key, t in genuine.items()}
    given = dict(into)
    back = reshard.load(SAMPLES / "hf" / name.split("-tp")[0], format="vllm", at=at, into=into, **mesh)
    assert back.keys() == genuine.keys()
    for key, tensor in given.items():
        assert back[key] is tensor and torch.equal(tensor, genuine[key].to(tensor.dtype)), key


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("into") / "model"
    make_model(folder, CONFIG)
    return folder


def rank(model, **options):
    return reshard.load(model, format="vllm", tp=3, **options)


def test_all_that_does_not_fit_is_told_before_a_byte(model):
    into = {name: torch.full_like(t, 7) for name, t in rank(model).items()}
    names = [name for name in into if "scale" not in name]
    del into[names[0]]
    into[names[1]] = into[names[1]][:-1]
    into[names[2]] = into[names[2]].long()
    into["model.rotary.weight"] = torch.ones(3)
    before = {name: tensor.clone() for name, tensor in into.items()}
    with pytest.raises(reshard.ReshardError) as error:
        rank(model, into=into)
    for part in (f"{names[0]} ", f"{names[1]}: shape", f"{names[2]}: torch.int64", "model.rotary.weight [3]"):
        assert part in str(error.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in into.items())


def test_padding_is_zero_and_parameters_are_filled(model):
    plain = rank(model, rank=2)
    into = {name: torch.nn.Parameter(garbage(t.shape, t.dtype), requires_grad=False) for name, t in plain.items()}
    rank(model, into=into, at=(2, 0))
    assert all(torch.equal(into[name], tensor) for name, tensor in plain.items())
    assert CONFIG["vocab_size"] % 64 and not plain["lm_head.weight"][-1].any()


def test_the_wrong_place_is_refused(model):
    with pytest.raises(reshard.ReshardError, match=r"no rank stands at \(3, 0\) of tp3"):
        rank(model, at=(3, 0))
    with pytest.raises(reshard.ReshardError, match="device or dtype given together with into"):
        rank(model, into={}, dtype="fp32")
    assert not torch.equal(rank(model, at=(0, 0))["lm_head.weight"], rank(model, at=(1, 0))["lm_head.weight"])
