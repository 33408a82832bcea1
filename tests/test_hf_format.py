"""Hugging Face folders in several files: what we write, transformers and the index's own rules judge."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import reshard

SAMPLES = Path(__file__).parents[2] / "shared" / "samples"


def sharded(folder: Path, original: str = "llama", **options) -> Path:
    reshard.convert(SAMPLES / "hf" / original, folder, format="hf", max_file=100_000, **options)
    return folder


@pytest.mark.samples
def test_index_and_files_agree(tmp_path):
    index = json.loads((sharded(tmp_path / "out") / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)] and len(files) > 3
    states = {file: load_file(tmp_path / "out" / file) for file in files}
    assert index["weight_map"] == {name: file for file in files for name in states[file]}
    whole = load_file(SAMPLES / "hf/llama/model.safetensors")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    assert all(sum(t.nbytes for t in s.values()) <= 100_000 or len(s) == 1 for s in states.values())
    assert all(torch.equal(states[index["weight_map"][name]][name], whole[name]) for name in whole)


@pytest.mark.samples
def test_sharded_folders_are_read(tmp_path):
    assert reshard.diff(sharded(tmp_path / "out"), SAMPLES / "hf/llama")
    reshard.convert(tmp_path / "out", tmp_path / "one", format="hf")
    assert (tmp_path / "one/model.safetensors").read_bytes() == (SAMPLES / "hf/llama/model.safetensors").read_bytes()


@pytest.mark.samples
def test_exchanged_files_are_noticed(tmp_path):
    sharded(tmp_path / "out")
    (tmp_path / "out/reshard.json").unlink()
    one, two = sorted((tmp_path / "out").glob("*.safetensors"))[:2]
    shutil.move(one, tmp_path / "kept"), shutil.move(two, one), shutil.move(tmp_path / "kept", two)
    with pytest.raises(reshard.FormatError, match=r"lacks .*, which model\.safetensors\.index\.json says it holds"):
        reshard.open(tmp_path / "out")


@pytest.mark.samples
@pytest.mark.models
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3", "gpt_neox", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_transformers_computes_the_same(tmp_path, family):
    """HF → vLLM TP2 → HF in several files, then the model's own logits against those that the sample recorded."""
    transformers = pytest.importorskip("transformers")
    original = SAMPLES / "hf" / family
    reshard.convert(original, tmp_path / "mid", format="vllm", tp=2)
    reshard.convert(tmp_path / "mid", tmp_path / "back", format="hf", max_file=100_000)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32, attn_implementation="eager")
    reference = load_file(original / "reference.safetensors.ref")
    with torch.no_grad():
        logits = model(reference["input_ids"]).logits
    assert torch.allclose(logits, reference["logits"], atol=1e-4 * reference["logits"].abs().max().item(), rtol=0)
