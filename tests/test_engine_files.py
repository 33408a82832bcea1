"""Files that reshard writes for vLLM equal, byte for byte, those that vLLM's own saver wrote."""

import filecmp
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import reshard

pytestmark = pytest.mark.samples
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


@pytest.mark.parametrize(
    "name", sorted(path.name for path in (SAMPLES / "vllm").glob("*-tp*") if "fp8" not in path.name)
)  # quantised: not yet
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


@pytest.mark.parametrize("version", ["0.11.2", "0.19.1", "0.23.0", "0.32"])
@pytest.mark.parametrize("name", ["qwen3-moe", "deepseek-v3"])
def test_files_for_older_releases(tmp_path, name, version):
    """Names of the release that is asked for; read back with the manifest, and without it by the names alone."""
    original = SAMPLES / "vllm/hf" / name
    reshard.convert(original, tmp_path / "out", format="vllm", tp=2, engine_version=version)
    names = set(load_file(tmp_path / "out/model-rank-0-part-0.safetensors"))
    assert any("routed_experts.w13_weight" in n for n in names) == (version == "0.32")
    assert any(n.endswith("_k_scale") for n in names) == (version != "0.11.2")
    assert reshard.open(tmp_path / "out").engine_version == version
    assert reshard.diff(tmp_path / "out", original)
    (tmp_path / "out/reshard.json").unlink()
    assert reshard.diff(tmp_path / "out", original)


def test_meshes_that_a_release_cannot_read_are_refused(tmp_path):
    llama, moe = SAMPLES / "vllm/hf/llama", SAMPLES / "vllm/hf/qwen3-moe"
    for options, says in [({"format": "vllm", "pp": 2, "engine_version": "0.28"}, "no names for files of pipeline stages"),
                          ({"format": "sglang", "pp": 2}, "SGLang has no names for files of pipeline stages")]:  # fmt: skip
        with pytest.raises(reshard.PlanError, match=says):
            reshard.plan(llama, **options)
    with pytest.raises(reshard.PlanError, match="expert map"):
        reshard.plan(moe, format="vllm", tp=2, ep=2, engine_version="0.23")
    with pytest.raises(reshard.PlanError, match="ep=2 with tp=4"):
        reshard.plan(moe, format="vllm", tp=4, ep=2)


@pytest.mark.parametrize("name", ["llama", "qwen3-moe", "gpt-oss", "deepseek-v3"])
def test_sglang_folders(tmp_path, name):
    """SGLang's files are named as vLLM's: the manifest tells them apart, or --from where there is none."""
    original = SAMPLES / "vllm/hf" / name
    reshard.convert(original, tmp_path / "out", format="sglang", tp=2)
    assert reshard.open(tmp_path / "out").format == "sglang"
    assert not any("_scale" in n for n in load_file(tmp_path / "out/model-rank-1-part-0.safetensors"))
    assert reshard.diff(tmp_path / "out", original)
    (tmp_path / "out/reshard.json").unlink()
    assert reshard.diff(reshard.open(tmp_path / "out", format="sglang"), original)


def test_expert_parallel_ranks_hold_whole_experts(tmp_path):
    original = SAMPLES / "vllm/hf/qwen3-moe"
    reshard.convert(original, tmp_path / "out", format="vllm", tp=2, ep=2)
    whole = load_file(original / "model.safetensors")
    experts = sum(1 for n in whole if n.startswith("model.layers.0.mlp.experts.") and n.endswith("down_proj.weight"))
    for rank in range(2):
        state = load_file(tmp_path / f"out/model-rank-{rank}-part-0.safetensors")
        mine = range(rank * experts // 2, (rank + 1) * experts // 2)
        down = torch.stack([whole[f"model.layers.0.mlp.experts.{e}.down_proj.weight"] for e in mine])
        assert torch.equal(state["model.layers.0.mlp.experts.routed_experts.w2_weight"], down)
    assert reshard.diff(tmp_path / "out", original)
