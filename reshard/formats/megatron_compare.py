"""Whether the ``args`` in a Megatron-LM checkpoint and a config.json describe the same model.

The table that says which field is which expression over config.json is ``megatron_args.ARGS`` (and ``[megatron.args]`` of
the descriptor), the same that is written. Here stands only which fields matter, and for what:

- ``SIZES`` decide where a tensor's rows belong. Two models may have tensors of equal shapes and other sizes (16 heads of
  8, 8 heads of 16), so that a wrong one scrambles rows without a word: reading refuses any difference.
- ``VALUES`` decide what the model computes from the same tensors (rotary base, norm epsilon, router …). Moving weights
  does not need them; a proof that shards compute what the original does needs them all.

All other fields (of training, of tokenizers, of files) say nothing of the model and are never compared.
"""

import argparse
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace

from reshard.foreign import quote

SIZES = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "vocab_size",
    "multi_latent_attention", "q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim",
    "num_experts", "moe_layer_freq", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size",
)  # fmt: skip
VALUES = (
    "position_embedding_type", "add_position_embedding", "rotary_base", "rotary_percent", "rotary_interleaved", "rope_type",
    "use_rope_scaling", "rope_scaling_factor", "rotary_seq_len_interpolation_factor", "rotary_scaling_factor", "mscale",
    "mscale_all_dim", "yarn_original_max_position_embeddings", "yarn_beta_fast", "yarn_beta_slow",
    "yarn_correction_range_round_to_int", "original_max_position_embeddings", "beta_fast", "beta_slow",
    "normalization", "norm_epsilon", "layernorm_epsilon", "apply_layernorm_1p", "qk_layernorm",
    "swiglu", "squared_relu", "quick_geglu", "glu_linear_offset", "activation_func_clamp_value",
    "add_bias_linear", "add_qkv_bias", "untie_embeddings_and_output_weights", "softmax_type", "window_size", "window_attn_skip_freq",
    "moe_router_topk", "moe_router_pre_softmax", "moe_router_score_function", "moe_router_enable_expert_bias",
    "moe_router_topk_scaling_factor", "moe_router_num_groups", "moe_router_group_topk",
)  # fmt: skip
_YARN = ("rotary_scaling_factor", "mscale", "mscale_all_dim", "yarn_original_max_position_embeddings", "yarn_beta_fast", "yarn_beta_slow",
         "yarn_correction_range_round_to_int", "original_max_position_embeddings", "beta_fast", "beta_slow")  # fmt: skip
_MLA = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
#: what Megatron takes a field for that is None
_UNSET = {
    "rotary_interleaved": False, "add_position_embedding": False, "use_rope_scaling": False, "apply_layernorm_1p": False,
    "qk_layernorm": False, "swiglu": False, "squared_relu": False, "quick_geglu": False, "softmax_type": "vanilla",
    "rotary_percent": 1.0, "glu_linear_offset": 0.0, "moe_router_topk_scaling_factor": 1.0, "moe_router_num_groups": 1,
    "moe_router_enable_expert_bias": False, "moe_router_pre_softmax": False, "rotary_scaling_factor": 1.0, "mscale": 1.0,
    "mscale_all_dim": 0.0, "beta_fast": 32.0, "beta_slow": 1.0, "yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0,
    "yarn_correction_range_round_to_int": True, "rotary_seq_len_interpolation_factor": 1, "multi_latent_attention": False,
}  # fmt: skip
#: None says something of its own here: no experts, no latent of the queries, no shared experts, no window
_NONE_COUNTS = frozenset(("num_experts", "q_lora_rank", "moe_shared_expert_intermediate_size", "window_size", "window_attn_skip_freq",
                          "activation_func_clamp_value"))  # fmt: skip


@dataclass(frozen=True, slots=True)
class ArgsDifference:
    """A field in which two descriptions of a model differ. `kind` is "size" or "value" (see the module)."""

    name: str
    found: object
    expected: object
    kind: str

    def __str__(self) -> str:
        return f"args say {self.name} {quote(repr(self.found))}, config.json gives {quote(repr(self.expected))}"


def fields(args: object) -> dict[str, object]:
    """The fields of ``args`` as a checkpoint holds them (a Namespace or a dict); none for anything else."""
    if isinstance(args, (argparse.Namespace, SimpleNamespace)):
        args = vars(args)
    return {name: value for name, value in args.items() if isinstance(name, str)} if isinstance(args, dict) else {}


def compare_args(found: object, expected: object, names: Iterable[str] = SIZES + VALUES) -> list[ArgsDifference]:
    """The fields among `names` in which `found` (a file's args) and `expected` (``megatron_args.model_args``) differ.

    Both are a Namespace or a mapping. A field that one side lacks is not compared, nor is one that means nothing in
    either model (rotary scaling without scaling, experts' sizes without experts). Numbers that are equal count as equal
    whatever their types. A vocabulary may be told smaller than config.json's, whose last rows no token uses.
    """
    left, right = _plain(found), _plain(expected)
    out = []
    for name in names:
        if name not in left or name not in right or not (_means(name, left, right) or _means(name, right, left)):
            continue
        a, b = left[name], right[name]
        if None in (a, b) and name not in _NONE_COUNTS and name not in _UNSET:
            continue
        a, b = (_UNSET.get(name) if x is None else x for x in (a, b))
        if name == "vocab_size" and type(a) is int and type(b) is int and a < b:
            continue
        if name == "layernorm_epsilon" and "norm_epsilon" in left:
            continue  # the one that arguments.py fills in
        if not _same(a, b):
            out.append(ArgsDifference(name, left[name], right[name], "size" if name in SIZES else "value"))
    return out


def _plain(args: object) -> dict[str, object]:
    """Fields with those that Megatron derives from others filled in."""
    table = fields(args)
    if table.get("group_query_attention") is False and table.get("num_attention_heads") is not None:
        table["num_query_groups"] = table["num_attention_heads"]
    heads, hidden = table.get("num_attention_heads"), table.get("hidden_size")
    if "kv_channels" in table and table["kv_channels"] is None and type(heads) is int and type(hidden) is int and heads > 0:
        table["kv_channels"] = hidden // heads
    if table.get("num_experts") is not None and "moe_ffn_hidden_size" in table and table["moe_ffn_hidden_size"] is None:
        table["moe_ffn_hidden_size"] = table.get("ffn_hidden_size")
    if "moe_layer_freq" in table:
        table["moe_layer_freq"] = _layers_with_experts(table)
    if "window_size" in table and table["window_size"] is not None:
        table["window_size"] = list(table["window_size"]) if isinstance(table["window_size"], (list, tuple)) else table["window_size"]
    return table


def _layers_with_experts(table: Mapping[str, object]) -> list[int] | None:
    freq, layers = table["moe_layer_freq"], table.get("num_layers")
    if isinstance(freq, (list, tuple)):
        return [int(bool(flag)) for flag in freq]
    if type(freq) is int and freq > 0 and type(layers) is int and 0 <= layers <= 65536:
        return [int(i % freq == 0) for i in range(layers)]
    return None


def _means(name: str, one: Mapping[str, object], other: Mapping[str, object]) -> bool:
    """Whether `name` means something in the model that `one` describes, as far as it tells; `other` fills in."""

    def said(field: str) -> object:
        return one[field] if field in one else other.get(field)

    latent = bool(said("multi_latent_attention"))
    if name in _MLA:
        return latent
    if name in ("num_query_groups", "kv_channels"):
        return not latent
    if name.startswith("moe_") and not said("num_experts"):
        return False
    if name == "ffn_hidden_size":  # of the dense layers
        return not (said("num_experts") and all(said("moe_layer_freq") or ()))
    if name in _YARN:
        return "yarn" in (said("position_embedding_type"), said("rope_type"))
    if name == "rope_type":  # of latent attention's own rotary embedding
        return latent
    if name == "rope_scaling_factor":
        return bool(said("use_rope_scaling"))
    if name == "window_attn_skip_freq":
        return said("window_size") is not None
    if name == "moe_router_group_topk":
        return (said("moe_router_num_groups") or 1) != 1
    if name == "moe_router_pre_softmax":
        return said("moe_router_score_function") != "sigmoid"
    if name in ("glu_linear_offset", "activation_func_clamp_value"):
        return bool(said("quick_geglu"))
    return True


def _same(a: object, b: object) -> bool:
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        try:
            return a == b or math.isclose(a, b, rel_tol=1e-9)
        except OverflowError:  # an integer that no float can hold
            return False
    return a == b
