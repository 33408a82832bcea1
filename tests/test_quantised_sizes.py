"""Published models from config.json alone, quantised: the largest tp whose cuts keep blocks whole is the one that their widths give."""

import json
from pathlib import Path

import pytest

import reshard
from reshard.checkpoint import describe_checkpoint
from reshard.errors import PlanError

CONFIGS = Path(__file__).parent / "full_size"
MOE = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 1,
       "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "num_experts": 8, "num_experts_per_tok": 2,
       "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "decoder_sparse_step": 1, "mlp_only_layers": [], "torch_dtype": "bfloat16"}  # fmt: skip
DENSE = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 1,
         "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "rms_norm_eps": 1e-6,
         "tie_word_embeddings": False, "torch_dtype": "bfloat16"}  # fmt: skip
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
MXFP8 = {"quant_method": "modelopt", "quant_algo": "MXFP8"}
NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}
QWEN3_235B = {"hidden_size": 4096, "num_attention_heads": 64, "moe_intermediate_size": 1536}
#: config.json, and the largest power of two for blocks of 128, groups of 32 and of 16
WIDTHS = {
    "Qwen3-30B-A3B": (MOE | {"moe_intermediate_size": 768}, (2, 8, 16)),
    "Qwen3-235B-A22B": (MOE | QWEN3_235B, (4, 16, 32)),
    "experts of 512": (MOE | {"moe_intermediate_size": 512}, (4, 16, 32)),
    "experts of 2048": (MOE | {"moe_intermediate_size": 2048}, (16, 32, 32)),  # 32 query heads are the next limit
    "experts of 1408": (MOE | {"moe_intermediate_size": 1408}, (1, 4, 8)),
    "Qwen3-32B": (DENSE, (8, 32, 64)),
}


def largest(tmp_path, config, quantization, **options):
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    source = describe_checkpoint(tmp_path)
    assert source.layout.scheme != "none"
    for tp in (64, 32, 16, 8, 4, 2, 1):
        try:
            reshard.plan(source, format="vllm", tp=tp, **options)
        except PlanError as error:
            assert "inside a block" in str(error) or "cannot " in str(error)
        else:
            return tp
    raise AssertionError("none fits")


@pytest.mark.parametrize("name", WIDTHS)
@pytest.mark.parametrize("number, quantization", [*enumerate((FP8, MXFP8, NVFP4))], ids=["FP8 128", "MX 32", "NVFP4 16"])
def test_the_largest_tp_is_that_of_the_widths(tmp_path, name, number, quantization):
    config, sizes = WIDTHS[name]
    assert largest(tmp_path, config, quantization) == sizes[number]


def test_refined_scales_allow_more(tmp_path):
    assert largest(tmp_path, WIDTHS["experts of 512"][0], FP8, refine=True) == 16


def test_gpt_oss_is_cut_in_uneven_whole_groups(tmp_path):
    """90 groups of 32: 23, 23, 23 and 21 of them on four ranks; twelve on each of eight but the last."""
    config = json.loads((CONFIGS / "gpt-oss-120b.json").read_text())
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"num_hidden_layers": 1, "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": kept}})
    )
    source = describe_checkpoint(tmp_path)
    for tp, widths in ((4, [736, 736, 736, 672]), (8, [384] * 7 + [192])):
        held = [s for s in reshard.plan(source, format="vllm", tp=tp).plan.destinations if s.name.endswith("w2_weight_scale")]
        assert [32 * s.shape[-1] for s in held] == widths
        assert [
            2 * s.shape[-1] for s in reshard.plan(source, format="vllm", tp=tp).plan.destinations if s.name.endswith("w2_weight")
        ] == widths
        rows = [s.shape[1] for s in reshard.plan(source, format="vllm", tp=tp).plan.destinations if s.name.endswith("w13_bias")]
        assert rows == [2 * width for width in widths]


def test_deepseek_v3_as_it_is_published(tmp_path):
    """FP8 from its shapes alone (here of six layers): tp 8 and 16 for vLLM, bf16 for Megatron, and no 32."""
    config = json.loads((CONFIGS / "deepseek-v3.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 6, "quantization_config": FP8 | {"fmt": "e4m3"}}))
    source = describe_checkpoint(tmp_path)
    codes = sum(s.size for s in source.stored if s.dtype == "F8_E4M3")
    assert codes > 0.94 * source.parameters and source.bytes < 1.15 * source.parameters  # embedding and output layer in bf16
    assert reshard.plan(source, format="vllm", tp=16).bytes_written and reshard.plan(source, format="vllm", tp=8).bytes_written
    assert reshard.plan(source, format="megatron", tp=8, ep=8, dequantise=True).bytes_written > 2 * source.parameters
    with pytest.raises(PlanError, match="inside a block") as caught:
        reshard.plan(source, format="vllm", tp=32)
    assert "16" in caught.value.hint
