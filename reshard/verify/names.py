"""What the engines call the tensors that they read, told in transformers' names of modules.

Each table is a list of rewrites, applied in order. They are written from the engines' own code, and know nothing of the
descriptors: a descriptor that is wrong about a name or an order must not be able to make its own test pass. Where an
engine fuses what transformers keeps apart, the name that comes out ends in the fused one (``qkv_proj``, ``gate_up_proj``,
``qkv_a_proj``); ``build.py`` splits its output.

Sources: vLLM 0.11 to 0.32 and SGLang 0.5.23 (``models/*.py``, ``layers/linear.py``, ``layers/fused_moe/layer.py``),
Megatron-core 0.16 and 0.19 (``transformer/attention.py``, ``mlp.py``, ``multi_latent_attention.py``, ``moe/experts.py``), transformers 5
(``conversion_mapping.py``).
"""

import re

_HF = (
    (r"^embed_out\.", "lm_head."),
    (r"\.block_sparse_moe\.", ".mlp."),
    (r"\.experts\.(\d+)\.w1\.", r".experts.\1.gate_proj."),
    (r"\.experts\.(\d+)\.w3\.", r".experts.\1.up_proj."),
    (r"\.experts\.(\d+)\.w2\.", r".experts.\1.down_proj."),
)
_ENGINE = (
    *_HF,
    (r"^model\.embedding\.", "model.embed_tokens."),
    (r"(\.layers\.\d+)\.attn\.", r"\1.self_attn."),
    (r"\.mla_attn\.", "."),
    (r"\.fused_qkv_a_proj(?:_with_mqa)?\.", ".qkv_a_proj."),
    (r"\.experts\.(?:runner\.|_)?gate\.", ".gate."),
    (r"\.experts\.e_score_correction_bias$", ".gate.e_score_correction_bias"),
    (r"\.experts\._shared_experts\.(?:_layer\.)?", ".shared_experts."),
    (r"\.experts\.routed_experts\.", ".experts."),
    (r"\.experts\.w13_weight$", ".experts.gate_up_proj"),
    (r"\.experts\.w2_weight$", ".experts.down_proj"),
    (r"\.experts\.w13_(?:weight_)?bias$", ".experts.gate_up_proj_bias"),
    (r"\.experts\.w2_(?:weight_)?bias$", ".experts.down_proj_bias"),
)
_MEGATRON = (
    (r"^embedding\.word_embeddings\.", "model.embed_tokens."),
    (r"^output_layer\.", "lm_head."),
    (r"^decoder\.final_layernorm\.", "model.norm."),
    (r"^decoder\.layers\.", "model.layers."),
    (r"\.self_attention\.linear_qkv\.layer_norm_", ".input_layernorm."),
    (r"\.mlp\.linear_fc1\.layer_norm_", ".post_attention_layernorm."),
    (r"\.pre_mlp_layernorm\.", ".post_attention_layernorm."),
    (r"\.self_attention\.linear_q_up_proj\.layer_norm_", ".self_attn.q_a_layernorm."),
    (r"\.self_attention\.linear_kv_up_proj\.layer_norm_", ".self_attn.kv_a_layernorm."),
    (r"\.self_attention\.kv_layernorm\.", ".self_attn.kv_a_layernorm."),
    (r"\.self_attention\.([qk])_layernorm\.", r".self_attn.\1_norm."),
    (r"\.self_attention\.core_attention\.softmax_offset$", ".self_attn.sinks"),
    (r"\.self_attention\.linear_qkv\.", ".self_attn.qkv_proj."),
    (r"\.self_attention\.linear_qkv_down_proj\.", ".self_attn.qkv_a_proj."),
    (r"\.self_attention\.linear_q_down_proj\.", ".self_attn.q_a_proj."),
    (r"\.self_attention\.linear_kv_down_proj\.", ".self_attn.kv_a_proj_with_mqa."),
    (r"\.self_attention\.linear_q_up_proj\.", ".self_attn.q_b_proj."),
    (r"\.self_attention\.linear_kv_up_proj\.", ".self_attn.kv_b_proj."),
    (r"\.self_attention\.linear_q_proj\.", ".self_attn.q_proj."),
    (r"\.self_attention\.linear_proj\.", ".self_attn.o_proj."),
    (r"\.mlp\.router\.expert_bias$", ".mlp.gate.e_score_correction_bias"),
    (r"\.mlp\.router\.", ".mlp.gate."),
    (r"\.experts\.local_experts\.(\d+)\.linear_fc1\.", r".experts.\1.gate_up_proj."),
    (r"\.experts\.local_experts\.(\d+)\.linear_fc2\.", r".experts.\1.down_proj."),
    (r"\.experts\.linear_fc1\.(weight|bias)(\d+)$", r".experts.\2.gate_up_proj.\1"),
    (r"\.experts\.linear_fc2\.(weight|bias)(\d+)$", r".experts.\2.down_proj.\1"),
    (r"\.experts\.weight1$", ".experts.grouped_gate_up_proj"),
    (r"\.experts\.weight2$", ".experts.grouped_down_proj"),
    (r"\.linear_fc1\.", ".gate_up_proj."),
    (r"\.linear_fc2\.", ".down_proj."),
)
_TABLES = {"hf": _HF, "tp": _HF, "rank-pt": _HF, "vllm": _ENGINE, "sglang": _ENGINE, "megatron": _MEGATRON}
#: what files hold beside weights: attention scales of vLLM, tables of angles, Megatron's state of FP8, multi-token prediction
SCALE = re.compile(r"\._(?:[qkv]|prob)_scale$")
PREDICTION = re.compile(r"^mtp\.")
_NO_WEIGHTS = re.compile(rf"{SCALE.pattern}|\.inv_freq$|\._extra_state$|{PREDICTION.pattern}|\.(?:local|global)_tokens_per_expert$")
_LAYER = re.compile(r"(?<=\.layers\.)\d+")

FORMATS = tuple(_TABLES)
ENGINES = ("vllm", "sglang")


def no_weight(name: str) -> bool:
    return bool(_NO_WEIGHTS.search(name))


def module_name(name: str, format: str, first_layer: int = 0) -> str | None:
    """The name that `name`, as `format` stores it, has in transformers' modules; None for what is no weight.

    `first_layer` is added to numbers of layers, for formats that count them within a pipeline stage.
    """
    if no_weight(name):
        return None
    for pattern, replacement in _TABLES[format]:
        name = re.sub(pattern, replacement, name)
    return _LAYER.sub(lambda number: str(int(number[0]) + first_layer), name) if first_layer else name
