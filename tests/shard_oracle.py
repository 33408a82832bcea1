"""What one tensor-parallel rank of vLLM and of Megatron-LM holds, cut out of the Hugging Face tensors with chunk and cat.

No descriptor, no box: written from the engines' own code, tensor by tensor, for all families.
"""

import torch


def parts(family, config, state, layer):
    """One layer's matrices, unfused: attention's, and the MLP's or each expert's, by short names."""
    at = f"model.layers.{layer}."
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    get = {key.removeprefix(at).removesuffix(".weight"): tensor for key, tensor in state.items() if key.startswith(at)}
    out = {}
    if family == "phi3":
        d = config["head_dim"]
        out["q"], out["k"], out["v"] = get["self_attn.qkv_proj"].split([heads * d, kv * d, kv * d])
        out["gate"], out["up"] = get["mlp.gate_up_proj"].chunk(2)
    for x in "qkv":
        for word, end in (("", ""), ("_bias", ".bias")):
            if f"self_attn.{x}_proj{end}" in get:
                out[x + word] = get[f"self_attn.{x}_proj{end}"]
    for name in ("q_b", "kv_b"):
        if f"self_attn.{name}_proj" in get:
            out[name] = get[f"self_attn.{name}_proj"]
    out["o"] = get["self_attn.o_proj"]
    for x in ("gate", "up", "down"):
        for prefix, name in (("mlp.", x), ("mlp.shared_experts.", f"shared_{x}")):
            if f"{prefix}{x}_proj" in get:
                out[name] = get[f"{prefix}{x}_proj"]
            if f"{prefix}{x}_proj.bias" in get:
                out[f"{name}_bias"] = get[f"{prefix}{x}_proj.bias"]
    for x, own in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
        names = [f"block_sparse_moe.experts.{{}}.{own}", f"mlp.experts.{{}}.{x}_proj"]
        found = [[get[name.format(e)] for e in range(64) if name.format(e) in get] for name in names]
        if any(found):
            out[f"experts_{x}"] = found[0] or found[1]
    if family == "gpt_oss":
        fused, bias = get["mlp.experts.gate_up_proj"], get["mlp.experts.gate_up_proj_bias"]
        out |= {
            "experts_gate": list(fused[..., ::2].mT),
            "experts_up": list(fused[..., 1::2].mT),
            "experts_down": list(get["mlp.experts.down_proj"].mT),
        }
        out |= {"experts_gate_bias": list(bias[:, ::2]), "experts_up_bias": list(bias[:, 1::2]), "sinks": get["self_attn.sinks"]}
    return out


def padded(tensor, multiple):
    rows = -(-len(tensor) // multiple) * multiple
    return torch.cat([tensor, torch.zeros(rows - len(tensor), tensor.shape[1], dtype=tensor.dtype)])


def embeddings(family, config, state):
    names = ("gpt_neox.embed_in.weight", "embed_out.weight") if family == "gpt_neox" else ("model.embed_tokens.weight", "lm_head.weight")
    return state[names[0]], state[names[0] if config.get("tie_word_embeddings") else names[1]]


def vllm_rank(family, config, state, tp, rank):
    kv = config["num_key_value_heads"]

    def rows(tensor):
        return tensor.chunk(tp)[rank]

    def columns(tensor):
        return tensor.chunk(tp, 1)[rank]

    def kv_rows(tensor):  # with more ranks than heads, each is held by several
        return rows(tensor) if tp <= kv else tensor.chunk(kv)[rank // (tp // kv)]

    embed, head = embeddings(family, config, state)
    out = {"lm_head.weight": rows(padded(head, 64))}
    if not config.get("tie_word_embeddings"):
        name = {"gpt_oss": "model.embedding.weight", "gpt_neox": "model.embed_in.weight"}.get(family, "model.embed_tokens.weight")
        out[name] = rows(padded(embed, 64))
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        if family == "gpt_neox":
            for name, cut in (
                ("attention.query_key_value", rows),
                ("mlp.dense_h_to_4h", rows),
                ("attention.dense", columns),
                ("mlp.dense_4h_to_h", columns),
            ):
                out[f"{at}{name}.weight"] = cut(state[f"gpt_neox.layers.{layer}.{name}.weight"])
                if cut is rows and f"gpt_neox.layers.{layer}.{name}.bias" in state:
                    out[f"{at}{name}.bias"] = rows(state[f"gpt_neox.layers.{layer}.{name}.bias"])
            continue
        p = parts(family, config, state, layer)
        attn = at + ("attn." if family == "gpt_oss" else "self_attn.")
        if family == "deepseek_v3":
            for name, short in (("mla_attn.q_proj", "q"), ("mla_attn.q_b_proj", "q_b"), ("kv_b_proj", "kv_b")):
                if short in p:
                    out[f"{attn}{name}.weight"] = rows(p[short])
            out[f"{attn}mla_attn.o_proj.weight"] = columns(p["o"])
            own = f"model.layers.{layer}.self_attn."
            if "q_b" in p:
                out[f"{attn}fused_qkv_a_proj.weight"] = torch.cat(
                    [state[own + "q_a_proj.weight"], state[own + "kv_a_proj_with_mqa.weight"]]
                )
        else:
            for word, end in (("", "weight"), ("_bias", "bias")):
                if "q" + word in p:
                    out[f"{attn}qkv_proj.{end}"] = torch.cat([rows(p["q" + word]), kv_rows(p["k" + word]), kv_rows(p["v" + word])])
            out[f"{attn}o_proj.weight"] = columns(p["o"])
        if "sinks" in p:
            out[f"{attn}sinks"] = rows(p["sinks"])
        shared = "mlp.experts._shared_experts._layer."
        for prefix, gate, up, down in (("mlp.", "gate", "up", "down"), (shared, "shared_gate", "shared_up", "shared_down")):
            for word, end in (("", "weight"), ("_bias", "bias")):
                if gate + word in p:
                    out[f"{at}{prefix}gate_up_proj.{end}"] = torch.cat([rows(p[gate + word]), rows(p[up + word])])
            if down in p:
                out[f"{at}{prefix}down_proj.weight"] = columns(p[down])
        if "experts_gate" in p:
            experts = at + ("block_sparse_moe" if family == "mixtral" else "mlp") + ".experts.routed_experts."
            pairs = [(rows(gate), rows(up)) for gate, up in zip(p["experts_gate"], p["experts_up"])]
            if family == "gpt_oss":  # on alternate rows, as in the file
                w13 = torch.stack([torch.stack(pair, 1).flatten(0, 1) for pair in pairs])
                biases = [(rows(gate), rows(up)) for gate, up in zip(p["experts_gate_bias"], p["experts_up_bias"])]
                out[experts + "w13_bias"] = torch.stack([torch.stack(pair, 1).flatten() for pair in biases])
                own = state[f"model.layers.{layer}.mlp.experts.down_proj_bias"]
                out[experts + "w2_bias"] = own if rank == 0 else torch.zeros_like(own)
            else:
                w13 = torch.stack([torch.cat(pair) for pair in pairs])
            out[experts + "w13_weight"] = w13
            out[experts + "w2_weight"] = torch.stack([columns(down) for down in p["experts_down"]])
    return out


def megatron_rank(family, config, state, tp, rank):
    kv = config["num_key_value_heads"]

    def rows(tensor):
        return tensor.chunk(tp)[rank]

    def columns(tensor):
        return tensor.chunk(tp, 1)[rank]

    embed, head = embeddings(family, config, state)
    out = {"embedding.word_embeddings.weight": rows(padded(embed, 128 * tp))}
    if not config.get("tie_word_embeddings"):
        out["output_layer.weight"] = rows(padded(head, 128 * tp))
    for layer in range(config["num_hidden_layers"]):
        p, to = parts(family, config, state, layer), f"decoder.layers.{layer}."
        attn = to + "self_attention."
        if family == "deepseek_v3":
            for name, short in (("linear_q_proj", "q"), ("linear_q_up_proj", "q_b"), ("linear_kv_up_proj", "kv_b")):
                if short in p:
                    out[f"{attn}{name}.weight"] = rows(p[short])
        else:  # for each key/value head: its queries, its key, its value; then a plain chunk
            for word, end in (("", "weight"), ("_bias", "bias")):
                if "q" + word in p:
                    groups = [p[x + word].unflatten(0, (kv, -1)) for x in "qkv"]
                    out[f"{attn}linear_qkv.{end}"] = rows(torch.cat(groups, 1).flatten(0, 1))
        out[f"{attn}linear_proj.weight"] = columns(p["o"])
        if "sinks" in p:
            out[f"{attn}core_attention.softmax_offset"] = rows(p["sinks"])
        for prefix, gate, up, down in (("mlp.", "gate", "up", "down"), ("mlp.shared_experts.", "shared_gate", "shared_up", "shared_down")):
            for word, end in (("", "weight"), ("_bias", "bias")):
                if gate + word in p:
                    out[f"{to}{prefix}linear_fc1.{end}"] = torch.cat([rows(p[gate + word]), rows(p[up + word])])
            if down in p:
                out[f"{to}{prefix}linear_fc2.weight"] = columns(p[down])
        for e, down in enumerate(p.get("experts_down", ())):
            out[f"{to}mlp.experts.linear_fc1.weight{e}"] = torch.cat([rows(p["experts_gate"][e]), rows(p["experts_up"][e])])
            out[f"{to}mlp.experts.linear_fc2.weight{e}"] = columns(down)
            if "experts_gate_bias" in p:
                out[f"{to}mlp.experts.linear_fc1.bias{e}"] = torch.cat([rows(p["experts_gate_bias"][e]), rows(p["experts_up_bias"][e])])
                out[f"{to}mlp.experts.linear_fc2.bias{e}"] = state[f"model.layers.{layer}.mlp.experts.down_proj_bias"][e]
    return out


ORACLES = {"vllm": vllm_rank, "megatron": megatron_rank}
