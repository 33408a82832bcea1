"""Small random models of families that no layout descriptor knows, cut over two ranks as transformers' own plan for tensor parallelism says."""

import re
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4,
         "head_dim": 8, "max_position_embeddings": 64, "tie_word_embeddings": False, "pad_token_id": None, "moe_intermediate_size": 48}  # fmt: skip
OF_EXPERTS = {
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "glm4_moe": {"n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
}


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
    plan = {f"{model.base_model_prefix}.{key}": value for key, value in model.config.base_model_tp_plan.items()}
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
    if way == "packed_colwise":  # gate rows, then up rows, of each expert
        return torch.cat([half.chunk(ranks, 1)[rank] for half in tensor.chunk(2, 1)], 1)
    if way.startswith("colwise"):
        return tensor.chunk(ranks, 0)[rank]
    if way.startswith("rowwise") and tensor.dim() > 1:
        return tensor.chunk(ranks, -1)[rank]
    return tensor
