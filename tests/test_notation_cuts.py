"""Fusions that no family here has yet, against the engines' own rules of cutting, element by element."""

import numpy as np
import pytest
from notation_cases import GATED, KDA, MAMBA, arrays, bound

from reshard import formats
from reshard.layout import Mesh, Placement

ATTENTION = {"num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 4}
SSM = {"n_groups": 4, "mamba_num_heads": 8, "mamba_head_dim": 3, "ssm_state_size": 5, "conv_kernel": 4}


@pytest.mark.parametrize(("tp", "heads"), [(1, 4), (2, 4), (4, 4), (12, 4), (4, 2)])
def test_gated_qkv_as_vllm_cuts_it(tmp_path, tp, heads):
    """vLLM: this rank's part of the rows [query, gate] per head, then its key head, then its value head."""
    layout = bound(tmp_path, GATED, ATTENTION | {"num_key_value_heads": heads})
    (hf,), ranks = arrays(layout, "hf"), arrays(layout, "vllm", Mesh(tp))
    at = "model.layers.0.self_attn."
    for rank, own in enumerate(ranks):
        shared = min(tp, heads)
        key, value = (np.split(hf[f"{at}{x}_proj.weight"], shared)[rank * shared // tp] for x in "kv")
        query = np.array_split(hf[at + "q_proj.weight"], tp)[rank]
        assert np.array_equal(own[at + "qkv_proj.weight"], np.concatenate([query, key, value]))


def test_gated_qkv_as_megatron_splits_it(tmp_path):
    """megatron-core 0.19: per key/value head all its queries, all their gates, the key, the value."""
    layout = bound(tmp_path, GATED, ATTENTION)
    (hf,), (own,) = arrays(layout, "hf"), arrays(layout, "megatron")
    at = "model.layers.0.self_attn."
    q = hf[at + "q_proj.weight"].reshape(4, 3, 2, 4, 24)
    k, v = (hf[f"{at}{x}_proj.weight"].reshape(4, 4, 24) for x in "kv")
    wanted = np.concatenate([q[:, :, 0].reshape(4, 12, 24), q[:, :, 1].reshape(4, 12, 24), k, v], 1)
    assert np.array_equal(own["decoder.layers.0.self_attention.linear_qkv.weight"].reshape(4, -1, 24), wanted)


@pytest.mark.parametrize(("tp", "groups"), [(1, 4), (2, 4), (4, 4), (4, 1), (8, 1)])
def test_mamba_projections_as_vllm_cuts_them(tmp_path, tp, groups):
    """vLLM's mamba_v2_sharded_weight_loader: each section is cut, a single group stands on every rank."""
    layout = bound(tmp_path, MAMBA, SSM | {"n_groups": groups})
    (hf,), ranks = arrays(layout, "hf"), arrays(layout, "vllm", Mesh(tp))
    at, state = "model.layers.0.mixer.", groups * 5
    for rank, own in enumerate(ranks):
        for name, cuts in (("in_proj.weight", [24, 48, 48 + state, 48 + 2 * state]), ("conv1d.weight", [24, 24 + state])):
            sections = np.split(hf[at + name], cuts)
            whole = {2, 3} if name == "in_proj.weight" else {1, 2}
            wanted = [x if groups == 1 and i in whole else np.split(x, tp)[rank] for i, x in enumerate(sections)]
            assert np.array_equal(own[at + name], np.concatenate(wanted)), name


def test_two_groups_on_four_ranks_are_refused(tmp_path):
    layout = bound(tmp_path, MAMBA, SSM | {"n_groups": 3})
    placement = Placement(layout, layout.section("vllm"), formats.get("vllm").rules, Mesh(4))
    list(placement.stored())
    assert any("cannot repeat 3 ssm_group over 4 ranks" in problem for problem in placement.problems)


def test_what_holds_a_function_of_a_tensor_holds_it_under_that_name(tmp_path):
    layout = bound(tmp_path, MAMBA, SSM)
    placement = Placement(layout, layout.section("vllm"), formats.get("vllm").rules, Mesh())
    held = {(s.entry.transform, key[0]) for s in placement.stored() for key, _ in s.blocks if "a_log" in key[0]}
    assert held == {("minus_exp", "minus_exp(a_log)")} and not placement.problems


@pytest.mark.parametrize("tp", [1, 2, 3, 6])
def test_a_replicated_item_and_each_ranks_own_padding(tmp_path, tp):
    """Kimi: f_a is whole on every rank in the middle of a cut tensor; each rank's rows are filled to a multiple of 16."""
    config = {"linear_attn_config": {"num_heads": 6, "head_dim": 10, "kda_layers": [1]}}
    layout = bound(tmp_path, KDA, config)
    (hf,), ranks = arrays(layout, "hf"), arrays(layout, "vllm", Mesh(tp))
    at = "model.layers.0.self_attn."
    for rank, own in enumerate(ranks):
        made = own[at + "in_proj_qkvgfab.weight"]
        cut = {x: np.split(hf[f"{at}{x}_proj.weight"], tp)[rank] for x in "qkvgb"}
        wanted = np.concatenate([cut["q"], cut["k"], cut["v"], cut["g"], hf[at + "f_a_proj.weight"], cut["b"]])
        assert len(wanted) == 4 * 60 // tp + 10 + 6 // tp
        assert (
            np.array_equal(made[: len(wanted)], wanted) and not made[len(wanted) :].any() and len(made) == len(wanted) + -len(wanted) % 16
        )
