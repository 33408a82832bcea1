"""Descriptors whose geometry does not fit are refused on the plan, by entry and number; and what `view` means."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import reshard

LAYOUT = """
architectures = ["MadeUpForCausalLM"]
[place.model]
hf = ""
vllm = ""
parts = ["last"]
[place.layer]
count = "depth"
hf = "block.{layer}"
vllm = "PLACE"
parts = ["block"]
[axes]
width = "width"
[part.last]
tensors.norm = "width"
hf.norm = "norm"
vllm.norm = "norm"
[part.block]
axes.wide = "wide"
tensors.gate = "wide* width"
hf.gate = "gate"
vllm.gate = ENTRY
"""
CONFIG = {"architectures": ["MadeUpForCausalLM"], "depth": 2, "width": 6, "wide": 4}


@pytest.fixture
def model(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/config.json").write_text(json.dumps(CONFIG))
    shapes = {"norm": (6,), "block.0.gate": (4, 6), "block.1.gate": (4, 6)}
    save_file({name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}, tmp_path / "a/model.safetensors")
    return tmp_path


def opened(model, entry, config=CONFIG, place="m.{layer}"):
    (model / "own.toml").write_text(LAYOUT.replace("ENTRY", entry).replace("PLACE", place))
    (model / "a/config.json").write_text(json.dumps(config))
    return reshard.open(model / "a", layout=model / "own.toml")


@pytest.mark.parametrize(
    ("place", "view", "count"),
    [("m.{layer}", "[[0], [0, 1]]", 2), ("m.{layer}", "[[0]]", 2), ("m.{layer}", "[[0, 1], [2]]", 2), ("m", "[[0, 1]]", 3)],
)
def test_a_view_that_does_not_fit_is_refused_with_the_descriptor(model, place, view, count):
    """defects.md A5, A6: the plan accepted them, and convert crashed, or wrote one tensor over another."""
    with pytest.raises(reshard.LayoutError, match=f"must join the dimensions 0 to {count - 1}, each once"):
        opened(model, f'{{ name = "g", view = {view} }}', place=place)


@pytest.mark.parametrize(
    ("place", "entry", "words"),
    [
        ("m.{layer}", '["g", { name = "g", copy = true }]', "two entries of the layout store something under this name"),
        ("m.{layer}", '{ name = "g", pad = { width = "8" } }', "its padding would lie between its elements"),
        ("m", '{ name = "gates", pad = { wide = "8" } }', "its padding would lie between its elements"),
    ],
)
def test_what_does_not_fit_is_refused_by_plan_and_load(model, place, entry, words):
    """defects.md A6: duplicate names, padding inside a tensor."""
    source = opened(model, entry, place=place)
    for refused in (
        lambda: reshard.plan(source, format="vllm"),
        lambda: reshard.plan(source, format="vllm", rank=0),
        lambda: reshard.load(source, format="vllm"),
        lambda: reshard.convert(source, model / "out", format="vllm"),
    ):
        with pytest.raises(reshard.PlanError, match=words):
            refused()
    assert not (model / "out").exists()


@pytest.mark.parametrize(("place", "shape"), [("m.{layer}", [24]), ("m", [2, 24])])
def test_a_view_holds_for_plain_entries_as_for_stacked_ones(model, place, shape):
    """defects.md A5: plain entries ignored `view`."""
    plain = "layer" in place
    source = opened(model, f'{{ name = "g", view = {"[[0, 1]]" if plain else "[[0], [1, 2]]"} }}', place=place)
    state = reshard.load(source, format="vllm")
    whole = load_file(model / "a/model.safetensors")
    gates = [state[f"m.{layer}.g"] for layer in (0, 1)] if plain else list(state["m.g"])
    assert list(state["m.0.g" if plain else "m.g"].shape) == shape
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
    with pytest.raises(reshard.LayoutError, match=f"has no elements: axis {axis} = '{axis}' is 0"):
        opened(model, '"g"', {**CONFIG, axis: 0})
