"""Small random models of families that no layout descriptor knows, cut over two ranks as transformers' own plan for tensor parallelism says."""

import re
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4,
         "head_dim": 8, "max_position_embeddings": 64, "tie_word_embeddings": False, "pad_token_id": None, "moe_intermediate_size": 48}  # fmt: skip
OF_EXPERTS = {
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "glm4_moe": {"n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "glm4_moe_lite": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 24,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 8,
    },
    "dots1": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "exaone_moe": {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 96},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1, "moe_num_shared_experts": 1},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoeshared": {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 96},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
#: where transformers has no plan, or leaves a layer whole: as it cuts the layers of these names elsewhere
USUAL = {
    **{f"layers.*.self_attn.{name}_proj": "colwise" for name in "qkv"}, "layers.*.self_attn.o_proj": "rowwise",
    "layers.*.mlp.gate_proj": "colwise", "layers.*.mlp.up_proj": "colwise", "layers.*.mlp.down_proj": "rowwise",
    **{f"layers.*.mlp.{place}.{name}_proj": way for place in ("shared_expert", "shared_experts") for name, way in
       (("gate", "colwise"), ("up", "colwise"), ("down", "rowwise"))},
    "layers.*.shared_mlp.input_linear": "gate, up", "layers.*.shared_mlp.output_linear": "rowwise",
}  # fmt: skip


def config_of(model_type: str, **changes):
    return AutoConfig.for_model(model_type, **{**SIZES, **OF_EXPERTS.get(model_type, {}), **changes})


def make(model_type: str, folder: Path, **changes) -> torch.nn.Module:
    """A model of random weights, norms and biases too, saved to `folder`."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(model_type, **changes), dtype=torch.float32)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            std, mean = (0.15, 0) if tensor.dim() > 1 else (0.05, "norm" in name and name.endswith("weight"))
            tensor.copy_(torch.randn_like(tensor) * std + mean)
    model.save_pretrained(folder)
    return model


def cut(model: torch.nn.Module, folder: Path, ranks: int = 2) -> None:
    """Each rank's tensors as transformers would load them, in rank_XX.pt; rows of the vocabulary dealt out too."""
    plan = {f"{model.base_model_prefix}.{key}": value for key, value in {**USUAL, **(model.config.base_model_tp_plan or {})}.items()}
    folder.mkdir()
    model.config.save_pretrained(folder)
    for rank in range(ranks):
        state = {name: piece(tensor, name, plan, model, rank, ranks).clone() for name, tensor in model.state_dict().items()}
        torch.save(state, folder / f"rank_{rank:02d}.pt")


def piece(tensor: torch.Tensor, name: str, plan: dict, model, rank: int, ranks: int) -> torch.Tensor:
    pattern = re.sub(r"\.\d+\.", ".*.", name)
    way = plan.get(pattern) or plan.get(pattern.rpartition(".")[0]) or ""
    if name.endswith(("embed_tokens.weight", "lm_head.weight", "lm_head.bias")):
        way = "colwise"
    if way == "gate, up" or (way == "colwise_gather_output" and ".gate_up_proj" in name):  # engines deal out each half, and gather nothing
        return torch.cat([half.chunk(ranks, 0)[rank] for half in tensor.chunk(2, 0)])
    if way == "packed_colwise":  # gate rows, then up rows, of each expert
        return torch.cat([half.chunk(ranks, 1)[rank] for half in tensor.chunk(2, 1)], 1)
    if way.startswith("colwise"):
        return tensor.chunk(ranks, 0)[rank]
    if way.startswith("rowwise") and tensor.dim() > 1:
        return tensor.chunk(ranks, -1)[rank]
    return tensor
