"""Constants that an engine keeps beside the weights: no conversion carries them, so another value in a source is refused."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import reshard
from reshard.demo import make_model

NAME = "model.layers.2.self_attn.attn._k_scale"
FILE = "model-rank-1-part-0.safetensors"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("constants")
    make_model(folder / "hf")
    reshard.convert(folder / "hf", folder / "vllm", format="vllm", tp=3, engine_version="0.32", fsync=False)
    return folder / "vllm"


def changed(shards, folder, value: torch.Tensor, files: tuple[str, ...] = (FILE,)):
    """A copy of `shards` in which the constant is `value`."""
    shutil.copytree(shards, folder)
    (folder / "reshard.json").unlink()
    for file in files:
        state = load_file(folder / file)
        assert NAME in state
        save_file({**state, NAME: value}, folder / file)
    return folder


def test_the_declared_value_passes_whatever_its_dtype_and_shape(shards, tmp_path):
    for number, value in enumerate(
        (torch.tensor(1.0), torch.tensor([1.0]), torch.tensor(1.0, dtype=torch.bfloat16), torch.tensor(1.0).to(torch.float8_e4m3fn))
    ):
        ckpt = reshard.open(changed(shards, tmp_path / str(number), value))
        assert NAME in ckpt.dropped and ckpt.left_out == []


@pytest.mark.parametrize(
    "value, told", [(torch.tensor(0.37), "0.37"), (torch.tensor(2.0, dtype=torch.bfloat16), "2.0"), (torch.tensor(float("nan")), "nan")]
)
def test_another_value_is_refused_with_both_numbers(shards, tmp_path, value, told):
    folder = changed(shards, tmp_path / "other", value)
    with pytest.raises(reshard.FormatError) as caught:
        reshard.convert(folder, tmp_path / "out", format="hf")
    text = str(caught.value)
    assert f"{NAME} ({FILE}) is {told}" in text and "expected 1" in text and text.count("_scale") == 1
    assert "made from" in caught.value.hint and not (tmp_path / "out").exists()
    for call in (lambda: reshard.load(folder, format="vllm", tp=2), lambda: reshard.diff(folder, shards), lambda: reshard.open(folder)):
        with pytest.raises(reshard.FormatError, match="_k_scale"):
            call()


def test_each_rank_is_read_and_another_size_is_refused(shards, tmp_path):
    files = tuple(f"model-rank-{rank}-part-0.safetensors" for rank in range(3))
    with pytest.raises(reshard.FormatError) as caught:
        reshard.open(changed(shards, tmp_path / "all", torch.tensor(0.5), files))
    assert all(f"({file}) is 0.5" in str(caught.value) for file in files)
    with pytest.raises(reshard.FormatError, match=r"_k_scale \(.*\) has shape \[2\], expected \[\]"):
        reshard.open(changed(shards, tmp_path / "shape", torch.ones(2)))
