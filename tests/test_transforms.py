"""Entries that hold a function of a tensor: computed where one side alone holds it, copied where both do, told either way."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import reshard
from reshard.errors import PlanError
from reshard.executor import values

LAYOUT = """
architectures = ["MadeUpForCausalLM"]
[place.model]
hf = "model"
vllm = "model"
sglang = "model"
[place.layer]
count = "depth"
hf = "model.layers.{layer}"
vllm = "model.layers.{layer}"
sglang = "model.layers.{layer}"
parts = ["mixer"]
[axes]
width = "width"
heads = "heads"
[part.mixer]
at = ""
[part.mixer.tensors]
norm = "width"
a_log = "heads*"
up = "heads* width"
[part.mixer.hf]
norm = "norm"
a_log = "a_log"
up = "up"
[part.mixer.vllm]
norm = { name = "norm", transform = "plus_one" }
a_log = { name = "A", transform = "minus_exp", dtype = "F32" }
up = "up"
[part.mixer.sglang]
norm = { name = "norm", transform = "minus_one" }
a_log = { name = "A", transform = "minus_exp", dtype = "F32" }
up = "up"
"""
CONFIG = {"architectures": ["MadeUpForCausalLM"], "depth": 2, "width": 6, "heads": 8}


@pytest.fixture
def source(tmp_path):
    torch.manual_seed(0)
    (tmp_path / "own.toml").write_text(LAYOUT)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text(json.dumps(CONFIG))
    of = {"norm": (6,), "a_log": (8,), "up": (8, 6)}
    state = {f"model.layers.{i}.{name}": torch.randn(shape).bfloat16() for i in range(2) for name, shape in of.items()}
    save_file(state, tmp_path / "hf/model.safetensors")
    return reshard.open(tmp_path / "hf", layout=tmp_path / "own.toml")


def state(folder):
    return [load_file(path) for path in sorted(folder.glob("*.safetensors"))]


def test_an_engine_gets_the_function_and_the_model_its_tensor_back(tmp_path, source):
    job = reshard.plan(source, format="vllm", tp=2)
    report = reshard.convert(source, tmp_path / "vllm", format="vllm", tp=2, engine_version="0.32")
    assert report.bytes_read == job.bytes_read
    (whole,) = state(tmp_path / "hf")
    for rank, own in enumerate(state(tmp_path / "vllm")):
        for i in range(2):
            at = f"model.layers.{i}."
            assert torch.equal(own[at + "norm"], (1 + whole[at + "norm"].float()).bfloat16())
            wanted = -torch.exp(whole[at + "a_log"].float())[4 * rank : 4 * rank + 4]
            assert own[at + "A"].dtype == torch.float32
            torch.testing.assert_close(own[at + "A"], wanted, rtol=2e-7, atol=0)  # torch's own exp is off by one in the last place
            assert torch.equal(own[at + "up"], whole[at + "up"][4 * rank : 4 * rank + 4])
    opened = reshard.open(tmp_path / "vllm", layout=tmp_path / "own.toml")
    reshard.convert(opened, tmp_path / "back", format="hf")
    (back,) = state(tmp_path / "back")
    assert all(torch.equal(back[name], whole[name]) for name in whole if "norm" not in name)
    assert {name: tensor.dtype for name, tensor in back.items()} == {name: tensor.dtype for name, tensor in whole.items()}


def test_what_both_sides_hold_is_copied(tmp_path, source):
    reshard.convert(source, tmp_path / "two", format="vllm", tp=2)
    opened = reshard.open(tmp_path / "two", layout=tmp_path / "own.toml")
    job = reshard.plan(opened, format="vllm", tp=4)
    assert not any(pattern.value for pattern in job.plan.join.patterns) and "computed" not in job.describe()
    reshard.convert(opened, tmp_path / "four", format="vllm", tp=4)
    one, other = (torch.cat([own["model.layers.1.A"] for own in state(tmp_path / name)]) for name in ("two", "four"))
    assert torch.equal(one, other)


def test_what_is_computed_is_told(source):
    job = reshard.plan(source, format="vllm", tp=2)
    assert "computed: 4 tensors (minus_exp, plus_one): a_log, norm" in job.describe()
    assert job.to_json()["computed"] == {"a_log": "minus_exp", "norm": "plus_one"}
    assert reshard.plan(source, format="tp", tp=2).to_json()["computed"] == {}


def test_another_function_is_not_made_of_it(tmp_path, source):
    reshard.convert(source, tmp_path / "two", format="vllm", tp=2)
    with pytest.raises(PlanError, match=r"norm .*needs minus_one\(norm\) of layer 0, which the source does not have"):
        reshard.plan(reshard.open(tmp_path / "two", layout=tmp_path / "own.toml"), format="sglang", tp=2)


def test_a_value_that_no_logarithm_has_is_no_silent_nan(tmp_path, source):
    reshard.convert(source, tmp_path / "two", format="vllm", tp=2)
    path = sorted((tmp_path / "two").glob("*.safetensors"))[1]
    own = load_file(path)
    own["model.layers.1.A"][2] = 0.5
    save_file(own, path)
    with pytest.raises(reshard.ReshardError, match="log_minus"):
        reshard.convert(reshard.open(tmp_path / "two", layout=tmp_path / "own.toml"), tmp_path / "back", format="hf")


def test_a_wrong_function_is_seen(tmp_path, source, monkeypatch):
    monkeypatch.setitem(values.FUNCTIONS, "plus_one", lambda given: given.arrays[0].astype(np.float32) + 2)
    reshard.convert(source, tmp_path / "vllm", format="vllm")
    (whole,), (own,) = state(tmp_path / "hf"), state(tmp_path / "vllm")
    assert not torch.equal(own["model.layers.0.norm"], (1 + whole["model.layers.0.norm"].float()).bfloat16())
