"""Entries that hold a function of a tensor: vLLM's A = -exp(A_log). Computed on the way, and back; numpy is the judge."""

import json

import ml_dtypes
import numpy as np
import pytest
from test_family_shapes import bits, checkpoint

import reshard
from reshard.stores import safetensors

NAME = {
    "nemotron_h": ("backbone.layers.0.mixer.A_log", "model.layers.0.mixer.A"),
    "jamba": ("model.layers.0.mamba.A_log", "model.layers.0.mamba.A"),
}


@pytest.mark.parametrize("family", NAME)
@pytest.mark.parametrize("tp", [1, 2])
def test_vllm_holds_minus_exp_of_it(family, tp, tmp_path):
    stored, held = NAME[family]
    checkpoint(family, tmp_path / "hf")
    reshard.convert(tmp_path / "hf", tmp_path / "v", format="vllm", tp=tp, fsync=False)
    log = np.frombuffer(bits(tmp_path / "hf")[stored], ml_dtypes.bfloat16).astype(np.float32)
    for rank, wanted in enumerate(np.split(-np.exp(log), tp)):
        path = tmp_path / "v" / f"model-rank-{rank}-part-0.safetensors"
        info = safetensors.read(path)[0][held]
        assert info.dtype == "F32"
        made = np.frombuffer(path.read_bytes()[info.offset : info.offset + info.nbytes], np.float32)
        assert np.array_equal(made, wanted) and not np.array_equal(made, np.split(log, tp)[rank])
    assert json.loads((tmp_path / "v/reshard.json").read_text())["dtypes"]["a_log"] == "BF16"


@pytest.mark.parametrize("family", NAME)
def test_and_back_to_the_nearest_number(family, tmp_path):
    checkpoint(family, tmp_path / "hf")
    reshard.convert(tmp_path / "hf", tmp_path / "v", format="vllm", tp=2, fsync=False)
    reshard.convert(tmp_path / "v", tmp_path / "back", format="hf", fsync=False)
    whole, back = bits(tmp_path / "hf"), bits(tmp_path / "back")
    assert whole.keys() == back.keys()
    for name in whole:
        if name.endswith("A_log"):
            a, b = (np.frombuffer(side[name], ml_dtypes.bfloat16).astype(np.float32) for side in (whole, back))
            assert np.allclose(a, b, atol=1e-6)
        else:
            assert whole[name] == back[name], name


def test_a_sync_refuses_it():
    from test_family_shapes import DATA

    from reshard.layout import find_descriptor
    from reshard.sync.side import Side

    config = json.loads((DATA / "jamba.json").read_text())["config"]
    with pytest.raises(reshard.PlanError, match="minus_exp of a_log, a transform that cannot be run here"):
        Side.placed(find_descriptor(config).bind(config), "vllm", ranks=[0])
