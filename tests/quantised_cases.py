"""A tiny Llama in each quantisation scheme, written bit by bit to the schemes' specifications, and its weights by torch.

Nothing here is reshard's or a library's: codes are drawn at random, packed one at a time, and the weights computed from them one
formula per scheme. scripts/check_quantised.py compares the same with compressed-tensors and vLLM.
"""

import json

import torch
from safetensors.torch import save_file

HIDDEN, FFN, KV, HEADS, HEAD, LAYERS, VOCAB = 256, 512, 4, 8, 32, 1, 64
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": KV, "head_dim": HEAD, "vocab_size": VOCAB, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "max_position_embeddings": 128, "tie_word_embeddings": False, "rope_theta": 10000.0, "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
LINEARS = {"self_attn.q_proj": (HEADS * HEAD, HIDDEN), "self_attn.k_proj": (KV * HEAD, HIDDEN), "self_attn.v_proj": (KV * HEAD, HIDDEN),
           "self_attn.o_proj": (HIDDEN, HEADS * HEAD), "mlp.gate_proj": (FFN, HIDDEN), "mlp.up_proj": (FFN, HIDDEN),
           "mlp.down_proj": (HIDDEN, FFN)}  # fmt: skip
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def fp8(shape):
    return (torch.randn(shape) * 60).clamp(-440, 440).to(torch.float8_e4m3fn)


def spread(scale, rows, columns, shape):
    return scale.repeat_interleave(rows, 0)[: shape[0]].repeat_interleave(columns, 1)[:, : shape[1]]


def positive(*shape):
    return torch.rand(shape) * 0.01 + 0.001


def exponents(*shape):
    return torch.randint(110, 125, shape, dtype=torch.uint8)


def words(whole, bits, dim, order=None):
    """Whole numbers of `bits` packed into int32 along `dim`, one at a time: that at place i of eight goes into field order[i]."""
    each = 32 // bits
    whole = whole.movedim(dim, -1)
    out = torch.zeros(*whole.shape[:-1], -(-whole.shape[-1] // each), dtype=torch.int64)
    for i in range(whole.shape[-1]):
        field = order[i % each] if order else i % each
        out[..., i // each] |= whole[..., i].to(torch.int64) << (bits * field)
    out = torch.where(out >= 1 << 31, out - (1 << 32), out)
    return out.to(torch.int32).movedim(-1, dim).contiguous()


def nibbles(codes):
    return (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)


def fp8_blocks(name, shape, scale_name="weight_scale_inv", block=(64, 32), dtype=torch.float32, four=False):
    codes, scale = fp8(shape), positive(-(-shape[0] // block[0]), -(-shape[1] // block[1])).to(dtype)
    held = scale.reshape(scale.shape[0], 1, scale.shape[1], 1) if four else scale
    return {f"{name}.weight": codes, f"{name}.{scale_name}": held}, codes.float() * spread(scale.float(), *block, shape)


def fp8_e8m0(name, shape):
    made, _ = fp8_blocks(name, shape)
    made[f"{name}.weight_scale_inv"] = exponents(*made[f"{name}.weight_scale_inv"].shape).view(torch.float8_e8m0fnu)
    scale = 2.0 ** (made[f"{name}.weight_scale_inv"].view(torch.uint8).float() - 127)
    return made, made[f"{name}.weight"].float() * spread(scale, 64, 32, shape)


def fp8_rows(name, shape, flat=False, dtype=torch.float32, whole=False):
    codes = torch.randint(-127, 128, shape, dtype=torch.int8) if whole else fp8(shape)
    scale = positive(shape[0], 1).to(dtype)
    return {f"{name}.weight": codes, f"{name}.weight_scale": scale[:, 0].contiguous() if flat else scale}, codes.float() * scale.float()


def fp8_one(name, shape, size=(), static=False):
    codes, scale = fp8(shape), positive(1).reshape(size)
    made = {f"{name}.weight": codes, f"{name}.weight_scale": scale}
    return made | ({f"{name}.input_scale": positive(1).reshape(size)} if static else {}), codes.float() * scale.reshape(())


def mxfp8(name, shape):
    codes, scale = fp8(shape), exponents(shape[0], shape[1] // 32)
    return {f"{name}.weight": codes, f"{name}.weight_scale": scale}, codes.float() * spread(2.0 ** (scale.float() - 127), 1, 32, shape)


def mxfp4(name, shape):
    codes, scale = torch.randint(0, 16, shape), exponents(shape[0], shape[1] // 32)
    made = {f"{name}.weight_packed": nibbles(codes), f"{name}.weight_scale": scale}
    return made, FP4[codes] * spread(2.0 ** (scale.float() - 127), 1, 32, shape)


def nvfp4(name, shape, ct):
    codes, scale = torch.randint(0, 16, shape), (torch.rand(shape[0], shape[1] // 16) * 400 + 1).to(torch.float8_e4m3fn)
    whole = torch.rand(1) * 1000 + 500
    if ct:
        names = ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale")
        held = nibbles(codes), scale, whole, whole + 1
        return {f"{name}.{n}": t for n, t in zip(names, held)}, FP4[codes] * spread(scale.float() / whole, 1, 16, shape)
    names, held = ("weight", "weight_scale", "weight_scale_2", "input_scale"), (nibbles(codes), scale, (1 / whole)[0], (2 / whole)[0])
    return {f"{name}.{n}": t for n, t in zip(names, held)}, FP4[codes] * spread(scale.float() * (1 / whole), 1, 16, shape)


def ct_int(name, shape, bits=4, group=32, zeros=False, dtype=torch.bfloat16):
    codes, groups = torch.randint(0, 1 << bits, shape), shape[1] // group if group else 1
    scale = positive(shape[0], groups).to(dtype)
    zero = torch.randint(0, 1 << bits, (shape[0], groups)) if zeros else torch.full((shape[0], groups), 1 << bits - 1)
    made = {f"{name}.weight_packed": words(codes, bits, 1), f"{name}.weight_scale": scale, f"{name}.weight_shape": torch.tensor(shape)}
    made |= {f"{name}.weight_zero_point": words(zero, bits, 0)} if zeros else {}
    each = group or shape[1]
    return made, (codes.float() - spread(zero.float(), 1, each, shape)) * spread(scale.float(), 1, each, shape)


def gptq(name, shape, bits=4, group=32, version=1):
    codes, groups = torch.randint(0, 1 << bits, shape[::-1]), shape[1] // group
    zero, scale = torch.randint(1, 1 << bits, (groups, shape[0])), positive(groups, shape[0]).half()
    made = {f"{name}.qweight": words(codes, bits, 0), f"{name}.qzeros": words(zero - int(version == 1), bits, 1), f"{name}.scales": scale,
            f"{name}.g_idx": torch.arange(shape[1], dtype=torch.int32) // group}  # fmt: skip
    plain = (codes.half() - zero.half().repeat_interleave(group, 0)) * scale.repeat_interleave(group, 0)
    return made, plain.T.contiguous()


def awq(name, shape, group=32):
    order = [0, 4, 1, 5, 2, 6, 3, 7]  # the field of a word in which each of eight stands; AutoAWQ packs 0 2 4 6 1 3 5 7
    codes, groups = torch.randint(0, 16, shape[::-1]), shape[1] // group
    zero, scale = torch.randint(0, 16, (groups, shape[0])), positive(groups, shape[0]).half()
    made = {f"{name}.qweight": words(codes, 4, 1, order), f"{name}.qzeros": words(zero, 4, 1, order), f"{name}.scales": scale}
    plain = (codes.half() - zero.half().repeat_interleave(group, 0)) * scale.repeat_interleave(group, 0)
    return made, plain.T.contiguous()


def ct(format, strategy, num_bits=8, type="float", **weights):
    inputs = weights.pop("inputs", {"num_bits": 8, "type": "float", "dynamic": True, "strategy": "token"})
    group = {"targets": ["Linear"], "input_activations": inputs,
             "weights": {"num_bits": num_bits, "type": type, "strategy": strategy, "symmetric": True, "dynamic": False, **weights}}  # fmt: skip
    return {"quant_method": "compressed-tensors", "format": format, "quantization_status": "compressed",
            "config_groups": {"group_0": group}, "ignore": ["lm_head"]}  # fmt: skip


def modelopt(algo, **more):
    return {"quant_method": "modelopt", "quant_algo": algo, "kv_cache_quant_algo": None, "ignore": ["lm_head"], **more}


_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True, "lm_head": False}
_FOUR_BITS = {"inputs": None, "type": "int"}
#: by name: the scheme that reshard tells, quantization_config, how a matrix is made, the dtype it has when it is dequantised, and the
#: tp sizes that its grain allows here
SCHEMES = {
    "fp8 blocks": ("fp8_block", {**_FP8, "weight_block_size": [64, 32]}, fp8_blocks, (1, 2)),
    "fp8 blocks, bf16 scales": ("fp8_block", {**_FP8, "weight_block_size": [64, 32]}, lambda n, s: fp8_blocks(n, s, dtype=torch.bfloat16), (1, 2)),
    "fp8 blocks, e8m0 scales": ("fp8_block", {**_FP8, "weight_block_size": [64, 32], "scale_fmt": "ue8m0"}, fp8_e8m0, (1, 2)),
    "fp8": ("fp8_tensor", _FP8, fp8_one, (1, 2, 4)),
    "fp8, static": ("fp8_tensor", {**_FP8, "activation_scheme": "static"}, lambda n, s: fp8_one(n, s, static=True), (1, 2, 4)),
    "ct fp8 blocks": ("ct_fp8_block", ct("float-quantized", "block", block_structure=[64, 32]), lambda n, s: fp8_blocks(n, s, "weight_scale"), (1, 2)),
    "ct fp8 rows": ("ct_fp8_channel", ct("float-quantized", "channel"), lambda n, s: fp8_rows(n, s, dtype=torch.bfloat16), (1, 2, 4)),
    "ct int8 rows": ("ct_fp8_channel", ct("int-quantized", "channel", type="int", inputs={"num_bits": 8, "type": "int", "dynamic": True, "strategy": "token"}),
                     lambda n, s: fp8_rows(n, s, whole=True), (1, 2, 4)),
    "ct fp8": ("ct_fp8_tensor", ct("float-quantized", "tensor", inputs={"num_bits": 8, "type": "float", "dynamic": False, "strategy": "tensor"}),
               lambda n, s: fp8_one(n, s, (1,), True), (1, 2, 4)),
    "ct mxfp8": ("ct_mxfp8", ct("mxfp8-quantized", "group", group_size=32, scale_dtype="torch.uint8", inputs=None), mxfp8, (1, 2, 4)),
    "ct mxfp4": ("ct_mxfp4", ct("mxfp4-pack-quantized", "group", 4, group_size=32, scale_dtype="torch.uint8", inputs=None), mxfp4, (1, 2, 4)),
    "ct nvfp4": ("ct_nvfp4", ct("nvfp4-pack-quantized", "tensor_group", 4, group_size=16, scale_dtype="torch.float8_e4m3fn",
                                inputs={"num_bits": 4, "type": "float", "dynamic": "local", "strategy": "tensor_group", "group_size": 16}),
                 lambda n, s: nvfp4(n, s, True), (1, 2, 4)),
    "ct int4": ("ct_int", ct("pack-quantized", "group", 4, group_size=32, **_FOUR_BITS), ct_int, (1, 2, 4)),
    "ct int4, zeros": ("ct_int", ct("pack-quantized", "group", 4, group_size=32, **_FOUR_BITS) , lambda n, s: ct_int(n, s, zeros=True), (1, 2, 4)),
    "ct int8": ("ct_int", ct("pack-quantized", "channel", 8, **_FOUR_BITS), lambda n, s: ct_int(n, s, 8, 0), (1, 2, 4)),
    "modelopt fp8": ("modelopt_fp8", modelopt("FP8"), lambda n, s: fp8_one(n, s, static=True), (1, 2, 4)),
    "modelopt fp8 rows": ("modelopt_fp8_channel", modelopt("FP8_PER_CHANNEL_PER_TOKEN"), lambda n, s: fp8_rows(n, s, flat=True), (1, 2, 4)),
    "modelopt fp8 blocks": ("modelopt_fp8_block", modelopt("FP8_PB_WO"), lambda n, s: fp8_blocks(n, s, "weight_scale", (128, 128), four=True), (1,)),
    "modelopt mxfp8": ("modelopt_mxfp8", modelopt("MXFP8"), mxfp8, (1, 2, 4)),
    "modelopt nvfp4": ("modelopt_nvfp4", modelopt("NVFP4", group_size=16), lambda n, s: nvfp4(n, s, False), (1, 2, 4)),
    "gptq": ("gptq", _GPTQ, gptq, (1, 2, 4)),
    "gptq, 8 bits": ("gptq", {**_GPTQ, "bits": 8}, lambda n, s: gptq(n, s, 8), (1, 2, 4)),
    "gptq v2": ("gptq", {**_GPTQ, "checkpoint_format": "gptq_v2"}, lambda n, s: gptq(n, s, version=2), (1, 2, 4)),
    "awq": ("awq", {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}, awq, (1, 2, 4)),
}  # fmt: skip
SCHEMES["ct int4, zeros"][1]["config_groups"]["group_0"]["weights"]["symmetric"] = False


def write(folder, case):
    """The model in `folder`; what its weights are, by name, in the dtype that config.json says."""
    torch.manual_seed(7)
    _, quantization, make, _ = SCHEMES[case]
    dtype = torch.float16 if quantization["quant_method"] in ("gptq", "awq") else torch.bfloat16
    rest = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    state, plain = {}, {}
    for layer in range(LAYERS):
        rest |= {f"model.layers.{layer}.{norm}_layernorm.weight": (HIDDEN,) for norm in ("input", "post_attention")}
        for linear, shape in LINEARS.items():
            name = f"model.layers.{layer}.{linear}"
            made, weight = make(name, shape)
            state |= made
            plain[f"{name}.weight"] = weight.to(dtype)
    for name, shape in rest.items():
        state[name] = plain[name] = torch.randn(shape).to(dtype)
    folder.mkdir(parents=True)
    config = CONFIG | {"dtype": str(dtype).removeprefix("torch."), "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return state, plain
