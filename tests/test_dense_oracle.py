"""Fused and transposed weights of dense families, cut for vLLM: beside what transformers' own attention takes for queries, keys and values.

No descriptor here: each family's split is written as its `_split_heads` or `forward` does it, each rank's share with chunk and cat.
"""

import pytest
import torch
from family_checkpoints import checkpoint
from safetensors.torch import load_file

import reshard
from reshard.checkpoint import read_config

HEADS = 4  # of every model in tests/families_data


def by_head(w, kv):  # BLOOM, Falcon RW, GPT-NeoX: (heads, 3, head size)
    w = w.unflatten(0, (HEADS, 3, -1))
    return [w[:, i].flatten(0, 1) for i in range(3)]


def by_group(w, kv):  # Falcon 40B: of each key/value head its queries, its key, its value
    w = w.unflatten(0, (kv, HEADS // kv + 2, -1))
    return [w[:, :-2].flatten(0, 2), w[:, -2].flatten(0, 1), w[:, -1].flatten(0, 1)]


def by_query(w, kv):  # Falcon 7B: all queries, the key, the value
    w = w.unflatten(0, (HEADS + 2, -1))
    return [w[:-2].flatten(0, 1), w[-2], w[-1]]


def thirds(w, kv):
    return list(w.chunk(3))


def transposed(w, kv):  # GPT-2's Conv1D: input dimension first
    return thirds(w.T if w.dim() > 1 else w, kv)


#: family: (split, key/value heads, layers' prefix in the files, in vLLM, fused attention in the files, in vLLM, its output, up, down)
FUSED = {
    "bloom": (by_head, 4, "transformer.h.", "transformer.h.", "self_attention.query_key_value", None, "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    "falcon_rw": (by_head, 4, "transformer.h.", "transformer.h.", "self_attention.query_key_value", None, "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    "falcon_40b": (by_group, 2, "transformer.h.", "transformer.h.", "self_attention.query_key_value", None, "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    "falcon_7b": (by_query, 1, "transformer.h.", "transformer.h.", "self_attention.query_key_value", None, "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    "gpt2": (transposed, 4, "transformer.h.", "transformer.h.", "attn.c_attn", None, "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    "starcoder2": (None, 2, "model.layers.", "model.layers.", "self_attn.{}_proj", "self_attn.qkv_proj", "self_attn.o_proj", "mlp.c_fc", "mlp.c_proj"),
    "opt": (None, 4, "model.decoder.layers.", "model.decoder.layers.", "self_attn.{}_proj", "self_attn.qkv_proj", "self_attn.out_proj", "fc1", "fc2"),
}  # fmt: skip


def vllm_rank(family, state, tp, rank, split=None):
    own, kv, here, there, fused, name, out_proj, up, down = FUSED[family]
    split, wanted = split or own, {}

    def heads(w, count):  # with more ranks than heads, each is held by several
        return w.chunk(tp)[rank] if tp <= count else w.chunk(count)[rank // (tp // count)]

    for layer in range(2):
        at, to = f"{here}{layer}.", f"{there}{layer}."
        for end in ("weight", "bias"):
            if split is None:
                q, k, v = (state.get(f"{at}{fused.format(x)}.{end}") for x in "qkv")
            else:
                whole = state.get(f"{at}{fused}.{end}")
                q, k, v = split(whole, kv) if whole is not None else (None,) * 3
            if q is not None:
                wanted[f"{to}{name or fused}.{end}"] = torch.cat([heads(q, HEADS), heads(k, kv), heads(v, kv)])
            rows = state.get(f"{at}{up}.{end}")
            if rows is not None:
                rows = rows.T if family == "gpt2" and rows.dim() > 1 else rows
                wanted[f"{to}{up}.{end}"] = rows.chunk(tp)[rank]
        for each in (out_proj, down):
            w = state[f"{at}{each}.weight"]
            wanted[f"{to}{each}.weight"] = (w.T if family == "gpt2" else w).chunk(tp, 1)[rank]
    return wanted


@pytest.mark.parametrize("family", FUSED)
def test_fused_weights_are_what_the_models_own_code_takes_them_for(family, tmp_path):
    source = checkpoint(family, tmp_path / "hf")
    assert read_config(source / "config.json").get("num_attention_heads", HEADS) == HEADS
    state, seen = load_file(source / "model.safetensors"), 0
    for tp in (1, 2, 4):
        for rank in range(tp):
            made = reshard.load(source, format="vllm", tp=tp, rank=rank)
            for name, tensor in vllm_rank(family, state, tp, rank).items():
                assert torch.equal(made[name], tensor), (tp, rank, name)
                seen += 1
    assert seen >= 7 * 2 * 4


def sections(w, kv):
    """All queries, all keys, all values: the wrong rule for fusions by head or group."""
    size = w.shape[0] // (HEADS + 2 * kv)
    return list(w.split([HEADS * size, kv * size, kv * size]))


WRONG = {"bloom": sections, "falcon_rw": sections, "falcon_40b": sections, "falcon_7b": lambda w, kv: by_query(w, kv)[::2] + [by_query(w, kv)[1]],
         "gpt2": lambda w, kv: by_head(w.T if w.dim() > 1 else w, kv)}  # fmt: skip


@pytest.mark.parametrize("family", WRONG)
def test_control_another_interleave_is_seen(family, tmp_path):
    source = checkpoint(family, tmp_path / "hf")
    state, made = load_file(source / "model.safetensors"), reshard.load(source, format="vllm", tp=2, rank=1)
    wanted = vllm_rank(family, state, 2, 1, WRONG[family])
    differing = {name for name, tensor in wanted.items() if not torch.equal(made[name], tensor)}
    assert differing == {name for name in wanted if FUSED[family][4] in name}
