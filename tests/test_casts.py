"""A cast may round. It may not make infinity of a number without a word."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import reshard
from reshard.cli import main
from reshard.demo import make_model
from reshard.executor import casts

BIG = "model.layers.2.self_attn.k_proj.weight"
NORM = "model.norm.weight"


@pytest.fixture
def model(tmp_path):
    """bf16, with three values that fp16 has no room for, one that just fits, and infinity and NaN that were there before."""
    make_model(tmp_path / "made")
    state = load_file(tmp_path / "made/model.safetensors")
    state[BIG][0, 0], state[BIG][-1, -1], state[BIG][3, 5] = 70000.0, -3e9, 65280.0
    state[BIG][1, :3] = torch.tensor([float("inf"), float("-inf"), float("nan")])
    state[NORM][1] = 1e6
    (tmp_path / "a").mkdir()
    (tmp_path / "a/config.json").write_bytes((tmp_path / "made/config.json").read_bytes())
    save_file(state, tmp_path / "a/model.safetensors", {"format": "pt"})
    return tmp_path


@pytest.mark.parametrize(
    "target", [{"format": "hf"}, {"format": "vllm", "tp": 3}, {"format": "megatron", "tp": 3}, {"format": "tp", "tp": 5}]
)
def test_values_with_no_room_are_refused_with_tensor_count_and_size(model, target):
    """defects.md B2: `[inf inf inf inf]`, rc 0, no warning."""
    with pytest.raises(reshard.CastError) as error:
        reshard.convert(model / "a", model / "half", dtype="fp16", jobs=1, **target)
    text = str(error.value)
    named = {BIG: ("2 values", "3.00312e+09"), NORM: ("1 values", "999424")}
    found = [name for name in named if name in text]
    assert found and all(word in text for name in found for word in named[name]) and "65504" in text
    assert "--allow-overflow" in error.value.hint and sorted(p.name for p in model.iterdir()) == ["a", "made"]


def test_refused_on_the_command_line_too_and_allowed_when_asked(model, capsys):
    """defects.md B2. The count tells each value once, of however many ranks hold it."""
    command = ["convert", str(model / "a"), str(model / "half"), "--to", "vllm", "--tp", "3", "--dtype", "fp16"]
    with pytest.raises(SystemExit, match="1"):
        main([*command, "--json"])
    assert json.loads(capsys.readouterr().out)["error"]["type"] == "CastError"
    with pytest.raises(SystemExit, match="0"):
        main([*command, "--json", "--allow-overflow"])
    assert json.loads(capsys.readouterr().out)["overflowed"] == 3
    with pytest.raises(SystemExit, match="0"):
        main([*command, "--overwrite", "--allow-overflow"])
    out = capsys.readouterr().out
    assert "k_proj" in out and "2 values of up to 3.00312e+09" in out and "1 values of up to 999424" in out
    reshard.convert(model / "half", model / "back", format="hf")
    source, back = (load_file(model / name / "model.safetensors") for name in ("a", "back"))
    assert all(torch.equal(source[name].to(torch.float16).nan_to_num(), back[name].nan_to_num()) for name in source)


def test_loading_one_rank_is_judged_alike(model):
    with pytest.raises(reshard.CastError, match="model.norm.weight"):
        reshard.load(model / "a", format="vllm", tp=3, rank=1, dtype="fp16")
    state = reshard.load(model / "a", format="vllm", tp=3, rank=1, dtype="fp16", allow_overflow=True)
    assert state[NORM].isinf().sum() == 1


def test_what_was_infinite_or_nan_before_is_no_loss(model):
    """And a cast to more room, or of values that fit, says nothing."""
    state = load_file(model / "a/model.safetensors")
    state[BIG][0, 0] = state[BIG][-1, -1] = state[NORM][1] = 1.0
    save_file(state, model / "a/model.safetensors", {"format": "pt"})
    for dtype in ("fp16", "fp32", "bf16"):
        reshard.convert(model / "a", model / dtype, format="vllm", tp=3, dtype=dtype)
    back = reshard.load(model / "fp16", format="hf")
    assert torch.equal(back[BIG].nan_to_num(), state[BIG].to(torch.float16).nan_to_num())


def test_fp32_beyond_bf16_is_refused_and_what_rounds_down_is_not(tmp_path):
    make_model(tmp_path / "a")
    state = {name: tensor.float() for name, tensor in load_file(tmp_path / "a/model.safetensors").items()}
    state[NORM][0] = 3.3895e38  # bf16 ends at 3.38953e38
    save_file(state, tmp_path / "a/model.safetensors", {"format": "pt"})
    reshard.convert(tmp_path / "a", tmp_path / "b", format="hf", dtype="bf16")
    state[NORM][0] = 3.4e38
    save_file(state, tmp_path / "a/model.safetensors", {"format": "pt"})
    with pytest.raises(reshard.CastError, match="model.norm.weight.*1 values of up to 3.4e"):
        reshard.convert(tmp_path / "a", tmp_path / "c", format="hf", dtype="bf16")


@pytest.mark.parametrize("src", ["F64", "F32", "BF16", "F16"])
@pytest.mark.parametrize("dst", ["F32", "BF16", "F16"])
def test_the_quick_look_for_infinities_misses_none(src, dst):
    """Each of a dtype's words of 16 bits, or as many at random, against torch's own isfinite."""
    import numpy as np

    width = casts.DTYPE_SIZE[src]
    words = (
        np.arange(65536, dtype=np.uint16)
        if width == 2
        else np.random.default_rng(1).integers(0, 2 ** (8 * width), 65536, dtype=f"u{width}")
    )
    out = casts.cast(words, src, dst)
    for one in (*np.split(out, 4096), out):
        assert casts._not_finite(one, dst) == (not np.isfinite(casts.numbers(one, dst)).all())
