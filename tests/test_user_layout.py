"""A descriptor of the user's own, and what happens to a model that none describes."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from family_checkpoints import checkpoint
from safetensors.torch import load_file, save_file

import reshard
from reshard.conversion.placing import join_to, place
from reshard.errors import PlanError
from reshard.layout import Mesh, load_descriptor

LAYOUT = """
description = "made up: query and key fused head by head, a wide gate, one tensor transposed"
architectures = ["MadeUpForCausalLM"]
[place.model]
hf = ""
parts = ["ends"]
[place.layer]
count = "depth"
hf = "block.{layer}"
parts = ["block"]
[axes]
width = "width"
[part.ends]
axes.vocab = "words"
tensors.words = { dims = "vocab* width", stage = "first" }
tensors.norm = "width"
hf.words = "words"
hf.norm = "norm"
[part.block.axes]
heads = "heads"
head = "width / heads"
wide = "4 * width"
[part.block.tensors]
q = "(heads* head) width"
k = "(heads* head) width"
gate = "wide* width"
out = "width wide*"
[part.block.hf]
qk = { name = "qk", of = "heads: q k" }
gate = "gate"
out = { name = "out", dims = "wide width" }
"""
CONFIG = {"architectures": ["MadeUpForCausalLM"], "depth": 2, "words": 50, "width": 12, "heads": 4}


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    shapes = {"words": (50, 12), "norm": (12,)}
    for layer in range(2):
        shapes |= {f"block.{layer}.qk": (24, 12), f"block.{layer}.gate": (48, 12), f"block.{layer}.out": (48, 12)}
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(CONFIG))
    save_file({name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}, tmp_path / "model/model.safetensors")
    (tmp_path / "made_up.toml").write_text(LAYOUT)
    return tmp_path / "model"


def test_round_trip_by_a_layout_of_ones_own(model, tmp_path):
    source = reshard.open(model, layout=tmp_path / "made_up.toml")
    reshard.convert(source, tmp_path / "tp2", format="tp", tp=2)
    whole, rank1 = load_file(model / "model.safetensors"), load_file(tmp_path / "tp2/shard-00002-model-00001-of-00001.safetensors")
    assert torch.equal(rank1["block.1.out"], whole["block.1.out"][24:])  # stored wide × width: its split axis is dim 0
    assert torch.equal(rank1["block.0.qk"], whole["block.0.qk"][12:])  # heads 2 and 3, query and key of each together
    shards = reshard.open(tmp_path / "tp2", layout=tmp_path / "made_up.toml")
    assert reshard.diff(source, shards)
    reshard.convert(shards, tmp_path / "back", format="hf")
    back = load_file(tmp_path / "back/model.safetensors")
    assert whole.keys() == back.keys() and all(torch.equal(whole[n], back[n]) for n in whole)


def test_a_format_that_the_layout_lacks(model, tmp_path):
    with pytest.raises(reshard.LayoutError, match="made_up says nothing of format vllm") as caught:
        reshard.plan(reshard.open(model, layout=tmp_path / "made_up.toml"), format="vllm", tp=2)
    assert "add a [vllm] table" in caught.value.hint


def test_an_unknown_architecture(model):
    with pytest.raises(reshard.LayoutError, match="no layout descriptor for architecture MadeUpForCausalLM") as caught:
        reshard.open(model)
    assert "block.0.qk" in str(caught.value) and "--layout" in caught.value.hint


def test_closest_family(tmp_path):
    from reshard.demo import CONFIG as LLAMA
    from reshard.demo import make_model

    make_model(tmp_path / "model")
    config = {**LLAMA, "architectures": ["NewForCausalLM"]}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    with pytest.raises(reshard.LayoutError, match="llama explains the names of all") as caught:
        reshard.open(tmp_path / "model")
    assert 'extends = "llama"' in caught.value.hint
    (tmp_path / "new.toml").write_text('extends = "llama"\narchitectures = ["NewForCausalLM"]\n')
    assert reshard.open(tmp_path / "model", layout=tmp_path / "new.toml").layout.name == "new"


def test_another_models_config(tmp_path):
    """Shards say which layout wrote them: a config.json of another family is refused, not read as that family."""
    from reshard.demo import CONFIG as LLAMA
    from reshard.demo import make_model

    make_model(tmp_path / "model")
    reshard.convert(tmp_path / "model", tmp_path / "tp", format="tp", tp=3)
    (tmp_path / "tp/config.json").write_text(json.dumps({**LLAMA, "architectures": ["Qwen2ForCausalLM"]}))
    with pytest.raises(reshard.FormatError, match="written by layout llama, .* is a model of layout qwen2"):
        reshard.open(tmp_path / "tp")


@pytest.mark.parametrize("number", range(4))
def test_descriptors_of_the_guide_load(tmp_path, number):
    guide = Path(__file__).parents[1] / "docs/guides/descriptor.md"
    texts = re.findall(r"```toml\n(.*?)```", guide.read_text(), flags=re.S)
    assert len(texts) == 4
    (tmp_path / "guide.toml").write_text(texts[number])
    descriptor = load_descriptor(tmp_path / "guide.toml")
    assert "hf" in descriptor.formats and descriptor.architectures


def test_a_tensor_without_a_place_says_what_to_write(tmp_path):
    source = reshard.open(checkpoint("llama", tmp_path / "hf"))
    placement = place(source, "vllm", Mesh(2))
    entries = tuple(entry for entry in placement.section.entries if entry.label != "down")
    with pytest.raises(PlanError, match="down of layer 0 .* has no place in the destination") as error:
        join_to(source, replace(placement, section=replace(placement.section, entries=entries)), None)
    assert "a descriptor that extends llama" in error.value.hint and "omit = true" in error.value.hint
