"""What a weight sync costs, before anything runs: the worked examples of the README, computed from layouts and meshes alone.

    python examples/sync_cost.py [--bandwidth 50e9] [--ratios]

Bandwidth is bytes/s each way per rank: 450e9 NVLink 4, 50e9 InfiniBand NDR, 64e9 PCIe 5 x16, 7e9 one NVMe drive.
"""

import argparse
import time

from reshard import sync

LLAMA_70B = {"architectures": ["LlamaForCausalLM"], "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64,
             "num_key_value_heads": 8, "vocab_size": 128256, "num_hidden_layers": 80, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}  # fmt: skip
QWEN3_235B = {"architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536,
              "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151936,
              "num_hidden_layers": 94, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}  # fmt: skip
DEEPSEEK_V3 = {"architectures": ["DeepseekV3ForCausalLM"], "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
               "num_attention_heads": 128, "num_key_value_heads": 128, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8,
               "first_k_dense_replace": 3, "moe_layer_freq": 1, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
               "v_head_dim": 128, "n_group": 8, "topk_group": 4, "topk_method": "noaux_tc", "vocab_size": 129280, "num_hidden_layers": 61,
               "rms_norm_eps": 1e-6, "tie_word_embeddings": False}  # fmt: skip

#: model, its trainer and its engines: (format, number of ranks, mesh)
EXAMPLES = (
    ("Llama-3.1-70B", LLAMA_70B, ("megatron", 8, {"tp": 8}), ("vllm", 8, {"tp": 4})),
    ("Llama-3.1-70B", LLAMA_70B, ("megatron", 32, {"tp": 8}), ("vllm", 32, {"tp": 4})),
    ("Llama-3.1-70B", LLAMA_70B, ("megatron", 32, {"tp": 4, "pp": 2}), ("vllm", 32, {"tp": 8})),
    ("Qwen3-235B-A22B", QWEN3_235B, ("megatron", 64, {"tp": 4, "pp": 2, "ep": 16, "etp": 1}), ("vllm", 64, {"tp": 8, "ep": 8})),
    (
        "Qwen3-235B-A22B, FP8",
        QWEN3_235B,
        ("megatron", 64, {"tp": 4, "pp": 2, "ep": 16, "etp": 1}),
        ("vllm", 64, {"tp": 8, "ep": 8, "fp8": True}),
    ),
    ("DeepSeek-V3", DEEPSEEK_V3, ("megatron", 256, {"ep": 256, "etp": 1}), ("vllm", 256, {"tp": 32, "ep": 32})),
    ("DeepSeek-V3", DEEPSEEK_V3, ("megatron", 256, {"ep": 256, "etp": 1}), ("sglang", 256, {"tp": 32})),
)

SMALL = {
    **LLAMA_70B,
    "hidden_size": 3072,
    "intermediate_size": 8448,
    "num_attention_heads": 24,
    "num_key_value_heads": 12,
    "head_dim": 128,
    "num_hidden_layers": 28,
}
SMALL_MOE = {
    **QWEN3_235B,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_hidden_layers": 48,
}
#: what tests/test_sync.py runs on gloo, at the size of a real model
RATIOS = (
    ("Megatron TP4 → vLLM TP2 (fused)", SMALL, ("megatron", 4, {"tp": 4}), ("vllm", range(4, 6), {"tp": 2})),
    ("TP4 → TP3", SMALL, ("tp", 4, {"tp": 4}), ("tp", range(4, 7), {"tp": 3})),
    ("Megatron TP2×PP2 → SGLang TP4", SMALL, ("megatron", 4, {"tp": 2, "pp": 2}), ("sglang", range(4, 8), {"tp": 4})),
    ("Megatron EP4 → vLLM TP2", SMALL_MOE, ("megatron", 4, {"ep": 4, "etp": 1}), ("vllm", range(4, 6), {"tp": 2})),
    ("FSDP2 dp2 × TP2 → vLLM TP3", SMALL, ("fsdp", 4, {"dp": 2, "tp": 2}), ("vllm", range(4, 7), {"tp": 3})),
    ("FSDP2 dp8 → vLLM TP4, columns of rows", SMALL, ("fsdp", 8, {"dp": 8}), ("vllm", range(8, 12), {"tp": 4})),
    ("Megatron TP2 → vLLM TP8, 4 key/value heads held twice", SMALL_MOE, ("megatron", 2, {"tp": 2}), ("vllm", range(2, 10), {"tp": 8})),
    ("Megatron TP2·DP4 → vLLM TP4", SMALL, ("megatron", 8, {"tp": 2}), ("vllm", range(8, 12), {"tp": 4})),
    ("Megatron TP4·DP2 → vLLM TP2 × 4, colocated", SMALL, ("megatron", 8, {"tp": 4}), ("vllm", range(8), {"tp": 2})),
)


def ratios() -> None:
    """Bytes received by the worst-off engine rank over the least possible, by three ways; and the busiest sender's share."""
    print(
        "| meshes | least, GB | reshard | all-gather + broadcast | everything to everyone | busiest sender / total |\n"
        + "| --- " * 6
        + "|",
        flush=True,
    )
    for name, config, (format, ranks, mesh), (other, engines, other_mesh) in RATIOS:
        layout = sync.layout(config)
        src = (
            sync.Side.sharded(layout, sync.fsdp(layout, ranks=range(ranks), **mesh))
            if format == "fsdp"
            else sync.Side.placed(layout, format, ranks=range(ranks), **mesh)
        )
        cost = sync.plan(src, sync.Side.placed(layout, other, ranks=engines, **other_mesh)).cost()
        loads = [cost.ranks[r] for r in engines]
        least = max(load.bound for load in loads)
        gathered = max(load.gathered / load.bound for load in loads if load.bound)
        print(
            f"| {name} | {least / 1e9:.2f} | {cost.ratio:.3f} | {gathered:.2f} | {cost.model / least:.2f} | {cost.most_sent / cost.total:.4f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bandwidth", type=float, default=50e9)
    parser.add_argument("--ratios", action="store_true", help="bytes received over the least possible, on small meshes")
    args = parser.parse_args()
    if args.ratios:
        ratios()
        return
    bandwidth = args.bandwidth
    print(
        "| model | trainer → engines | GB | received per engine rank, GB (of the least possible) | busiest sender, GB (first holder always) | seconds | all-gather + broadcast, s | plan, s |\n"
        + "| --- " * 8
        + "|",
        flush=True,
    )
    for name, config, (format, ranks, mesh), (other, engines, other_mesh) in EXAMPLES:
        began = time.perf_counter()
        layout = sync.layout(config)
        src = sync.Side.placed(layout, format, ranks=range(ranks), **mesh)
        dst = sync.Side.placed(layout, other, ranks=range(ranks, ranks + engines), **other_mesh)
        cost = sync.plan(src, dst).cost(bandwidth)
        print(f"| {name} | {src.title} → {dst.title} | {cost.model / 1e9:.0f} | {cost.most_received / 1e9:.1f} ({cost.ratio:.3f}) "
              f"| {cost.most_sent / 1e9:.1f} ({cost.most_sent_by_first_holder / 1e9:.1f}) | {cost.seconds:.2f} | {cost.gather_broadcast_seconds:.1f} "
              f"| {time.perf_counter() - began:.0f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
