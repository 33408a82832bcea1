"""Shards of codes and scales are run as the weights that each rank's own give; planted defects in scales are found."""

import json
from pathlib import Path
from shutil import copytree

import pytest
import torch
from safetensors.torch import load_file

import reshard

pytest.importorskip("transformers")

from ranks import verify

from reshard.verify.report import Report

pytestmark = [pytest.mark.models, pytest.mark.samples]
SAMPLES = Path(__file__).parents[2] / "shared" / "samples"
if not SAMPLES.is_dir():
    pytest.skip("no samples beside the checkout", allow_module_level=True)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """vLLM's own FP8 shards, and the weights that their model stands for."""
    folder = tmp_path_factory.mktemp("llama")
    source = SAMPLES / "vllm/hf/llama-fp8"
    reshard.convert(source, folder / "twin", format="hf", dequantise=True)
    for format in ("vllm", "tp"):
        reshard.convert(source, folder / format, format=format, tp=2)
    return folder


@pytest.mark.parametrize("format", ["vllm", "tp"])
def test_codes_and_scales_of_each_rank_are_run(llama, format):
    report = verify(llama / format, reference=llama / "twin")
    assert getattr(report, "passed", False), str(report)


def test_mxfp4_is_run(tmp_path):
    reshard.convert(SAMPLES / "hf/gpt_oss-mxfp4", tmp_path / "tp3", format="tp", tp=3)
    report = verify(tmp_path / "tp3", reference=SAMPLES / "hf/gpt_oss-mxfp4-dequantized-bf16")
    assert getattr(report, "passed", False), str(report)


def exchanged(scale):
    scale[0, 0], scale[1, 1] = scale[1, 1].clone(), scale[0, 0].clone()
    return scale


def halved(scale):
    scale[1, 0] /= 2
    return scale


def shifted(scale):
    return scale.roll(1, 1).contiguous()


@pytest.mark.parametrize("defect", [exchanged, halved, shifted])
@pytest.mark.parametrize("where", ["self_attn.qkv_proj", "mlp.down_proj"])
def test_planted_defects_in_scales_are_found(llama, tmp_path, defect, where):
    copytree(llama / "vllm", tmp_path / "vllm")
    path, name = tmp_path / "vllm/model-rank-1-part-0.safetensors", f"model.layers.1.{where}.weight_scale_inv"
    path.chmod(0o644)
    before = load_file(path)[name].clone()
    after = defect(before.clone())
    assert not torch.equal(before, after)
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    begin, end = json.loads(content[8:start])[name]["data_offsets"]
    content[start + begin : start + end] = after.numpy().tobytes()
    path.write_bytes(content)
    report = verify(tmp_path / "vllm", reference=llama / "twin")
    assert isinstance(report, Report), report
    assert not report.passed and not report.shards.passed and not report.missed, str(report)
