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
])  # fmt: skip
def test_vllm_files_are_vllms_own(tmp_path, name, original, mesh):
    report = reshard.convert(SAMPLES / "vllm/hf" / original, tmp_path / "out", format="vllm", **mesh)
    genuine = sorted(path.name for path in (SAMPLES / "vllm" / name).glob("*.safetensors"))
    assert sorted(report.files) == genuine
    for file in genuine:
        assert filecmp.cmp(SAMPLES / "vllm" / name / file, tmp_path / "out" / file, shallow=False), file


def test_diff_sees_exchanged_ranks(tmp_path):
    reshard.convert(SAMPLES / "vllm/hf/llama", tmp_path / "out", format="vllm", tp=2)
    assert reshard.diff(SAMPLES / "vllm/hf/llama", tmp_path / "out")
    a, b = (tmp_path / "out" / f"model-rank-{r}-part-0.safetensors" for r in (0, 1))
    a.rename(tmp_path / "a"), b.rename(a), (tmp_path / "a").rename(b)
    assert not reshard.diff(SAMPLES / "vllm/hf/llama", tmp_path / "out")
