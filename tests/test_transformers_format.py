"""transformers' distributed checkpoints and torch's, of models whose names in memory are not those of the Hub: judged by transformers."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import reshard

SAMPLES = Path(__file__).parents[2] / "shared" / "samples"
#: tied; fused on disk; experts that are stacked and fused in memory alone
FAMILIES = ["llama-tied", "phi3", "qwen3_moe", "mixtral"]
pytestmark = [pytest.mark.samples, pytest.mark.models]


def logits(model, family: str) -> torch.Tensor:
    with torch.no_grad():
        return model(load_file(SAMPLES / "hf" / family / "reference.safetensors.ref")["input_ids"]).logits


def opened(folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_opens_what_we_write(tmp_path, family):
    original = SAMPLES / "hf" / family
    reshard.convert(original, tmp_path / "out", format="transformers", tp=3)
    assert torch.equal(logits(opened(tmp_path / "out"), family), logits(opened(original), family))
    assert reshard.diff(tmp_path / "out", original)
    reshard.convert(tmp_path / "out", tmp_path / "back", format="hf")
    one, other = (load_file(folder / "model.safetensors") for folder in (tmp_path / "back", original))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("family", FAMILIES)
def test_torch_loads_our_dcp_into_transformers_models(tmp_path, family):
    import torch.distributed.checkpoint as dcp

    original = SAMPLES / "hf" / family
    reshard.convert(original, tmp_path / "dcp", format="dcp", tp=2)
    model = opened(original)
    want = logits(model, family)
    state = model.state_dict()
    with torch.no_grad():
        for tensor in state.values():
            tensor.fill_(float("nan"))
    assert logits(model, family).isnan().all()  # control
    dcp.load(state, checkpoint_id=str(tmp_path / "dcp"), no_dist=True)
    assert torch.equal(logits(model, family), want)
    assert reshard.diff(tmp_path / "dcp", original)


def test_inspect_tells_who_wrote_what(tmp_path):
    ours = tmp_path / "ours"
    reshard.convert(SAMPLES / "hf/llama", ours, format="transformers", tp=2)
    for folder, told in (
        (ours, ("transformers", "reshard", 2)),
        (SAMPLES / "transformers_dist/llama-tp2-fsdp2", ("transformers", "transformers, or torch's HuggingFaceStorageWriter", 4)),
        (SAMPLES / "accelerate/llama-fsdp2-dp2", ("dcp", "Accelerate (HF Trainer, Axolotl)", 2)),
    ):
        checkpoint = reshard.open(folder)
        assert (checkpoint.format, checkpoint.writer, checkpoint.holders) == told
