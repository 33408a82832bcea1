"""A family that has a table and nothing else: transformers' own cuts pass, and defects in them are found."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import reshard

pytest.importorskip("transformers")

from ranks import verify
from verify_families import cut, make

from reshard.verify.report import Report

pytestmark = pytest.mark.models

FAMILIES = ["arcee", "cohere", "cohere2", "dots1", "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe", "flex_olmo", "gemma", "gemma2", "gemma3_text", "glm", "glm4",
            "glm4_moe", "glm4_moe_lite", "granite", "granitemoe", "granitemoeshared", "helium", "hunyuan_v1_dense", "minimax_m2", "ministral3", "nemotron", "olmo", "olmo2", "olmo3",
            "olmoe", "phi", "phimoe", "qwen2_moe", "seed_oss", "smollm3", "stablelm", "starcoder2"]  # fmt: skip


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_transformers_own_plan_cuts_passes(model_type, tmp_path):
    """No layout descriptor, no line of Python: cuts and names are transformers' own, and each planted defect is found."""
    model = make(model_type, tmp_path / "hf")
    cut(model, tmp_path / "out")
    report = verify(tmp_path / "out", tmp_path / "hf")
    assert isinstance(report, Report), report
    assert report.passed, report.describe(traced=True)
    assert report.shards.figures.max_abs_diff <= 1e-4 * report.shards.figures.max_abs_logit
    assert len(report.controls) == 3 and not report.missed and report.nproc == 2


LAYOUT = """
extends = "decoder"
description = "StarCoder2: grouped-query attention, an MLP without a gate, biases everywhere, LayerNorm"
architectures = ["Starcoder2ForCausalLM"]
vllm = false
sglang = false
megatron = false

[conditions]
qkv_bias = "use_bias"
o_bias = "use_bias"
norm_bias = "true"

[place.layer]
parts = ["gqa", "block"]

[part.block]
at = "mlp"
[part.block.axes]
ffn = "intermediate_size"
[part.block.tensors]
up = "ffn* hidden"
up_bias = "ffn*"
down = "hidden ffn*"
down_bias = "hidden"
mlp_norm = "hidden"
mlp_norm_bias = "hidden"
[part.block.hf]
up = ".c_fc.weight"
up_bias = ".c_fc.bias"
down = ".c_proj.weight"
down_bias = ".c_proj.bias"
mlp_norm = "post_attention_layernorm.weight"
mlp_norm_bias = "post_attention_layernorm.bias"
"""
A, F = "model.layers.1.self_attn.", "model.layers.1.mlp."


def exchanged(name):
    return lambda states: [state.update({name: tensor}) for state, tensor in zip(states, [states[1][name], states[0][name]])]


def changed(name, change, ranks=(0, 1)):
    return lambda states: [states[rank].update({name: change(states[rank][name])}) for rank in ranks]


@pytest.fixture(scope="module")
def starcoder(tmp_path_factory):
    """A model, and what reshard makes of it for two ranks by a descriptor of the user's."""
    folder = tmp_path_factory.mktemp("starcoder2")
    make("starcoder2", folder / "hf")
    (folder / "starcoder2.toml").write_text(LAYOUT)
    source = reshard.open(folder / "hf", layout=folder / "starcoder2.toml")
    reshard.convert(source, folder / "out", format="rank-pt", tp=2, fsync=False)
    return folder


def test_shards_by_a_users_descriptor_pass(starcoder):
    report = verify(starcoder / "out", starcoder / "hf")
    assert isinstance(report, Report) and report.passed and len(report.controls) == 3 and not report.missed, report


@pytest.mark.parametrize("parts, change", [
    ("model.layers.1.self_attn", exchanged(A + "k_proj.weight")),
    ("model.layers.1.self_attn", changed(A + "q_proj.weight", lambda x: x.roll(1, 0))),
    ("model.layers.1.self_attn", changed(A + "o_proj.bias", lambda x: 2 * x)),
    ("model.layers.1.self_attn", changed(A + "v_proj.bias", torch.zeros_like, [1])),
    ("model.layers.1.mlp", exchanged(F + "c_fc.weight")),
    ("model.layers.1.mlp", exchanged(F + "c_proj.weight")),
    ("model.layers.1.mlp", changed(F + "c_fc.bias", lambda x: x.roll(1))),
    ("model.layers.1.mlp", changed(F + "c_proj.bias", torch.zeros_like, [0])),
    ("model.layers.1.post_attention_layernorm", changed("model.layers.1.post_attention_layernorm.bias", torch.zeros_like)),
    ("model.embed_tokens", exchanged("model.embed_tokens.weight")),
    (None, lambda states: [state.update({F + "c_fc.weight": state[F + "c_fc.weight"].T.contiguous()}) for state in states]),
    (None, lambda states: [state.update({F + "gate_proj.weight": state[F + "c_fc.weight"]}) for state in states]),
    (None, lambda states: [state.pop(F + "c_proj.bias") for state in states]),
])  # fmt: skip
def test_defects_in_them_are_found(parts, change, starcoder, tmp_path):
    """Where the broken part is named, or refused where the shards don't fit."""
    shutil.copytree(starcoder / "out", tmp_path / "out")
    files = sorted((tmp_path / "out").glob("rank_*.pt"))
    states = [torch.load(file) for file in files]
    change(states)
    for file, state in zip(files, states, strict=True):
        torch.save({name: tensor.clone() for name, tensor in state.items()}, file)
    (tmp_path / "out/reshard.json").unlink()
    report = verify(tmp_path / "out", starcoder / "hf")
    if parts is None:
        assert isinstance(report, reshard.ReshardError) and "model.layers.1.mlp" in str(report), report
    else:
        assert isinstance(report, Report) and not report.shards.passed and report.shards.parted.path == parts, report


@pytest.mark.parametrize("model_type", ["ernie4_5_moe", "granitemoeshared", "minimax_m2", "phimoe"])
def test_names_that_files_have_and_transformers_has_not_in_memory(model_type, tmp_path):
    """Experts and routers that transformers renames as it loads: the model as it is saved, and a rank's files with one expert spoilt."""
    make(model_type, tmp_path / "hf")
    names = set(load_file(tmp_path / "hf/model.safetensors"))
    assert any("block_sparse_moe" in name or "mlp.moe_statics" in name for name in names), "the Hub's names"
    report = verify(tmp_path / "hf", tmp_path / "hf")
    assert isinstance(report, Report) and report.passed and len(report.controls) == 2, report
    shutil.copytree(tmp_path / "hf", tmp_path / "bad")
    state = load_file(tmp_path / "bad/model.safetensors")
    name = min(name for name in state if "expert" in name or "input_linear" in name or "_bias" in name)
    state[name] = state[name].roll(1, -1) + 2.0**-7  # of a bias that is zero still all experts' alike: no prompt would show it
    save_file(state, tmp_path / "bad/model.safetensors", {"format": "pt"})
    report = verify(tmp_path / "bad", tmp_path / "hf")
    assert isinstance(report, Report) and not report.passed and name in report.shards.suspects
