"""Vision towers and projectors that are carried: whole on every rank, byte for byte, beside a text model that is cut."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import reshard
from reshard.demo import make_model
from reshard.errors import LayoutError, PlanError
from reshard.layout import load_descriptor

LAYOUT = """
extends = "llama"
architectures = ["SeeingForConditionalGeneration"]
[place.root]
vllm = "language_model"
[place.model]
hf = "model.language_model"
[place.visual]
hf = "model.visual"
vllm = "visual"
carry = true
[place.projector]
hf = "model.projector"
carry = true
"""
CONFIG = {
    "architectures": ["SeeingForConditionalGeneration"], "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 4, "vocab_size": 64, "num_hidden_layers": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
}  # fmt: skip
TOWER = {
    "model.visual.patch.weight": torch.randn(3, 4, 2, 2), "model.visual.blocks.0.qkv.weight": torch.randn(12, 4).bfloat16(),
    "model.visual.blocks.0.square": torch.randn(4, 4).half(), "model.visual.scale": torch.tensor(1.5), "model.visual.ids": torch.arange(5),
    "model.projector.weight": torch.randn(16, 4),
}  # fmt: skip
PROJECTOR_BYTES = 16 * 4 * 4


@pytest.fixture
def seeing(tmp_path):
    (tmp_path / "own.toml").write_text(LAYOUT)
    make_model(tmp_path / "text", {**CONFIG, "architectures": ["LlamaForCausalLM"]})
    text = load_file(tmp_path / "text/model.safetensors")
    state = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in text.items()} | TOWER
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text(json.dumps(CONFIG))
    save_file(state, tmp_path / "hf/model.safetensors", {"format": "pt"})
    return tmp_path


def opened(folder):
    return reshard.open(folder, layout=folder.parent / "own.toml")


@pytest.mark.parametrize("target", [{"format": "tp", "tp": 2}, {"format": "tp", "tp": 2, "pp": 2}, {"format": "rank-pt", "tp": 4}])
def test_carried_there_and_back_byte_for_byte(seeing, target):
    reshard.convert(opened(seeing / "hf"), seeing / "cut", **target)
    report = reshard.diff(seeing / "hf", seeing / "cut", layout=seeing / "own.toml")
    assert report and report.tensors == len(load_file(seeing / "hf/model.safetensors"))
    reshard.convert(opened(seeing / "cut"), seeing / "back", format="hf")
    whole, back = load_file(seeing / "hf/model.safetensors"), load_file(seeing / "back/model.safetensors")
    assert whole.keys() == back.keys() and all(
        whole[name].dtype == back[name].dtype and torch.equal(whole[name], back[name]) for name in whole
    )
    for file in (seeing / "cut").glob("shard-0000[12]*"):  # each rank of the first stage has the tower whole
        held = load_file(file)
        assert all(torch.equal(held[name], tensor) for name, tensor in TOWER.items())


def test_a_cast_passes_by_what_is_carried(seeing):
    reshard.convert(opened(seeing / "hf"), seeing / "wide", format="hf", dtype="fp32")
    wide = load_file(seeing / "wide/model.safetensors")
    assert wide["lm_head.weight"].dtype == torch.float32
    assert all(wide[name].dtype == tensor.dtype for name, tensor in TOWER.items())


def test_an_engine_without_a_prefix_lacks_it_and_says_so(seeing):
    """vLLM has the tower by the layout's word; nobody said where it has the projector."""
    job = reshard.plan(opened(seeing / "hf"), format="vllm", tp=2)
    assert job.left_out == ["model.projector.weight"] and job.to_json()["left_out_bytes"] == PROJECTOR_BYTES
    assert {s.name for s in job.plan.destinations if s.rank == 1} >= {"visual.scale", "visual.blocks.0.qkv.weight"}
    reshard.convert(opened(seeing / "hf"), seeing / "v", format="vllm", tp=2)
    assert json.loads((seeing / "v/reshard.json").read_text())["left_out"] == {
        "tensors": ["model.projector.weight"],
        "bytes": PROJECTOR_BYTES,
    }
    assert reshard.diff(seeing / "hf", seeing / "v", layout=seeing / "own.toml").missing_in_b == ["model.projector.weight"]


def test_control_a_changed_byte_of_the_tower_is_seen(seeing):
    reshard.convert(opened(seeing / "hf"), seeing / "cut", format="tp", tp=2)
    stored = next(s for s in opened(seeing / "cut").stored if s.name == "model.visual.ids" and s.rank == 1)
    with open(seeing / "cut" / stored.file, "r+b") as file:
        file.seek(stored.start)
        file.write(b"\7")
    assert [d.name for d in reshard.diff(seeing / "hf", seeing / "cut", layout=seeing / "own.toml").differing] == ["model.visual.ids"]
    with pytest.raises(reshard.FormatError, match="model.visual.ids.*different values"):
        reshard.convert(opened(seeing / "cut"), seeing / "back", format="hf")


def test_a_name_that_would_be_an_expression_is_no_name(seeing):
    state = load_file(seeing / "hf/model.safetensors")
    save_file({**state, "model.visual.{1+1}": torch.ones(1)}, seeing / "hf/model.safetensors")
    with pytest.raises(PlanError, match="1\\+1.*is not in layout"):
        opened(seeing / "hf")


def test_mistakes_in_a_place_that_is_carried(tmp_path):
    for line, words in (
        ('parts = ["gqa"]', "carry and parts together"),
        ("optional = true", "carry and optional together"),
        ('hf = ""', "needs a prefix"),
    ):
        text = LAYOUT.replace('hf = "model.projector"', line if line.startswith("hf") else f'hf = "model.projector"\n{line}')
        (tmp_path / "bad.toml").write_text(text)
        with pytest.raises(LayoutError, match=words):
            load_descriptor(tmp_path / "bad.toml")
