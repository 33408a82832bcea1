"""The formats there are, by name: where each is described within ``reshard.formats``. Asked in this order whether a folder is one."""

FORMATS = {
    "tp": "tp.FORMAT",
    "transformers": "transformers.FORMAT",
    "megatron-dist": "megatron_dist.FORMAT",
    "dcp": "dcp.FORMAT",
    "fsdp": "fsdp.FORMAT",
    "vllm": "engine.VLLM",
    "sglang": "engine.SGLANG",
    "megatron": "megatron.FORMAT",
    "rank-pt": "rank_pt.FORMAT",
    "peft": "peft.FORMAT",
    "presharded": "presharded.FORMAT",
    "hf": "hf.FORMAT",
    "deepspeed": "deepspeed.FORMAT",
    "meta": "meta.FORMAT",
    "mistral": "meta.MISTRAL",
}
#: read, and not written: their writers have formats that are
READ_ONLY = ("fsdp", "deepspeed", "mistral", "presharded")
