"""What prompts don't reach is compared without them, or the verdict says that it was not exercised."""

import json
from functools import cache
from pathlib import Path
from shutil import copytree
from tempfile import TemporaryDirectory

import pytest
import torch
from safetensors.torch import load_file, save_file

import reshard

pytest.importorskip("transformers")

from ranks import verify

from reshard.verify.report import Report

pytestmark = pytest.mark.models

SAMPLES = Path(__file__).parents[2] / "shared" / "samples"
EXPERTS = 128


@cache
def scratch() -> TemporaryDirectory:
    return TemporaryDirectory(prefix="verify-direct-")


@cache
def many_experts() -> Path:
    """A model of 128 small experts, of which a token goes to two: 64 tokens cannot reach them all in every layer."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    folder = Path(scratch().name) / "many"
    config = Qwen3MoeConfig(vocab_size=256, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=2, head_dim=16,
                            num_attention_heads=2, num_key_value_heads=2, num_experts=EXPERTS, num_experts_per_tok=2, tie_word_embeddings=False)  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def sharded(format: str, **mesh) -> Path:
    folder = Path(scratch().name) / f"{format}-{'-'.join(map(str, mesh.values()))}"
    if not folder.exists():
        reshard.convert(many_experts(), folder, format=format, fsync=False, **mesh)
    return folder


def rewrite(folder: Path, change) -> None:
    for file in sorted(folder.glob("*.safetensors")):
        state = load_file(file)
        change(state, file)
        save_file(state, file)
    manifest = folder / "reshard.json"
    if manifest.exists():
        told = json.loads(manifest.read_text())
        told["files"] = {name: (folder / name).stat().st_size for name in told["files"]}
        manifest.write_text(json.dumps(told))


def test_an_expert_that_no_token_reaches_is_found_when_it_is_zeroed(tmp_path):
    """defects.md D9: 2 of 6 zeroed experts among 128 passed"""
    sound = verify(sharded("vllm", tp=2), many_experts())
    assert isinstance(sound, Report) and sound.passed, sound
    used, every = sound.reached
    assert every == 2 * EXPERTS and 0 < used < every, "the prompts must leave some experts idle, or this proves nothing"
    assert sound.to_json()["experts_reached"] == [used, every]
    for expert in (0, 41, 86, 127):
        copytree(sharded("vllm", tp=2), tmp_path / str(expert))

        def zero(state, file, expert=expert):
            next(t for name, t in state.items() if "layers.1." in name and name.endswith("w2_weight"))[expert] = 0

        rewrite(tmp_path / str(expert), zero)
        report = verify(tmp_path / str(expert), many_experts())
        assert isinstance(report, Report) and not report and not report.shards.passed
        assert f"model.layers.1.mlp.experts.{expert}" in [point.path for point in report.shards.points if point.apart]
        assert (
            any("w2_weight" in name for name in report.shards.suspects)
            or report.shards.parted.path != f"model.layers.1.mlp.experts.{expert}"
        )


@pytest.mark.parametrize("format, mesh", [("sglang", {"tp": 2, "ep": 2}), ("megatron", {"tp": 2, "ep": 2}), ("megatron", {"tp": 2, "ep": 2, "etp": 1}),
                                          ("megatron", {"pp": 2, "tp": 2}), ("tp", {"tp": 2}), ("hf", {"tp": 1})])  # fmt: skip
def test_sound_experts_pass_wherever_they_are(format, mesh):
    """Dealt out, cut, repeated or on another stage: each expert's outputs are the original's. The folder of tp2·ep2·etp1 is defects.md D2."""
    report = verify(sharded(format, **mesh), many_experts())
    assert isinstance(report, Report) and report.passed, report
    points = [point for point in report.shards.points if point.path.endswith(".mlp.experts") and point.decides]
    assert len(points) == 2 and max(point.relative for point in points) < 1e-5


@pytest.mark.parametrize(
    "family, name, dtype", [("deepseek_v3", "e_score_correction_bias", torch.bfloat16), ("gpt_oss", "router.bias", torch.float8_e4m3fn)]
)
def test_a_vector_of_a_router_that_is_rounded_is_noticed(family, name, dtype, tmp_path):
    """defects.md D9: a correction bias in bf16, which turns no decision of 64 tokens"""
    original, changed = tmp_path / "hf", []
    copytree(SAMPLES / "hf" / family, original)

    def finer(state, file):
        torch.manual_seed(2)
        state.update({key: 1e-3 * torch.randn(tensor.shape).to(tensor.dtype) for key, tensor in state.items() if key.endswith(name)})

    def rounded(state, file):
        for key, tensor in state.items():
            if key.endswith(name):
                state[key] = tensor.to(dtype).to(tensor.dtype)
                changed.append(not torch.equal(state[key], tensor))

    rewrite(original, finer)
    reshard.convert(original, tmp_path / "out", format="vllm", tp=2, fsync=False)
    sound = verify(tmp_path / "out", original)
    assert isinstance(sound, Report) and sound.passed, sound
    rewrite(tmp_path / "out", rounded)
    assert all(changed) and changed
    report = verify(tmp_path / "out", original)
    assert isinstance(report, Report) and not report
    assert any(point.apart and point.path.endswith(name) for point in report.shards.points)


@cache
def with_prediction_layer() -> Path:
    """DeepSeek-V3 with one layer more than config.json counts, as its files on the Hub have it, and a tensor of another style."""
    folder = Path(scratch().name) / "prediction"
    copytree(SAMPLES / "hf/deepseek_v3", folder)
    files = sorted(folder.glob("*.safetensors"))
    state = load_file(files[-1])
    torch.manual_seed(1)
    extra = {
        "model.layers.2.eh_proj.weight": torch.randn(64, 128),
        "model.layers.2.enorm.weight": torch.randn(64),
        "mtp.fc.weight": torch.randn(64, 128),
    }
    save_file(
        {**state, **{name: tensor.to(next(iter(state.values())).dtype) for name, tensor in extra.items()}}, files[-1], {"format": "pt"}
    )
    index = folder / "model.safetensors.index.json"
    if index.exists():
        table = json.loads(index.read_text())
        table["weight_map"] |= dict.fromkeys(extra, files[-1].name)
        index.write_text(json.dumps(table))
    config = json.loads((folder / "config.json").read_text())
    assert config["num_hidden_layers"] == 2
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    return folder


@pytest.mark.parametrize("broken", [None, "model.layers.2.eh_proj.weight", "mtp.fc.weight"])
def test_layers_that_predict_further_tokens_are_compared_by_their_bits(broken, tmp_path):
    """defects.md D9: random tensors there passed without a word"""
    copytree(with_prediction_layer(), tmp_path / "out")

    def change(state, file):
        if broken in state:
            state[broken] = state[broken] + 1

    rewrite(tmp_path / "out", change)
    report = verify(tmp_path / "out", with_prediction_layer())
    assert isinstance(report, Report), report
    assert bool(report) == (broken is None)
    if broken:
        assert report.shards.parted.path == broken and broken in report.verdict()
    assert {"model.layers.2.eh_proj.weight", "mtp.fc.weight"} <= {point.path for point in report.shards.points}


def test_what_cannot_be_compared_is_said(tmp_path):
    """defects.md D9: a prediction layer under names that the original has not, and a scale that is not one"""
    copytree(SAMPLES / "vllm/llama-tp2", tmp_path / "out")

    def change(state, file):
        state["mtp.fused.weight"] = torch.zeros(3)
        scale = next(name for name in state if name.endswith("_k_scale"))
        state[scale] = torch.full_like(state[scale], 0.5)

    rewrite(tmp_path / "out", change)
    report = verify(tmp_path / "out", SAMPLES / "vllm/hf/llama", "vllm")
    assert isinstance(report, Report) and report.passed
    said = "\n".join(report.unexercised)
    assert (
        "mtp.fused.weight" in said
        and "1 scale of quantised caches that is not 1" in said
        and said in report.describe().replace("\n  ", "\n")
    )
    assert report.to_json()["not_exercised"] == report.unexercised
