"""Descriptors of families that are no part of reshard yet, as far as their cuts go; and arrays of what each format stores.

The judge is vLLM's and Megatron's own loading, written anew from their sources with numpy.
"""

from pathlib import Path

import numpy as np

from reshard import formats
from reshard.layout import Layout, Mesh, Placement, load_descriptor
from reshard.planner.values import bare

GATED = """
extends = "decoder"
architectures = ["GatedForCausalLM"]
[place.layer]
parts = ["gqa", "qk_norm", "output_gate", "gated_mlp"]
[part.output_gate]
at = { hf = "self_attn", vllm = "self_attn", megatron = "self_attention" }
tensors.q_gate = "(kv* group* half pair) hidden"
[hf]
q = { name = ".q_proj.weight", of = "group: q q_gate" }
[vllm]
qkv = { name = ".qkv_proj.weight", of = "(group: q q_gate) k v" }
[megatron]
qkv = { name = ".linear_qkv.weight", of = "kv: q q_gate k v", cut = "whole" }
"""
MAMBA = """
extends = "decoder"
architectures = ["MambaForCausalLM"]
[place.layer]
parts = ["mamba2"]
[part.mamba2]
at = "mixer"
replicate = ["ssm_group"]
[part.mamba2.axes]
ssm_group = "n_groups"
ssm_heads = "mamba_num_heads"
ssm_head = "mamba_head_dim"
state = "ssm_state_size"
tap = "conv_kernel"
[part.mamba2.tensors]
z = "(ssm_heads* ssm_head) hidden"
x = "(ssm_heads* ssm_head) hidden"
b = "(ssm_group* state) hidden"
c = "(ssm_group* state) hidden"
dt = "ssm_heads* hidden"
conv_x = "(ssm_heads* ssm_head) 1 tap"
conv_b = "(ssm_group* state) 1 tap"
conv_c = "(ssm_group* state) 1 tap"
a_log = "ssm_heads*"
[part.mamba2.hf]
in_proj = { name = ".in_proj.weight", of = "z x b c dt" }
conv = { name = ".conv1d.weight", of = "conv_x conv_b conv_c" }
a_log = ".A_log"
[part.mamba2.vllm]
in_proj = { name = ".in_proj.weight", of = "z x b c dt" }
conv = { name = ".conv1d.weight", of = "conv_x conv_b conv_c" }
a_log = { name = ".A", transform = "minus_exp", dtype = "F32" }
"""
KDA = """
extends = "decoder"
architectures = ["KdaForCausalLM"]
[place.layer]
parts = [{ part = "kda", when = "layer + 1 in linear_attn_config.kda_layers" }]
[part.kda]
at = "self_attn"
[part.kda.axes]
kda_heads = "linear_attn_config.num_heads"
kda_head = "linear_attn_config.head_dim"
rank = "linear_attn_config.head_dim"
[part.kda.tensors]
q = "(kda_heads* kda_head) hidden"
k = "(kda_heads* kda_head) hidden"
v = "(kda_heads* kda_head) hidden"
g = "(kda_heads* kda_head) hidden"
f_a = "rank hidden"
b = "kda_heads* hidden"
[part.kda.hf]
q = ".q_proj.weight"
k = ".k_proj.weight"
v = ".v_proj.weight"
g = ".g_proj.weight"
f_a = ".f_a_proj.weight"
b = ".b_proj.weight"
[part.kda.vllm]
in_proj = { name = ".in_proj_qkvgfab.weight", of = "q k v g f_a b", align = "128 if scheme == 'fp8_block' else 16" }
"""
DECODER = {"hidden_size": 24, "vocab_size": 192, "num_hidden_layers": 1, "intermediate_size": 48}


def bound(folder: Path, text: str, config: dict) -> Layout:
    (folder / "own.toml").write_text(text)
    return load_descriptor(folder / "own.toml").bind(DECODER | config)


def arrays(layout: Layout, format: str, mesh: Mesh = Mesh(), **options) -> list[dict[str, np.ndarray]]:
    """Per rank, by name: arrays that hold the number of each element of the model where it lies, 0 where there is padding."""
    base, start = {}, 1
    for tensor in layout.descriptor.tensors.values():
        for number in layout.numbers(tensor.place) if tensor.index else [None]:
            if layout.exists(tensor, number):
                shape = layout.shape(tensor, number)
                base[(tensor.name, number) if number is not None else (tensor.name,)] = np.arange(
                    start, start + int(np.prod(shape))
                ).reshape(shape)
                start += int(np.prod(shape))
    placement = Placement(layout, layout.section(format), formats.get(format).rules, mesh, **options)
    out: list[dict[str, np.ndarray]] = [{} for _ in placement.ranks]
    for stored in placement.stored():
        flat = np.zeros(stored.size, int)
        for key, block in stored.blocks:
            strides = [step * flat.itemsize for step in block.strides]
            np.lib.stride_tricks.as_strided(flat[block.offset :], block.shape, strides)[...] = base[bare(key[0]), *key[1:]][
                tuple(slice(*edge) for edge in block.box)
            ]
        assert int((flat == 0).sum()) == stored.pad == stored.padding
        out[stored.rank][stored.name] = flat.reshape(stored.shape)
    assert not placement.problems, placement.problems
    return out
