"""Comparing after a cast or within a tolerance, sizes of files, and what the machine has."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_cli import model, run  # noqa: F401  fixtures

import reshard
from reshard import cli

NAME = "model.layers.0.mlp.down_proj.weight"


def changed(name: str, how) -> None:
    """The demo's model as `name`, in fp32, with one tensor changed by `how`."""
    reshard.convert("model", name, format="hf", dtype="fp32")
    state = load_file(f"{name}/model.safetensors")
    state[NAME] = how(state[NAME])
    save_file(state, f"{name}/model.safetensors", {"format": "pt"})
    Path(name, "reshard.json").unlink()


def test_a_cast_is_confirmed(model, run):  # noqa: F811
    reshard.convert("model", "wide", format="hf", dtype="fp32")
    assert run("diff model wide")[0] == 3
    code, out, _ = run("diff model wide --dtype bf16")
    assert code == 0 and out == "equal: 38 tensors, as bf16\n"
    assert run("diff model wide --dtype fp32")[0] == 0
    changed("other", lambda tensor: np.where(np.arange(tensor.size).reshape(tensor.shape) == 5, tensor + 1, tensor))
    code, out, _ = run("diff model other --dtype bf16 --json")
    (row,) = json.loads(out)["differing"]
    assert code == 3 and row["name"] == NAME and row["elements"] == 1


def test_a_tolerance(model, run):  # noqa: F811
    reshard.convert("model", "wide", format="hf", dtype="fp32")
    changed("near", lambda tensor: tensor + np.float32(0.001))
    assert run("diff wide near")[0] == 3
    code, out, _ = run("diff wide near --atol 0.01")
    assert code == 0 and out == "equal: 38 tensors, within 0.01\n"
    assert run("diff wide near --atol 0.0001")[0] == 3
    changed("nan", lambda tensor: np.full_like(tensor, np.nan))
    assert run("diff wide nan --atol 100")[0] == 3, "NaN is unlike everything"
    changed("inf", lambda tensor: np.full_like(tensor, np.inf))
    assert run("diff inf inf --atol 1")[0] == 0 and run("diff inf nan --atol 1")[0] == 3
    assert run("diff wide near --atol -1")[0] == 2


def test_each_side_may_have_its_format_named(model, run):  # noqa: F811
    reshard.convert("model", "sg", format="sglang", tp=3)
    Path("sg/reshard.json").unlink()
    assert run("diff model sg --from-b sglang")[0] == 0
    assert run("diff sg model --from-a sglang")[0] == 0


def test_files_of_a_size(model, run):  # noqa: F811
    assert run("convert model small --to hf --max-shard-size 400kB -q")[0] == 0
    sizes = [path.stat().st_size for path in Path("small").glob("*.safetensors")]
    assert len(sizes) > 1 and max(sizes) < 450_000
    assert run("diff model small")[0] == 0


def test_the_front_of_the_library():
    assert {"convert", "diff", "load", "open", "plan", "pull", "push", "ReshardError"} <= set(dir(reshard))
    assert (Path(reshard.__file__).parent / "py.typed").exists()


def test_doctor(run, monkeypatch):  # noqa: F811
    monkeypatch.delenv("HF_TOKEN", raising=False)
    code, out, _ = run("doctor --offline")
    assert code == 0 and "torch" in out and "free" in out
    code, out, _ = run("doctor --offline --json")
    found = json.loads(out)
    assert code == 0 and found["reshard"]["version"] == reshard.__version__ and all(found["packages"][name] for name in ("torch", "numpy"))


def test_doctor_tells_no_token(run, monkeypatch):  # noqa: F811
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:9")
    code, out, _ = run("doctor")
    assert code == 0 and "can't be reached" in out and "hf_secret" not in out


def test_windows_is_refused_with_a_sentence(monkeypatch):
    monkeypatch.setattr("sys.platform", "win32")
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--version"])
    assert "WSL" in exit_.value.code


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion(shell):
    env = {**os.environ, "_RESHARD_COMPLETE": f"{shell}_source"}
    done = subprocess.run(
        [sys.executable, "-c", "from reshard.cli import main; main()"], env=env, capture_output=True, text=True, check=False
    )
    assert "_RESHARD_COMPLETE" in done.stdout, done.stderr
    asked = {**os.environ, "_RESHARD_COMPLETE": "bash_complete", "COMP_WORDS": "reshard convert a b --to v", "COMP_CWORD": "5"}
    found = subprocess.run(
        [sys.executable, "-c", "from reshard.cli import main; main()"], env=asked, capture_output=True, text=True, check=False
    )
    assert "vllm" in found.stdout
