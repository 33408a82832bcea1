"""Weights that a layout leaves out, such as multi-token prediction: told by name and bytes, and counted by diff."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import reshard
from reshard.cli import main
from reshard.demo import make_model

CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"], "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8, "num_attention_heads": 4,
    "num_key_value_heads": 4, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 4, "q_lora_rank": 6, "kv_lora_rank": 8, "vocab_size": 64,
    "num_hidden_layers": 2, "first_k_dense_replace": 1, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2,
    "topk_group": 1, "routed_scaling_factor": 2.5, "rms_norm_eps": 1e-6, "max_position_embeddings": 64, "num_nextn_predict_layers": 1,
}  # fmt: skip
MTP = {
    f"model.layers.2.{name}": shape
    for name, shape in (("enorm.weight", (16,)), ("eh_proj.weight", (16, 32)), ("mlp.experts.0.up_proj.weight", (8, 16)))
}
BYTES = 2 * (16 + 512 + 128)


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
    mtp = {name: torch.randn(shape).bfloat16() for name, shape in MTP.items()}
    written(tmp_path / "a", {**state, **mtp})
    written(tmp_path / "b", state)
    written(tmp_path / "c", {**state, **mtp, "model.layers.2.enorm.weight": mtp["model.layers.2.enorm.weight"] + 1})
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
        assert "left out: 3 tensors, 1.31 kB" in out and all(name in out for name in MTP)
    result = json.loads(run(capsys, 0, "convert", models / "a", models / "w", "--to", "vllm", "--json"))
    assert result["left_out"] == sorted(MTP) and result["left_out_bytes"] == BYTES
    assert result["dropped"] == sorted([*MTP, "model.layers.0.self_attn.rotary_emb.inv_freq"]) and result["dropped_bytes"] == BYTES + 4
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
    assert "3 tensors, 1.31 kB" in run(capsys, 3, "diff", models / "a", models / "v")
    assert json.loads(run(capsys, 3, "diff", models / "a", models / "v", "--json"))["bytes_missing_in_b"] == BYTES


def test_diff_compares_them_where_both_sides_have_them(models):
    assert reshard.diff(models / "a", models / "a")
    report = reshard.diff(models / "a", models / "c")
    assert [(d.name, d.elements) for d in report.differing] == [("model.layers.2.enorm.weight", 16)]


def test_megatrons_prediction_layers_are_left_out_by_name_and_bytes(models):
    reshard.convert(models / "b", models / "m", format="megatron", tp=2)
    for rank in (0, 1):
        path = models / f"m/release/mp_rank_{rank:02d}/model_optim_rng.pt"
        blob = torch.load(path, weights_only=False)
        blob["model"]["mtp.layers.0.eh_proj.weight"] = torch.ones(8, 32)
        torch.save(blob, path)
    (models / "m/reshard.json").unlink()
    job = reshard.plan(models / "m", format="hf", config=models / "b")
    assert job.left_out == ["mtp.layers.0.eh_proj.weight"] and job.to_json()["left_out_bytes"] == 2 * 8 * 32 * 4
    assert len(reshard.diff(models / "b", models / "m").missing_in_a) == 2  # rank 0's and rank 1's
