"""Names, dtypes and shapes of small models of all families, as transformers writes them: tests/families_data/NAME.json.

    python scripts/family_shapes.py [NAME …]

Each file holds {"config": config.json, "tensors": {name: [dtype, shape]}}. tests/test_family_shapes.py reads them, so that names and
shapes are judged without transformers. Multi-token prediction, which transformers neither loads nor saves, is added by the
names that the published files have (`MTP`).
"""

import json
import re
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "tests" / "families_data"

COMMON = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100, "intermediate_size": 96,
          "max_position_embeddings": 64, "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
MOE = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
MLA = {**COMMON, **MOE, "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
       "v_head_dim": 16, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
       "num_hidden_layers": 3, "routed_scaling_factor": 2.5, "norm_topk_prob": True, "topk_method": "noaux_tc", "scoring_func": "sigmoid"}  # fmt: skip
GDN = {"head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
       "linear_conv_kernel_dim": 4, "num_hidden_layers": 4, "layer_types": ["linear_attention"] * 3 + ["full_attention"]}  # fmt: skip
QWEN35 = {**COMMON, **GDN}
MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}

TRANSPOSED = {"qwen3_vl_moe": r".*experts\.(gate_up|down)_proj"}
TOWER = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64, "patch_size": 4, "spatial_merge_size": 2,
         "temporal_patch_size": 2, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}  # fmt: skip
GEMMA4 = {"num_hidden_layers": 4, "head_dim": 16, "global_head_dim": 32, "num_global_key_value_heads": 1, "attention_k_eq_v": True, "num_kv_shared_layers": 2,
          "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 90, "use_double_wide_mlp": True, "tie_word_embeddings": True, "sliding_window": 16,
          "layer_types": ["sliding_attention", "full_attention"] * 2}  # fmt: skip
DEEPSEEK_V4 = {"num_hidden_layers": 4, "num_attention_heads": 64, "num_key_value_heads": 1, "head_dim": 8, "q_lora_rank": 24, "n_routed_experts": 4, "n_shared_experts": 1,
               "compress_ratios": [0, 128, 4, 4], "num_hash_layers": 1, "qk_rope_head_dim": 4, "hc_mult": 2, "sliding_window": 16, "o_groups": 4, "o_lora_rank": 16,
               "index_n_heads": 2, "index_head_dim": 8, "index_topk": 8, "topk_method": "noaux_tc", "num_nextn_predict_layers": 1}  # fmt: skip
MINIMAX_M3 = {"num_hidden_layers": 3, "intermediate_size": 32, "dense_intermediate_size": 96, "shared_intermediate_size": 32, "head_dim": 16,
              "num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 8, "index_n_heads": 2, "index_head_dim": 16,
              "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"], "mlp_layer_types": ["dense", "sparse", "sparse"]}  # fmt: skip
TOWER_M3 = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4, "image_size": 32}
#: keys of config.json that published files have and transformers does not write
KEPT = (
    "topk_method",
    "rotary_dim",
    "conv_dim",
    "block_dim",
    "scoring_func",
    "use_qk_norm",
    "qk_norm_type",
    "compress_ratios",
    "num_hash_layers",
)
#: transformers has no model of it: its names were read in vLLM's loader, by hand
READ = ("kimi_k3",)
#: where the published files have other names than transformers 5.23 writes
PUBLISHED = {
    "kimi_linear": [(r"block_sparse_moe\.((?:gate|up|down)_proj)", r"mlp.\1")],
    "deepseek_v4": [(r"^model\.", ""), (r"^embed_tokens", "embed"), (r"^hc_head\.hc_", "hc_head_"), (r"attn\.norm", "attn.kv_norm")],
}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2}
FALCON = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2}

#: name: (class of transformers, its config)
FAMILIES = {
    "llama": ("LlamaForCausalLM", COMMON),
    "llama_biases": ("LlamaForCausalLM", {**COMMON, "attention_bias": True, "mlp_bias": True, "head_dim": 8, "tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", {**COMMON, "head_dim": 24, "sliding_window": None}),
    "ministral": ("MinistralForCausalLM", {**COMMON, **WINDOWS, "head_dim": 16}),
    "ministral3": ("Ministral3ForCausalLM", {**COMMON, "head_dim": 16, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2ForCausalLM", {**COMMON, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", {**COMMON, "head_dim": 24}),
    "phi3": ("Phi3ForCausalLM", COMMON),
    "gemma2": ("Gemma2ForCausalLM", {**COMMON, **WINDOWS, "head_dim": 16, "tie_word_embeddings": True}),
    "gemma3_text": ("Gemma3ForCausalLM", {**COMMON, **WINDOWS, "head_dim": 24, "tie_word_embeddings": True}),
    "olmo": ("OlmoForCausalLM", COMMON),
    "olmo2": ("Olmo2ForCausalLM", COMMON),
    "olmo3": ("Olmo3ForCausalLM", {**COMMON, **WINDOWS}),
    "cohere": ("CohereForCausalLM", {**COMMON, "tie_word_embeddings": True, "use_qk_norm": True}),
    "cohere2": ("Cohere2ForCausalLM", {**COMMON, **WINDOWS, "head_dim": 16, "tie_word_embeddings": True}),
    "glm": ("GlmForCausalLM", {**COMMON, "head_dim": 16}),
    "glm4": ("Glm4ForCausalLM", {**COMMON, "head_dim": 16}),
    "granite": ("GraniteForCausalLM", {**COMMON, "attention_bias": True, "mlp_bias": True}),
    "smollm3": ("SmolLM3ForCausalLM", {**COMMON, "tie_word_embeddings": True}),
    "starcoder2": ("Starcoder2ForCausalLM", {**COMMON, "tie_word_embeddings": True, "sliding_window": None}),
    "nemotron": ("NemotronForCausalLM", {**COMMON, "head_dim": 16}),
    "seed_oss": ("SeedOssForCausalLM", {**COMMON, "head_dim": 16}),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt_neox": ("GPTNeoXForCausalLM", {**{k: v for k, v in COMMON.items() if k != "num_key_value_heads"}}),
    "falcon_7b": ("FalconForCausalLM", {**FALCON, "multi_query": True, "parallel_attn": True}),
    "falcon_40b": ("FalconForCausalLM", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_11b": ("FalconForCausalLM", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1, "ffn_hidden_size": 128}),
    "falcon_rw": ("FalconForCausalLM", {**FALCON, "multi_query": False, "parallel_attn": False, "alibi": True, "bias": True}),
    "bloom": ("BloomForCausalLM", {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100}),
    "opt": ("OPTForCausalLM", {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 96, "vocab_size": 100, "max_position_embeddings": 64, "word_embed_proj_dim": 64}),
    "opt_350m": ("OPTForCausalLM", {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 96, "vocab_size": 100, "max_position_embeddings": 64, "word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "mixtral": ("MixtralForCausalLM", {**COMMON, "num_local_experts": 4, "head_dim": 16}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", {**COMMON, **MOE, "num_experts": 4, "shared_expert_intermediate_size": 48, "mlp_only_layers": [0]}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {**COMMON, **MOE, "num_experts": 4, "head_dim": 16}),
    "qwen3_next": ("Qwen3NextForCausalLM", {**QWEN35, **MOE, "num_experts": 4, "shared_expert_intermediate_size": 32, "mtp_num_hidden_layers": 1}),
    "qwen3_5": ("Qwen3_5ForCausalLM", QWEN35),
    "qwen3_5_moe": ("Qwen3_5MoeForCausalLM", {**QWEN35, **MOE, "num_experts": 4, "shared_expert_intermediate_size": 32}),
    "deepseek_v2": ("DeepseekV2ForCausalLM", {**MLA, "q_lora_rank": None, "topk_method": "greedy", "n_shared_experts": 2}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", {**MLA, "num_nextn_predict_layers": 1}),
    "deepseek_v32": ("DeepseekV32ForCausalLM", {**MLA, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8, "num_nextn_predict_layers": 1}),
    "glm_moe_dsa": ("GlmMoeDsaForCausalLM", {**MLA, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8, "num_nextn_predict_layers": 1}),
    "glm4_moe": ("Glm4MoeForCausalLM", {**COMMON, **MOE, "head_dim": 16, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1,
                                        "use_qk_norm": True, "attention_bias": True, "n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 1}),
    "glm4_moe_lite": ("Glm4MoeLiteForCausalLM", {**MLA, "num_nextn_predict_layers": 1}),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration", {"text_config": {**COMMON, "head_dim": 16}, "vision_config": TOWER}),
    "qwen3_vl_moe": ("Qwen3VLMoeForConditionalGeneration", {"text_config": {**COMMON, **MOE, "head_dim": 16, "num_experts": 4}, "vision_config": TOWER}),
    "qwen3_5_vl": ("Qwen3_5ForConditionalGeneration", {"text_config": QWEN35, "vision_config": TOWER}),
    "qwen3_5_moe_vl": ("Qwen3_5MoeForConditionalGeneration", {"text_config": {**QWEN35, **MOE, "num_experts": 4, "shared_expert_intermediate_size": 32},
                                                              "vision_config": TOWER}),
    "minimax_m2": ("MiniMaxM2ForCausalLM", {**COMMON, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "intermediate_size": 32, "rotary_dim": 8, "use_qk_norm": True}),
    "gpt_oss": ("GptOssForCausalLM", {**COMMON, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "intermediate_size": 32}),
    "llama4": ("Llama4ForCausalLM", {**COMMON, "num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 16, "intermediate_size": 32,
                                     "intermediate_size_mlp": 64, "interleave_moe_layer_step": 2, "num_hidden_layers": 4}),
    "olmoe": ("OlmoeForCausalLM", {**COMMON, "num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32}),
    "granitemoe": ("GraniteMoeForCausalLM", {**COMMON, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32}),
    "granitemoeshared": ("GraniteMoeSharedForCausalLM", {**COMMON, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32,
                                                         "shared_intermediate_size": 48}),
    "ernie4_5": ("Ernie4_5ForCausalLM", {**COMMON, "head_dim": 16}),
    "ernie4_5_moe": ("Ernie4_5_MoeForCausalLM", {**COMMON, **MOE, "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 2, "moe_layer_start_index": 1,
                                                 "moe_layer_end_index": 1, "moe_layer_interval": 1}),
    "hunyuan_v1_moe": ("HunYuanMoEV1ForCausalLM", {**COMMON, "num_experts": 4, "moe_topk": 2, "head_dim": 16, "moe_intermediate_size": [96, 96],
                                                   "num_shared_expert": [1, 1]}),
    "hunyuan_v1_dense": ("HunYuanDenseV1ForCausalLM", {**COMMON, "head_dim": 16}),
    "dots1": ("Dots1ForCausalLM", {**COMMON, **MOE, "head_dim": 16, "n_routed_experts": 4, "n_shared_experts": 2, "first_k_dense_replace": 1,
                                   "n_group": 1, "topk_group": 1}),
    "nemotron_h": ("NemotronHForCausalLM", {**COMMON, **MOE, "num_hidden_layers": 4, "layers_block_type": ["mamba", "attention", "mlp", "moe"],
                                            "head_dim": 16, "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 8, "conv_kernel": 4,
                                            "n_routed_experts": 4, "n_shared_experts": 1, "moe_shared_expert_intermediate_size": 48, "n_group": 1,
                                            "topk_group": 1, "moe_latent_size": 24}),
    "jamba": ("JambaForCausalLM", {**COMMON, "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
                                   "expert_layer_offset": 1, "num_experts": 4, "num_experts_per_tok": 2, "mamba_dt_rank": 4, "mamba_d_state": 8,
                                   "mamba_d_conv": 4, "mamba_expand": 2, "use_mamba_kernels": False}),
    "falcon_h1": ("FalconH1ForCausalLM", {**COMMON, **MAMBA2, "head_dim": 16, "mamba_d_ssm": 128, "mamba_rms_norm": True}),
    "granitemoehybrid": ("GraniteMoeHybridForCausalLM", {**COMMON, **MAMBA2, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32,
                                                         "shared_intermediate_size": 48, "layer_types": ["mamba", "attention"]}),
    "lfm2": ("Lfm2ForCausalLM", {**COMMON, "tie_word_embeddings": True, "num_hidden_layers": 2, "layer_types": ["conv", "full_attention"], "block_multiple_of": 16, "conv_dim": 64, "block_dim": 64}),
    "lfm2_moe": ("Lfm2MoeForCausalLM", {**COMMON, **MOE, "tie_word_embeddings": True, "num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "num_experts": 4,
                                        "num_dense_layers": 1}),
    "gemma4": ("Gemma4ForCausalLM", {**COMMON, **GEMMA4}),
    "gemma4_moe": ("Gemma4ForCausalLM", {**COMMON, **GEMMA4, "attention_k_eq_v": False, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0,
                                         "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}),
    "deepseek_v4": ("DeepseekV4ForCausalLM", {**COMMON, **MOE, **DEEPSEEK_V4}),
    "minimax_m3": ("MiniMaxM3SparseForConditionalGeneration", {"text_config": {**COMMON, **MINIMAX_M3}, "vision_config": TOWER_M3}),
    "kimi_linear": ("KimiLinearForCausalLM", {**COMMON, **MOE, "num_hidden_layers": 4, "num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 32,
                                              "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "num_experts": 4, "num_shared_experts": 1,
                                              "num_experts_per_token": 2, "first_k_dense_replace": 1, "num_expert_group": 1, "topk_group": 1,
                                              "linear_attn_config": {"kda_layers": [1, 2, 3], "full_attn_layers": [4], "num_heads": 4, "head_dim": 16,
                                                                     "short_conv_kernel_size": 4}}),
}  # fmt: skip


def mtp(name: str, config: dict, tensors: dict) -> dict:
    """The multi-token prediction layer that published files of family `name` have: DeepSeek's as one more layer, Qwen's under ``mtp``."""
    if not (config.get("num_nextn_predict_layers") or config.get("mtp_num_hidden_layers")):
        return {}
    if "text_config" in config:
        return {}
    hidden, last = config["hidden_size"], config["num_hidden_layers"] - 1
    if name == "deepseek_v4":
        of_last = {n.removeprefix(f"layers.{last}."): v for n, v in tensors.items() if n.startswith(f"layers.{last}.")}
        own = {"e_proj.weight": [hidden, hidden], "h_proj.weight": [hidden, hidden], "enorm.weight": [hidden], "hnorm.weight": [hidden], "norm.weight": [hidden],
               "emb.tok_emb.weight": [config["vocab_size"], hidden], "head.weight": [config["vocab_size"], hidden]}  # fmt: skip
        head = {n: v for n, v in tensors.items() if n.startswith("hc_head_")}
        return {"mtp.0." + n: v for n, v in {**of_last, **head}.items() if "compressor" not in n and "indexer" not in n} | {
            "mtp.0." + n: ["BF16", shape] for n, shape in own.items()
        }
    of_last = {n.split(f"model.layers.{last}.", 1)[1]: v for n, v in tensors.items() if n.startswith(f"model.layers.{last}.")}
    if config.get("num_nextn_predict_layers"):
        at = f"model.layers.{last + 1}."
        own = {"enorm.weight": [hidden], "hnorm.weight": [hidden], "eh_proj.weight": [hidden, 2 * hidden], "shared_head.norm.weight": [hidden],
               "embed_tokens.weight": [config["vocab_size"], hidden], "shared_head.head.weight": [config["vocab_size"], hidden]}  # fmt: skip
        return {at + n: v for n, v in of_last.items()} | {at + n: ["BF16", shape] for n, shape in own.items()}
    if config.get("mtp_num_hidden_layers"):
        own = {
            "fc.weight": [hidden, 2 * hidden],
            "norm.weight": [hidden],
            "pre_fc_norm_embedding.weight": [hidden],
            "pre_fc_norm_hidden.weight": [hidden],
        }
        return {"mtp.layers.0." + n: v for n, v in of_last.items()} | {"mtp." + n: ["BF16", shape] for n, shape in own.items()}
    return {}


def shapes(name: str) -> dict:
    """config.json and tensors of family `name`, made by transformers."""
    import torch
    import transformers
    from safetensors import safe_open

    kind, settings = FAMILIES[name]
    model_class = getattr(transformers, kind)
    config = model_class.config_class(**settings, dtype="bfloat16")
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model_class(config).to(torch.bfloat16).save_pretrained(folder)
        written = json.loads((Path(folder) / "config.json").read_text())
        with safe_open(Path(folder) / "model.safetensors", "pt") as file:
            tensors = {key: [file.get_slice(key).get_dtype(), file.get_slice(key).get_shape()] for key in sorted(file.keys())}
    for pattern, published in PUBLISHED.get(name, ()):
        tensors = {re.sub(pattern, published, key): value for key, value in tensors.items()}
    for key, value in tensors.items():
        if re.fullmatch(TRANSPOSED.get(name, "-"), key):
            value[1][-2:] = reversed(value[1][-2:])
        if key.endswith(("e_score_correction_bias", "gate.bias")):  # as the published files have it
            value[0] = "F32"
    written.pop("transformers_version", None)
    written |= {key: value for key, value in settings.items() if "nextn" in key or "mtp" in key or key in KEPT}
    return {"config": written, "tensors": {**tensors, **mtp(name, {**written, **settings}, tensors)}}


def compact(table: dict) -> str:
    """One line for each tensor."""
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in table["tensors"].items())
    return f'{{"config": {json.dumps(table["config"])},\n "tensors": {{\n{lines}\n }}}}\n'


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in sys.argv[1:] or FAMILIES:
        try:
            (FOLDER / f"{name}.json").write_text(compact(shapes(name)))
            print(name, "written")
        except Exception as error:  # noqa: BLE001  each family is told, none ends the run
            print(name, re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:300])
