"""A Megatron checkpoint's ``args`` against the config.json it is read with: sizes refused, values told apart.

The judges: samples whose args another program wrote, and Megatron's own rules for fields that are left out.
"""

import json
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import reshard
from reshard.demo import make_model
from reshard.formats.megatron_args import model_args
from reshard.formats.megatron_compare import SIZES, compare_args
from reshard.layout import find_descriptor

SAMPLES = Path(__file__).resolve().parents[2] / "shared/samples/megatron"
DENSE = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 100,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "dtype": "bfloat16",
    "tie_word_embeddings": False,
}
MOE = {**DENSE, "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4, "moe_intermediate_size": 8, "num_experts_per_tok": 2}
MLA = {
    **DENSE,
    "architectures": ["DeepseekV3ForCausalLM"],
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "moe_intermediate_size": 8,
    "num_experts_per_tok": 2,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 2,
    "v_head_dim": 6,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
}


def expected(config: dict) -> dict:
    return model_args(find_descriptor(config).bind(config))


def names(found) -> list[str]:
    return [difference.name for difference in found]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3_moe", "deepseek_v3"])
def test_args_that_another_program_wrote_agree_with_their_config(family):
    config = json.loads((SAMPLES / family / "hf/config.json").read_text())
    files = sorted((SAMPLES / family).glob("legacy*/**/model_optim_rng.pt"))
    assert files
    for file in files:
        with torch.serialization.safe_globals([Namespace]):
            args = torch.load(file, weights_only=True)["args"]
        assert compare_args(args, expected(config)) == []


@pytest.mark.parametrize("config", [DENSE, MOE, MLA], ids=["dense", "experts", "latent"])
def test_a_model_agrees_with_itself(config):
    args = expected(config)
    assert compare_args(Namespace(**args), args) == [] and compare_args({}, args) == []


@pytest.mark.parametrize(
    ("config", "change", "told", "kind"),
    [
        (
            DENSE,
            {"num_attention_heads": 2, "num_query_groups": 1, "kv_channels": 16},
            ["num_attention_heads", "num_query_groups", "kv_channels"],
            "size",
        ),
        (DENSE, {"num_attention_heads": 4, "kv_channels": None}, [], "size"),
        (DENSE, {"kv_channels": None, "num_attention_heads": 8}, ["num_attention_heads", "kv_channels"], "size"),
        (DENSE, {"group_query_attention": False, "num_query_groups": 1}, ["num_query_groups"], "size"),
        (DENSE, {"num_experts": 4}, ["num_experts"], "size"),
        (DENSE, {"vocab_size": 101}, ["vocab_size"], "size"),
        (DENSE, {"vocab_size": 97}, [], "size"),
        (DENSE, {"rotary_base": 500000}, ["rotary_base"], "value"),
        (DENSE, {"norm_epsilon": 1e-2}, ["norm_epsilon"], "value"),
        (DENSE, {"norm_epsilon": 10**400, "rotary_base": "x"}, ["rotary_base", "norm_epsilon"], "value"),
        (DENSE, {"norm_epsilon": 1e-6, "layernorm_epsilon": 1e-5}, [], "value"),
        (DENSE, {"use_rope_scaling": True}, ["use_rope_scaling"], "value"),
        (DENSE, {"rope_scaling_factor": 3.0}, [], "value"),
        (
            DENSE,
            {"rotary_percent": 0.5, "swiglu": False, "normalization": "LayerNorm"},
            ["rotary_percent", "normalization", "swiglu"],
            "value",
        ),
        (DENSE, {"hidden_dropout": 0.1, "seq_length": 7, "tokenizer_type": "Null"}, [], "value"),
        (MOE, {"moe_router_topk": 1, "moe_router_score_function": "sigmoid"}, ["moe_router_topk", "moe_router_score_function"], "value"),
        (MOE, {"ffn_hidden_size": 999}, [], "size"),  # no layer is dense
        (MOE, {"moe_layer_freq": [1, 1]}, [], "size"),
        (MOE, {"moe_layer_freq": 2}, ["ffn_hidden_size", "moe_layer_freq"], "size"),
        (MOE, {"moe_ffn_hidden_size": 16}, ["moe_ffn_hidden_size"], "size"),
        (MLA, {"multi_latent_attention": False}, ["multi_latent_attention"], "size"),
        (MLA, {"qk_head_dim": 2, "qk_pos_emb_head_dim": 4}, ["qk_head_dim", "qk_pos_emb_head_dim"], "size"),
        (MLA, {"num_query_groups": 1, "kv_channels": 99}, [], "size"),
        (MLA, {"moe_shared_expert_intermediate_size": None}, ["moe_shared_expert_intermediate_size"], "size"),
    ],
)
def test_fields_that_matter_are_told_apart(config, change, told, kind):
    """defects.md B1 and D4: what is compared, and as what."""
    args = expected(config)
    if change.get("moe_layer_freq") == 2:
        change = {**change, "ffn_hidden_size": 999}
    found = compare_args({**args, **change}, args)
    assert names(found) == told and {d.kind for d in found} <= {kind}
    assert all((d.kind == "size") == (d.name in SIZES) for d in found)


# ------------------------------------------------------------------------------------------------ reading with a wrong config


def model(folder: Path, config: dict, **mesh) -> Path:
    """A Megatron checkpoint of `config` in `folder`/m, the original in `folder`/hf."""
    make_model(folder / "hf", config)
    reshard.convert(folder / "hf", folder / "m", format="megatron", fsync=False, **mesh)
    (folder / "m/config.json").unlink()
    return folder / "m"


def config_beside(folder: Path, **change) -> Path:
    wrong = json.loads((folder / "hf/config.json").read_text()) | change
    (folder / "wrong.json").write_text(json.dumps({key: value for key, value in wrong.items() if value is not None}))
    return folder / "wrong.json"


@pytest.mark.parametrize(
    ("config", "change", "said"),
    [
        (
            DENSE,
            {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4},
            ["num_attention_heads 4", "gives 8", "num_query_groups 2", "kv_channels 8"],
        ),
        (DENSE, {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}, ["num_attention_heads 4", "gives 2"]),
        (DENSE, {"vocab_size": 70}, ["vocab_size 100", "gives 70"]),
        (
            MLA,
            {"qk_nope_head_dim": 2, "qk_rope_head_dim": 4, "kv_lora_rank": 8},
            ["qk_head_dim 4", "gives 2", "qk_pos_emb_head_dim 2", "kv_lora_rank 10"],
        ),
    ],
)
def test_a_config_of_other_sizes_is_refused_with_both_numbers_and_the_file(tmp_path, config, change, said):
    """defects.md B1: equal products of sizes scrambled q, k and v without a word."""
    folder = model(tmp_path, config, tp=2)
    wrong = config_beside(tmp_path, **change)
    with pytest.raises(reshard.ReshardError) as caught:
        reshard.convert(folder, tmp_path / "back", format="hf", config=wrong, fsync=False)
    assert all(text in str(caught.value) for text in [*said, "release/mp_rank_00/model_optim_rng.pt"]), caught.value
    assert "--config" in caught.value.hint and not (tmp_path / "back").exists()


def test_the_right_config_is_not_refused(tmp_path):
    """Control, and what config.json may say otherwise: settings that decide no tensor's place."""
    folder = model(tmp_path, DENSE, tp=2)
    other = config_beside(tmp_path, rope_theta=5e5, rms_norm_eps=1e-5, max_position_embeddings=32)
    for config in (tmp_path / "hf", other):
        assert reshard.diff(tmp_path / "hf", reshard.open(folder, config=config))


def rewritten(folder: Path, change) -> Path:
    for file in folder.glob("**/model_optim_rng.pt"):
        blob = torch.load(file, weights_only=False)
        blob["args"] = Namespace(**change(vars(blob["args"])))
        torch.save(blob, file)
    (folder / "reshard.json").unlink()
    return folder


@pytest.mark.parametrize("etp", [None, "absent", 1])
def test_only_pairs_of_ranks_that_occur_are_expected(tmp_path, etp):
    """defects.md D2: tp2·ep2 with experts whole (etp 1) is two processes, so two files, also where args don't say etp."""
    folder = model(tmp_path, MOE, tp=2, ep=2, etp=1)
    assert sorted(path.name for path in (folder / "release").iterdir()) == ["mp_rank_00_000", "mp_rank_01_001"]
    key = "expert_tensor_parallel_size"
    rewritten(folder, lambda args: {k: v for k, v in args.items() if k != key} | ({} if etp == "absent" else {key: etp}))
    assert reshard.diff(tmp_path / "hf", reshard.open(folder, config=tmp_path / "hf"))
    shutil.rmtree(folder / "release/mp_rank_01_001")
    with pytest.raises(reshard.FormatError, match="lacks mp_rank_"):
        reshard.open(folder, config=tmp_path / "hf")


def test_a_manifest_of_another_mesh_is_refused(tmp_path):
    """defects.md, Low: Megatron ignored the mesh that the manifest states."""
    folder = model(tmp_path, DENSE, tp=2)
    manifest = json.loads((folder / "reshard.json").read_text())
    (folder / "reshard.json").write_text(json.dumps(manifest | {"mesh": {"tp": 1, "pp": 2, "ep": 1}}))
    with pytest.raises(reshard.FormatError, match="holds files of tp2, its manifest says tp1×pp2"):
        reshard.open(folder, config=tmp_path / "hf")


def test_a_folder_named_for_thirty_million_ranks_is_refused_at_once(tmp_path):
    """defects.md M6: with args silent, every rank up to that number was counted."""
    folder = rewritten(model(tmp_path, DENSE, tp=2), lambda args: {})
    (folder / "release/mp_rank_01").rename(folder / "release/mp_rank_30000000")
    with pytest.raises(reshard.FormatError, match="mp_rank_30000000"):
        reshard.open(folder, config=tmp_path / "hf")
