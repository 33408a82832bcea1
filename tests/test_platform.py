"""--engine-platform: names that hang on what the engine runs on, written, noted in the manifest, and read back."""

import json

import pytest

import reshard
from reshard.cli import main
from reshard.demo import CONFIG, make_model
from reshard.errors import PlanError

LAYOUT = """
extends = "llama"
architectures = ["LlamaForCausalLM"]
[vllm]
o = [
    { name = ".o_proj.weight", when = "platform == 'cuda'" },
    { name = ".o_proj.packed", when = "platform != 'cuda'" },
]
"""


@pytest.fixture
def model(tmp_path):
    make_model(tmp_path / "hf", CONFIG)
    (tmp_path / "own.toml").write_text(LAYOUT)
    return reshard.open(tmp_path / "hf", layout=tmp_path / "own.toml")


def names(job):
    return {stored.name.rsplit(".", 1)[1] for stored in job.plan.destinations if "o_proj" in stored.name}


def test_a_name_hangs_on_the_platform(model, tmp_path):
    assert names(reshard.plan(model, format="vllm")) == names(reshard.plan(model, format="vllm", engine_platform="cuda")) == {"weight"}
    assert names(reshard.plan(model, format="vllm", engine_platform="rocm")) == {"packed"}
    reshard.convert(model, tmp_path / "v", format="vllm", tp=3, engine_platform="cpu")
    assert json.loads((tmp_path / "v/reshard.json").read_text())["engine_platform"] == "cpu"
    assert reshard.diff(model.path, tmp_path / "v", layout=tmp_path / "own.toml")


def test_control_without_the_manifests_word_the_names_are_strange(model, tmp_path):
    reshard.convert(model, tmp_path / "v", format="vllm", tp=3, engine_platform="cpu")
    (tmp_path / "v/reshard.json").unlink()
    with pytest.raises(PlanError, match="o_proj"):
        reshard.open(tmp_path / "v", layout=tmp_path / "own.toml", config=tmp_path / "hf")


def test_platforms_without_meaning_are_refused(model, capsys):
    with pytest.raises(PlanError, match="engine-platform.* has no meaning for format tp"):
        reshard.plan(model, format="tp", engine_platform="cpu")
    with pytest.raises(PlanError, match="engine-platform 'tpu'|engine-platform tpu"):
        reshard.plan(model, format="vllm", engine_platform="tpu")
    with pytest.raises(SystemExit) as end:
        main(["plan", str(model.path), "--to", "hf", "--engine-platform", "cpu"])
    assert end.value.code == 1 and "--to vllm" in capsys.readouterr().err
