"""Small random models of all nine families, and the meshes that each format can have of them, by the formats' own rules."""

from hypothesis import strategies as st

CLASSES = {
    "llama": "LlamaForCausalLM", "phi3": "Phi3ForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM",
    "gpt_oss": "GptOssForCausalLM", "gpt_neox": "GPTNeoXForCausalLM",
}  # fmt: skip
FORMATS = ("hf", "tp", "rank-pt", "vllm", "sglang", "megatron")
FUSED = ("vllm", "sglang", "megatron")


@st.composite
def models(draw, families=tuple(CLASSES)):
    """(family, config.json)"""
    family = draw(st.sampled_from(families))
    wide = st.sampled_from([4, 8, 12, 16, 24, 24, 48, 7, 10])
    kv, group, head = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 2, 3, 4])), draw(st.sampled_from([2, 4, 8]))
    if family == "deepseek_v3":
        group = 1
    heads = kv * group * (draw(st.sampled_from([1, 2])) if family == "deepseek_v3" else 1)
    config = {"architectures": [CLASSES[family]], "hidden_size": draw(st.sampled_from([8, 12, 20])), "intermediate_size": draw(wide),
              "num_attention_heads": heads, "num_key_value_heads": heads if family == "deepseek_v3" else kv, "head_dim": head,
              "vocab_size": draw(st.one_of(st.integers(5, 300), st.sampled_from([64, 128, 192, 256]))),
              "num_hidden_layers": draw(st.sampled_from([1, 2, 4])), "tie_word_embeddings": draw(st.booleans()),
              "rms_norm_eps": 1e-5, "max_position_embeddings": 64, "dtype": "bfloat16"}  # fmt: skip
    experts, moe_ffn = draw(st.sampled_from([2, 4, 6, 8])), draw(st.sampled_from([4, 8, 12, 24]))
    if family == "llama":
        config |= {"attention_bias": draw(st.booleans()), "mlp_bias": draw(st.booleans())}
    elif family == "gpt_neox":
        config |= {"hidden_size": heads * head, "attention_bias": draw(st.booleans()), "layer_norm_eps": 1e-5}
    elif family == "mixtral":
        config |= {"num_local_experts": experts, "num_experts_per_tok": 2}
    elif family == "gpt_oss":
        config |= {"num_local_experts": experts, "num_experts_per_tok": 2, "attention_bias": True, "sliding_window": 16, "swiglu_limit": 7.0,
                   "layer_types": ["sliding_attention", "full_attention"] * 2, "rope_theta": 150000.0}  # fmt: skip
        config["layer_types"] = config["layer_types"][: config["num_hidden_layers"]]
    elif family == "qwen3_moe":
        config |= {"num_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": moe_ffn, "norm_topk_prob": True,
                   "mlp_only_layers": draw(st.sampled_from([[], [0]]))}  # fmt: skip
    elif family == "deepseek_v3":
        config |= {"n_routed_experts": experts, "n_shared_experts": draw(st.sampled_from([1, 2])), "num_experts_per_tok": 2,
                   "moe_intermediate_size": moe_ffn, "q_lora_rank": draw(st.sampled_from([None, 6])), "kv_lora_rank": 10, "qk_nope_head_dim": 6,
                   "qk_rope_head_dim": 4, "v_head_dim": 4, "first_k_dense_replace": draw(st.sampled_from([0, 1])), "n_group": 1, "topk_group": 1,
                   "routed_scaling_factor": 2.5, "norm_topk_prob": True}  # fmt: skip
        del config["head_dim"]
    return family, config


def experts_of(config) -> int:
    return next((config[name] for name in ("num_local_experts", "num_experts", "n_routed_experts") if name in config), 0)


def dense_and_sparse(family: str, config) -> tuple[bool, bool]:
    """Whether the model has layers with one MLP, and layers of experts."""
    if not experts_of(config):
        return True, False
    if family in ("mixtral", "gpt_oss"):
        return False, True
    dense = len(config["mlp_only_layers"]) if family == "qwen3_moe" else config["first_k_dense_replace"]
    return dense > 0, dense < config["num_hidden_layers"]


def fits(family: str, config, format: str, tp: int, pp: int, ep: int) -> bool:
    """Whether `format` can hold the model on this mesh: what the engines' and Megatron's own code demands."""
    layers, heads, kv = config["num_hidden_layers"], config["num_attention_heads"], config["num_key_value_heads"]
    dense, sparse = dense_and_sparse(family, config)
    if format == "hf":
        return tp == pp == ep == 1
    if ep > 1 and not experts_of(config):
        return False
    if format in ("tp", "rank-pt"):
        return layers % pp == 0 and ep in (1, tp) and pp <= layers
    if family == "gpt_neox" and format != "vllm":
        return False
    if heads % tp or (kv % tp and tp % kv) or (family == "gpt_neox" and heads % tp):
        return False
    moe_ffn = config.get("moe_intermediate_size", config["intermediate_size"])
    if dense and config["intermediate_size"] % tp:
        return False
    if format == "megatron":
        etp_fits = moe_ffn % tp == 0 if sparse else True
        rows = (heads + 2 * kv) * config.get("head_dim", 1)
        fused = family == "deepseek_v3" or rows % tp == 0
        return layers % pp == 0 and fused and etp_fits and (not sparse or experts_of(config) % ep == 0) and (ep == 1 or sparse)
    padded = -(-config["vocab_size"] // 64) * 64
    if format == "vllm" and padded % tp:
        return False
    if format == "sglang" and pp > 1:
        return False
    if ep > 1:
        return sparse and ep == tp and experts_of(config) % ep == 0 and pp <= layers and shared_fits(config, tp)
    return pp <= layers and (not sparse or moe_ffn % tp == 0)


def shared_fits(config, tp: int) -> bool:
    return config.get("n_shared_experts", 0) * config.get("moe_intermediate_size", 0) % tp == 0


@st.composite
def targets(draw, family: str, config, formats=FORMATS, *, tp_alone: bool = False):
    """A format and one of the meshes that fit, with more than one tensor-parallel rank nine times in ten where that is possible."""
    possible = {}
    for format in formats:
        meshes = [
            (tp, pp, ep)
            for tp in range(1, 9)
            for pp in (1, 2)[: 2 - tp_alone]
            for ep in ({1} if tp_alone else {1, 2, tp})
            if fits(family, config, format, tp, pp, ep)
        ]
        if meshes:
            possible[format] = meshes
    format = draw(st.sampled_from(sorted(possible) + [own for own in FUSED if own in possible]))  # fused ones twice as often
    many = [mesh for mesh in possible[format] if mesh[0] > 1]
    meshes = many if many and draw(st.integers(0, 9)) else possible[format]
    tp, pp, ep = draw(st.sampled_from(meshes))
    return {"format": format, "tp": tp, "pp": pp, "ep": ep}
