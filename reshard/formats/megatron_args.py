"""``args`` of a Megatron-LM checkpoint: the model's settings, as its ``--use-checkpoint-args`` reads them back.

Fields by Megatron-LM of August 2026: load_args_from_checkpoint and check_checkpoint_args (checkpointing.py), which read
them, arguments.py, which names them. What it does not read back (norms' epsilon, rotary scaling, latent ranks) is
there all the same, for people and other tools. Settings of training (losses, dropout at large) are the trainer's.
"""

from collections.abc import Iterable, Mapping

from reshard.errors import LayoutError
from reshard.foreign import quote
from reshard.formats import Target
from reshard.geometry.block import Stored
from reshard.layout import Layout, Section
from reshard.layout.bound import Scope
from reshard.layout.expressions import evaluate
from reshard.layout.mesh import expert_cut

#: name → expression over config.json, over _scope, and over the layout's axes; a descriptor's [megatron.args] adds to it
ARGS = {
    "num_layers": "num_hidden_layers", "hidden_size": "hidden_size", "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads", "num_query_groups": "num_key_value_heads",
    "group_query_attention": "num_key_value_heads != num_attention_heads", "kv_channels": "head_dim",
    "multi_latent_attention": "false", "qk_layernorm": "false",
    "window_size": "[sliding_window - 1, 0] if windowed else null", "window_attn_skip_freq": "window_layers",
    "vocab_size": "vocab_size", "make_vocab_size_divisible_by": "128",
    "untie_embeddings_and_output_weights": "not tie_word_embeddings",
    "tokenizer_type": "'HuggingFaceTokenizer'", "tokenizer_model": "null",
    "max_position_embeddings": "max_position_embeddings", "seq_length": "max_position_embeddings",
    "position_embedding_type": "'yarn' if rope.type == 'yarn' else 'rope'",
    "add_position_embedding": "false", "use_rotary_position_embeddings": "true",
    "rotary_base": "rope_theta", "rotary_percent": "partial_rotary_factor", "rotary_interleaved": "false", "rope_type": "null",
    "use_rope_scaling": "rope.type == 'llama3'", "rope_scaling_factor": "rope.factor if rope.type == 'llama3' else 8",
    "rotary_seq_len_interpolation_factor": "rope.factor if rope.type == 'linear' else null",
    "rotary_scaling_factor": "rope.factor if rope.type == 'yarn' else 1",
    "mscale": "rope.mscale or 1", "mscale_all_dim": "rope.mscale_all_dim or 0",
    "yarn_original_max_position_embeddings": "rope.original_max_position_embeddings if rope.type == 'yarn' else null",
    "yarn_beta_fast": "rope.beta_fast", "yarn_beta_slow": "rope.beta_slow", "yarn_correction_range_round_to_int": "rope.truncate",
    "add_bias_linear": "false", "add_qkv_bias": "false", "swiglu": "true", "squared_relu": "false", "quick_geglu": "false",
    "normalization": "'RMSNorm'", "norm_epsilon": "rms_norm_eps", "layernorm_epsilon": "rms_norm_eps",
    "apply_layernorm_1p": "false", "apply_query_key_layer_scaling": "false", "attention_dropout": "0", "hidden_dropout": "0",
    "spec": "null", "mtp_num_layers": "null", "mtp_use_repeated_layer": "false",
    "num_experts": "null", "moe_layer_freq": "sparse_layers", "moe_ffn_hidden_size": "null", "moe_grouped_gemm": "num_experts != null",
    "moe_router_topk": "2", "moe_router_pre_softmax": "false", "moe_router_score_function": "'softmax'",
    "moe_router_enable_expert_bias": "false", "moe_router_topk_scaling_factor": "null", "moe_router_num_groups": "null",
    "moe_router_group_topk": "null", "moe_router_dtype": "null", "moe_shared_expert_intermediate_size": "null",
    "moe_token_dispatcher_type": "'alltoall' if num_experts != null else 'allgather'", "moe_single_grouped_weight": "false", "moe_single_grouped_bias": "false",
    "moe_latent_size": "null",
}  # fmt: skip
#: Megatron's type of these is float, whichever way config.json writes them
_FLOATS = frozenset((
    "rotary_percent", "attention_dropout", "hidden_dropout", "rope_scaling_factor", "rotary_scaling_factor", "mscale",
    "mscale_all_dim", "beta_fast", "beta_slow", "yarn_beta_fast", "yarn_beta_slow", "norm_epsilon", "layernorm_epsilon",
    "moe_router_topk_scaling_factor", "glu_linear_offset", "activation_func_clamp_value",
))  # fmt: skip


def megatron_args(target: Target, stored: list[Stored]) -> dict[str, object]:
    """The fields of ``args`` for a checkpoint of `target`, whose tensors are `stored`."""
    layout, mesh = target.placement.layout, target.mesh
    out = model_args(layout, target.placement.section)
    first = target.placement.stored(target.placement.ranks[:1])  # which need not be among those that are written
    padded = next((s for s in first if s.entry and s.entry.pad), None)
    if padded is not None:
        out["padded_vocab_size"] = padded.shape[0] * target.placement.mesh.tp
    dtype = next((s.dtype for s in stored if s.dtype in ("BF16", "F16")), None)
    return out | {
        "tensor_model_parallel_size": mesh.tp, "pipeline_model_parallel_size": mesh.pp,
        "expert_model_parallel_size": mesh.ep, "expert_tensor_parallel_size": expert_cut(mesh, target.placement.rules.ranks(mesh)),
        "virtual_pipeline_model_parallel_size": None, "num_layers_per_virtual_pipeline_stage": None,
        "ckpt_format": "torch", "use_distributed_optimizer": False, "bf16": dtype == "BF16", "fp16": dtype == "F16",
    }  # fmt: skip


def model_args(layout: Layout, section: Section | None = None, names: Iterable[str] | None = None) -> dict[str, object]:
    """The fields of ``args`` that describe the model of `layout`, or those of them in `names`: nothing of a mesh or of files.

    `section` is the layout's Megatron table (its own by default). Raises LayoutError for a config.json that says nonsense.
    """
    table = ARGS | dict((section or layout.section("megatron")).args)
    known = _scope(layout)
    scope = Scope(layout.descriptor, known)
    known["num_experts"] = evaluate(table["num_experts"], scope)
    chosen = table if names is None else [name for name in names if name in table]
    return {name: _typed(layout, name, evaluate(table[name], scope)) for name in chosen}


def _typed(layout: Layout, name: str, value: object) -> object:
    if name in _FLOATS and value is not None:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise LayoutError(
                f"layout {layout.name}: [megatron.args] {name} is {quote(repr(value))}, expected a number", "check config.json"
            )
        try:
            return float(value)
        except OverflowError:
            raise LayoutError(
                f"layout {layout.name}: [megatron.args] {name} is {quote(value)}, which is no size", "check config.json"
            ) from None
    if name in ("rotary_base", "rotary_seq_len_interpolation_factor") and isinstance(value, float) and value.is_integer():
        return int(value)
    return tuple(value) if name == "window_size" and isinstance(value, list) else value


def _scope(layout: Layout) -> dict[str, object]:
    """config.json, with transformers' defaults where it is silent, and what takes more than an expression to say."""
    config = layout.scope
    rope = {**_table(config, "rope_scaling"), **_table(config, "rope_parameters")}
    rope["type"] = rope.get("rope_type") or rope.get("type") or "default"
    kinds = config.get("layer_types") or ()
    if not isinstance(kinds, (list, tuple)):
        raise LayoutError(f"config.json: layer_types is {quote(repr(kinds))}, expected a list of names")
    rotated = config.get("no_rope_layers") or ()  # 1 where a layer has rotary positions, in spite of its name
    if not isinstance(rotated, (list, tuple)):
        raise LayoutError(f"config.json: no_rope_layers is {quote(repr(rotated))}, expected a list of 0 and 1")
    sliding = [kind == "sliding_attention" for kind in kinds]
    router = layout.descriptor.tensors.get("router")
    sparse = [int(layout.exists(router, i)) for i in range(layout.layers)] if router else []
    return {
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "partial_rotary_factor": rope.get("partial_rotary_factor") or 1,
        "norm_topk_prob": False, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1, "swiglu_limit": 7, "rope_theta": rope.get("rope_theta") or 10000, "sliding_window": None,
        **config,
        "rope": rope, "absent": sorted(layout.absent),
        "windowed": bool(config.get("sliding_window") and config.get("use_sliding_window", True) and (any(sliding) or not sliding)),
        "window_layers": [int(flag) for flag in sliding] if any(sliding) and not all(sliding) else None,
        "unrotated_layers": [int(not flag) for flag in rotated] if not all(rotated) else None,
        "sparse_layers": 1 if all(sparse) else sparse,
    }  # fmt: skip


def _table(config: Mapping[str, object], name: str) -> Mapping[str, object]:
    table = config.get(name)
    return table if isinstance(table, Mapping) else {}
