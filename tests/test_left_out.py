"""Weights that a layout leaves out, such as multi-token prediction: told by name and bytes, and counted by diff."""

import json
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import reshard
from reshard.cli import main
from reshard.demo import make_model
from reshard.text import human

DATA = json.loads((Path(__file__).parent / "families_data/deepseek_v3.json").read_text())
CONFIG = DATA["config"]
COPIES = ("model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight")
MTP = {n: tuple(shape) for n, (_, shape) in DATA["tensors"].items() if n.startswith("model.layers.3.") and n not in COPIES}
BYTES = sum(prod(shape) * (4 if name.endswith("_bias") else 2) for name, shape in MTP.items())
TOLD = f"left out: {len(MTP)} tensors, {human(BYTES)}"


def written(folder, state):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(state, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture
def models(tmp_path):
    """`a` with a prediction layer, `b` without, `c` with one of other values; and a buffer that is no weight in all."""
    make_model(tmp_path / "plain", CONFIG)
    state = load_file(tmp_path / "plain/model.safetensors")
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(1)
    mtp = {name: torch.randn(shape).to(torch.float32 if name.endswith("_bias") else torch.bfloat16) for name, shape in MTP.items()}
    mtp |= dict(zip(COPIES, (state["model.embed_tokens.weight"].clone(), state["lm_head.weight"].clone())))
    written(tmp_path / "a", {**state, **mtp})
    written(tmp_path / "b", state)
    written(tmp_path / "c", {**state, **mtp, "model.layers.3.enorm.weight": mtp["model.layers.3.enorm.weight"] + 1})
    return tmp_path


def run(capsys, code, *command):
    with pytest.raises(SystemExit) as end:
        main([*map(str, command)])
    assert end.value.code == code
    return capsys.readouterr().out


def test_plan_convert_and_manifest_tell_names_and_bytes(models, capsys):
    """issue, 2: multi-token prediction layers vanished."""
    for command in (("plan", models / "a"), ("convert", models / "a", models / "v", "--dry-run"), ("convert", models / "a", models / "v")):
        out = run(capsys, 0, *command, "--to", "vllm", "--tp", "2")
        assert TOLD in out and "model.layers.3.eh_proj.weight" in out
    result = json.loads(run(capsys, 0, "convert", models / "a", models / "w", "--to", "vllm", "--json"))
    assert result["left_out"] == sorted(MTP) and result["left_out_bytes"] == BYTES
    assert result["dropped"] == ["model.layers.0.self_attn.rotary_emb.inv_freq"] and result["dropped_bytes"] == 4
    assert json.loads((models / "w/reshard.json").read_text())["left_out"] == {"tensors": sorted(MTP), "bytes": BYTES}
    assert "left out" not in run(capsys, 0, "convert", models / "b", models / "x", "--to", "vllm")
    assert "left_out" not in json.loads((models / "x/reshard.json").read_text())


def test_diff_counts_what_one_side_lacks(models, capsys):
    """issue, 2: `diff` said equal; a buffer that can be computed again is still none of its business."""
    reshard.convert(models / "a", models / "v", format="vllm", tp=2)
    for other in ("v", "b"):
        report = reshard.diff(models / "a", models / other)
        assert not report and report.missing_in_b == sorted(MTP) and report.bytes_missing_in_b == BYTES and not report.differing
        assert reshard.diff(models / other, models / "a").missing_in_a == sorted(MTP)
    assert reshard.diff(models / "b", models / "v") and reshard.diff(models / "b", models / "plain")
    assert TOLD.removeprefix("left out: ") in run(capsys, 3, "diff", models / "a", models / "v")
    assert json.loads(run(capsys, 3, "diff", models / "a", models / "v", "--json"))["bytes_missing_in_b"] == BYTES


def test_diff_compares_them_where_both_sides_have_them(models):
    assert reshard.diff(models / "a", models / "a")
    report = reshard.diff(models / "a", models / "c")
    assert [(d.name, d.elements) for d in report.differing] == [("model.layers.3.enorm.weight", 64)]


def test_prediction_layers_stand_in_megatron_and_come_back(models):
    """By Megatron's names: mtp.layers, the projection cut by rows, experts by expert; on two stages the last holds the embedding again."""
    for number, mesh in enumerate(({"tp": 2}, {"tp": 2, "pp": 3}, {"ep": 2})):
        reshard.convert(models / "a", models / f"m{number}", format="megatron", **mesh)
        state = torch.load(sorted((models / f"m{number}/release").glob("mp_rank_*"))[-1] / "model_optim_rng.pt", weights_only=False)[
            "model"
        ]
        assert state["mtp.layers.0.eh_proj.weight"].shape == (64 // mesh.get("tp", 1), 128)
        assert "mtp.layers.0.transformer_layer.mlp.experts.linear_fc1.weight1" in state
        assert "embedding.word_embeddings.weight" in state  # the last stage predicts from embeddings, too
        assert reshard.diff(models / "a", models / f"m{number}")
        reshard.convert(models / f"m{number}", models / f"back{number}", format="hf")
        want, got = load_file(models / "a/model.safetensors"), load_file(models / f"back{number}/model.safetensors")
        assert want.keys() - got.keys() == {"model.layers.0.self_attn.rotary_emb.inv_freq"} and all(
            torch.equal(want[n], t) for n, t in got.items()
        )


def test_half_a_prediction_layer_is_no_checkpoint(models):
    state = load_file(models / "a/model.safetensors")
    del state["model.layers.3.hnorm.weight"]
    written(models / "half", state)
    with pytest.raises(reshard.PlanError, match="hnorm.weight is missing, though others of place mtp_joint are there"):
        reshard.open(models / "half")


def test_an_embedding_that_drifted_apart_is_no_copy(models):
    state = load_file(models / "a/model.safetensors")
    state[COPIES[0]] += 1
    written(models / "apart", state)
    with pytest.raises(reshard.FormatError, match="embed_tokens.*different values"):
        reshard.convert(models / "apart", models / "x", format="tp", tp=2)
