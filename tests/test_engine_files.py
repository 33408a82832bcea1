"""Files that reshard writes for vLLM equal, byte for byte, those that vLLM's own saver wrote."""

import filecmp
from pathlib import Path

import pytest

import reshard

SAMPLES = Path(__file__).parents[2] / "shared" / "samples"


@pytest.mark.parametrize("name, original, mesh", [
    ("llama-tp2", "llama", {"tp": 2}),
    ("llama-kv2-tp4", "llama-kv2", {"tp": 4}),
    ("llama-tp2-pp2", "llama", {"tp": 2, "pp": 2}),
    ("qwen2-tp2", "qwen2", {"tp": 2}),
    ("phi3-tp2", "phi3", {"tp": 2}),
    ("qwen3-moe-tp2", "qwen3-moe", {"tp": 2}),
    ("gpt-oss-tp2", "gpt-oss", {"tp": 2}),
    ("deepseek-v3-tp2", "deepseek-v3", {"tp": 2}),
])  # fmt: skip
def test_vllm_files_are_vllms_own(tmp_path, name, original, mesh):
    report = reshard.convert(SAMPLES / "vllm/hf" / original, tmp_path / "out", format="vllm", **mesh)
    genuine = sorted(path.name for path in (SAMPLES / "vllm" / name).glob("*.safetensors"))
    assert sorted(report.files) == genuine
    for file in genuine:
        assert filecmp.cmp(SAMPLES / "vllm" / name / file, tmp_path / "out" / file, shallow=False), file


@pytest.mark.parametrize("name", sorted(path.name for path in (SAMPLES / "vllm").glob("*-tp*") if "fp8" not in path.name))  # quantised: not yet
def test_genuine_folders_are_read_back(tmp_path, name):
    """vLLM's own folder, without any manifest: the same parameters as the original's, and the original's tensors as HF."""
    original = SAMPLES / "vllm/hf" / name.partition("-tp")[0]
    source = reshard.open(SAMPLES / "vllm" / name, config=original)
    assert reshard.diff(source, original)
    reshard.convert(source, tmp_path / "back", format="hf")
    report = reshard.diff(tmp_path / "back", original)
    assert [d.name for d in report.differing if "e_score_correction_bias" not in d.name] == []  # vLLM keeps that one in F32


def test_the_models_dtype_comes_back(tmp_path):
    """vLLM holds DeepSeek's correction bias in F32; what reshard wrote goes back to the BF16 that the model has."""
    original = SAMPLES / "vllm/hf/deepseek-v3"
    reshard.convert(original, tmp_path / "vllm", format="vllm", tp=2)
    reshard.convert(tmp_path / "vllm", tmp_path / "megatron", format="megatron", ep=2)
    reshard.convert(tmp_path / "megatron", tmp_path / "back", format="hf")
    assert filecmp.cmp(original / "model.safetensors", tmp_path / "back/model.safetensors", shallow=False)


def test_diff_sees_exchanged_ranks(tmp_path):
    reshard.convert(SAMPLES / "vllm/hf/llama", tmp_path / "out", format="vllm", tp=2)
    assert reshard.diff(SAMPLES / "vllm/hf/llama", tmp_path / "out")
    a, b = (tmp_path / "out" / f"model-rank-{r}-part-0.safetensors" for r in (0, 1))
    a.rename(tmp_path / "a"), b.rename(a), (tmp_path / "a").rename(b)
    assert not reshard.diff(SAMPLES / "vllm/hf/llama", tmp_path / "out")
