"""Descriptors whose geometry does not fit are refused on the plan, by entry and number; and what `view` means."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import reshard

LAYOUT = """
architectures = ["MadeUpForCausalLM"]
[axes]
layer = "depth"
width = "width"
wide = "wide"
[tensors]
gate = "{layer} wide* width"
norm = "width"
[hf]
gate = "block.{layer}.gate"
norm = "norm"
[vllm]
gate = "model.layers.{layer}.gate"
norm = "norm"
"""
CONFIG = {"architectures": ["MadeUpForCausalLM"], "depth": 2, "width": 6, "wide": 4}


@pytest.fixture
def model(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/config.json").write_text(json.dumps(CONFIG))
    shapes = {"norm": (6,), "block.0.gate": (4, 6), "block.1.gate": (4, 6)}
    save_file({name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}, tmp_path / "a/model.safetensors")
    return tmp_path


def opened(model, vllm, config=CONFIG):
    (model / "own.toml").write_text(LAYOUT.replace('"model.layers.{layer}.gate"', vllm))
    (model / "a/config.json").write_text(json.dumps(config))
    return reshard.open(model / "a", layout=model / "own.toml")


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ('{ name = "g.{layer}", view = [[0], [0, 1]] }', r"view = \[\[0\], \[0, 1\]\] must join the dimensions 0 to 1, each once"),
        ('{ name = "g.{layer}", view = [[0]] }', "must join the dimensions 0 to 1, each once"),
        ('{ name = "g.{layer}", view = [[0, 1], [2]] }', "must join the dimensions 0 to 1, each once"),
        ('{ name = "gates", view = [[0, 1]] }', "must join the dimensions 0 to 2, each once"),
        ('{ name = "g.{layer}", pad = { width = "8" } }', "would be padded inside the stored tensor"),
        ('{ name = "gates", pad = { wide = "8" } }', "would be padded inside the stored tensor"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_descriptor(model, entry, words):
    """defects.md A5, A6: the plan accepted them, and convert crashed, or wrote one tensor over another."""
    with pytest.raises(reshard.LayoutError, match=words):
        opened(model, entry)


def test_one_name_for_two_tensors_is_refused_by_plan_and_load(model):
    """defects.md A6: duplicate names."""
    twice = LAYOUT.replace('"model.layers.{layer}.gate"', '"g.{layer}"') + 'twice = { name = "norm", of = ["norm"] }\n'
    (model / "own.toml").write_text(twice)
    source = reshard.open(model / "a", layout=model / "own.toml")
    for refused in (
        lambda: reshard.plan(source, format="vllm"),
        lambda: reshard.plan(source, format="vllm", rank=0),
        lambda: reshard.load(source, format="vllm"),
        lambda: reshard.convert(source, model / "out", format="vllm"),
    ):
        with pytest.raises(reshard.PlanError, match="two entries of the layout store something under this name"):
            refused()
    assert not (model / "out").exists()


@pytest.mark.parametrize(("entry", "shape"), [("g.{layer}", [24]), ("gates", [2, 24])])
def test_a_view_holds_for_plain_entries_as_for_stacked_ones(model, entry, shape):
    """defects.md A5: plain entries ignored `view`."""
    source = opened(model, f'{{ name = "{entry}", view = {"[[0, 1]]" if "layer" in entry else "[[0], [1, 2]]"} }}')
    state = reshard.load(source, format="vllm")
    whole = load_file(model / "a/model.safetensors")
    gates = [state[f"g.{layer}"] for layer in (0, 1)] if "layer" in entry else list(state["gates"])
    assert list(state[entry.format(layer=0)].shape) == shape
    assert all(torch.equal(gate, whole[f"block.{layer}.gate"].reshape(-1)) for layer, gate in enumerate(gates))
    reshard.convert(source, model / "m", format="vllm")
    back = reshard.open(model / "m", layout=model / "own.toml", config=model / "a")
    assert reshard.diff(source, back)


@pytest.mark.parametrize("axis", ["width", "wide"])
def test_an_axis_of_no_elements_is_named(model, axis):
    """defects.md A6: an IndexError in the format that was written."""
    shape = [0 if axis == "wide" else 4, 0 if axis == "width" else 6]
    state = {"norm": torch.ones(shape[1]).bfloat16()} | {f"block.{layer}.gate": torch.ones(shape).bfloat16() for layer in (0, 1)}
    save_file(state, model / "a/model.safetensors")
    with pytest.raises(reshard.LayoutError, match=f"gate has no elements: axis {axis} = '{axis}' is 0"):
        opened(model, '"g.{layer}"', {**CONFIG, axis: 0})
