"""Properties over random sizes, meshes and formats; and an oracle written the dumb way, with chunk and cat."""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import reshard
from reshard.demo import make_model

LLAMA = {"architectures": ["LlamaForCausalLM"], "hidden_size": 16, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "dtype": "bfloat16"}


@st.composite
def models(draw):
    kv = draw(st.integers(1, 4))
    group = draw(st.integers(1, 4))
    return {**LLAMA, "num_key_value_heads": kv, "num_attention_heads": kv * group, "head_dim": draw(st.sampled_from([2, 4, 8])),
            "hidden_size": draw(st.sampled_from([8, 12, 20])), "intermediate_size": draw(st.integers(4, 24)),
            "vocab_size": draw(st.integers(5, 300)), "num_hidden_layers": draw(st.sampled_from([1, 2, 4])),
            "tie_word_embeddings": draw(st.booleans()), "attention_bias": draw(st.booleans()), "mlp_bias": draw(st.booleans())}  # fmt: skip


targets = st.fixed_dictionaries({
    "format": st.sampled_from(["tp", "rank-pt", "vllm", "megatron", "hf"]), "tp": st.integers(1, 8), "pp": st.sampled_from([1, 1, 2]),
})  # fmt: skip


def try_convert(source, destination, target) -> bool:
    """Convert; False where the plan says, before a byte is written, that the format can't cut this model so."""
    try:
        reshard.convert(source, destination, fsync=False, **target)
    except reshard.PlanError:
        assert not destination.exists()
        return False
    return True


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(models(), targets, targets)
def test_there_and_back_and_through_another(config, first, second):
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        make_model(root / "a", config)
        if not try_convert(root / "a", root / "b", first):
            return
        assert reshard.diff(root / "a", root / "b")
        assert try_convert(root / "b", root / "back", {"format": "hf"})
        assert (root / "back/model.safetensors").read_bytes() == (root / "a/model.safetensors").read_bytes()
        if try_convert(root / "a", root / "straight", second):
            assert try_convert(root / "b", root / "through", second)
            files = [p for p in (root / "straight").rglob("*") if p.is_file()]
            for path in files:
                assert path.read_bytes() == (root / "through" / path.relative_to(root / "straight")).read_bytes(), path


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(models(), st.integers(1, 8))
def test_engine_and_megatron_shards_equal_chunk_and_cat(config, tp):
    config = {**config, "tie_word_embeddings": False}
    with tempfile.TemporaryDirectory() as name:
        make_model(Path(name) / "a", config)
        whole = load_file(Path(name) / "a/model.safetensors")
        for format, oracle in (("vllm", vllm_rank), ("megatron", megatron_rank)):
            for rank in range(tp):
                try:
                    state = reshard.load(Path(name) / "a", format=format, tp=tp, rank=rank)
                except reshard.PlanError:
                    assert oracle(whole, config, tp, rank) is None
                    break
                for key, want in oracle(whole, config, tp, rank).items():
                    assert torch.equal(state[key], want), (format, rank, key)


def vllm_rank(whole, config, tp, rank):
    heads, kv, d = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    padded = -(-config["vocab_size"] // 64) * 64
    if heads % tp or (kv % tp and tp % kv) or config["intermediate_size"] % tp or padded % tp:
        return None
    at = "model.layers.0."
    q = whole[at + "self_attn.q_proj.weight"].chunk(tp)[rank]
    k, v = (whole[at + f"self_attn.{x}_proj.weight"] for x in "kv")
    if tp <= kv:
        k, v = k.chunk(tp)[rank], v.chunk(tp)[rank]
    else:
        head = rank // (tp // kv)
        k, v = k[head * d : (head + 1) * d], v[head * d : (head + 1) * d]
    embed = torch.zeros(padded, config["hidden_size"], dtype=torch.bfloat16)
    embed[: config["vocab_size"]] = whole["model.embed_tokens.weight"]
    return {
        at + "self_attn.qkv_proj.weight": torch.cat([q, k, v]),
        at + "self_attn.o_proj.weight": whole[at + "self_attn.o_proj.weight"].chunk(tp, 1)[rank],
        at + "mlp.gate_up_proj.weight": torch.cat([whole[at + f"mlp.{x}_proj.weight"].chunk(tp)[rank] for x in ("gate", "up")]),
        at + "mlp.down_proj.weight": whole[at + "mlp.down_proj.weight"].chunk(tp, 1)[rank],
        "model.embed_tokens.weight": embed.chunk(tp)[rank],
        "model.norm.weight": whole["model.norm.weight"],
    }


def megatron_rank(whole, config, tp, rank):
    heads, kv, d = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    rows = (heads + 2 * kv) * d
    if heads % tp or (kv % tp and tp % kv) or config["intermediate_size"] % tp or rows % tp:
        return None
    at, to = "model.layers.0.", "decoder.layers.0."
    q, k, v = (whole[at + f"self_attn.{x}_proj.weight"].view(kv, -1, d, config["hidden_size"]) for x in "qkv")
    qkv = torch.cat([q, k, v], dim=1).reshape(-1, config["hidden_size"])
    padded = -(-config["vocab_size"] // (128 * tp)) * 128 * tp
    embed = torch.zeros(padded, config["hidden_size"], dtype=torch.bfloat16)
    embed[: config["vocab_size"]] = whole["lm_head.weight"]
    return {
        to + "self_attention.linear_qkv.weight": qkv.chunk(tp)[rank],
        to + "self_attention.linear_proj.weight": whole[at + "self_attn.o_proj.weight"].chunk(tp, 1)[rank],
        to + "mlp.linear_fc1.weight": torch.cat([whole[at + f"mlp.{x}_proj.weight"].chunk(tp)[rank] for x in ("gate", "up")]),
        "output_layer.weight": embed.chunk(tp)[rank],
    }


def test_control_a_wrong_interleave_is_seen(tmp_path):
    """The same comparison with one heads' order broken must fail: q's heads dealt out in another order."""
    config = {**LLAMA, "num_key_value_heads": 2, "num_attention_heads": 4, "head_dim": 4, "hidden_size": 8,
              "intermediate_size": 8, "vocab_size": 64, "num_hidden_layers": 1}  # fmt: skip
    make_model(tmp_path / "a", config)
    whole = load_file(tmp_path / "a/model.safetensors")
    state = reshard.load(tmp_path / "a", format="megatron", tp=2, rank=0)
    key = "decoder.layers.0.self_attention.linear_qkv.weight"
    assert torch.equal(state[key], megatron_rank(whole, config, 2, 0)[key])
    name = "model.layers.0.self_attn.q_proj.weight"
    whole[name] = whole[name].view(4, 4, 8)[[0, 2, 1, 3]].reshape(16, 8)
    assert not torch.equal(state[key], megatron_rank(whole, config, 2, 0)[key])


def test_replicas_that_disagree_are_found(tmp_path):
    config = {**LLAMA, "num_key_value_heads": 2, "num_attention_heads": 8, "head_dim": 4, "intermediate_size": 8, "vocab_size": 64,
              "num_hidden_layers": 1}  # fmt: skip
    make_model(tmp_path / "a", config)
    reshard.convert(tmp_path / "a", tmp_path / "b", format="tp", tp=4)
    assert reshard.diff(tmp_path / "a", tmp_path / "b")
    broken = reshard.open(tmp_path / "b")
    k = next(s for s in broken.stored if s.rank == 1 and "k_proj" in s.name)
    with open(tmp_path / "b" / k.file, "r+b") as file:
        file.seek(k.start)
        file.write(b"\x01\x02")
    try:
        reshard.convert(tmp_path / "b", tmp_path / "c", format="hf")
    except reshard.FormatError as error:
        assert "k_proj" in str(error) and "different values" in str(error)
    else:
        raise AssertionError("a replica that differs went unnoticed")
    assert not (tmp_path / "c").exists()
    report = reshard.diff(tmp_path / "a", tmp_path / "b")
    assert [d.name for d in report.differing] == [k.name]


def test_dtype_cast_rounds_as_torch_does(tmp_path):
    make_model(tmp_path / "a")
    reshard.convert(tmp_path / "a", tmp_path / "wide", format="vllm", tp=3, dtype="fp32")
    assert json.loads((tmp_path / "wide/config.json").read_text())["dtype"] == "float32"
    reshard.convert(tmp_path / "wide", tmp_path / "back", format="hf", dtype="bf16")
    assert (tmp_path / "back/model.safetensors").read_bytes() == (tmp_path / "a/model.safetensors").read_bytes()
    reshard.convert(tmp_path / "a", tmp_path / "half", format="hf", dtype="fp16")
    want = {k: v.to(torch.float16) for k, v in load_file(tmp_path / "a/model.safetensors").items()}
    got = load_file(tmp_path / "half/model.safetensors")
    assert want.keys() == got.keys() and all(torch.equal(want[k], got[k]) for k in want)


def test_load_reads_one_ranks_bytes_only(tmp_path, monkeypatch):
    """1/8 of what is split, and all of what is replicated, counted where the files are read."""
    from reshard import execute

    config = {**LLAMA, "num_key_value_heads": 8, "num_attention_heads": 16, "head_dim": 4, "hidden_size": 64, "intermediate_size": 64,
              "vocab_size": 512, "num_hidden_layers": 2}  # fmt: skip
    make_model(tmp_path / "a", config)
    sources = []
    monkeypatch.setattr(execute, "Source", lambda *args, real=execute.Source: sources.append(real(*args)) or sources[-1])
    reshard.load(tmp_path / "a", format="vllm", tp=8, rank=3)
    whole = load_file(tmp_path / "a/model.safetensors")
    want = sum(t.nbytes if "norm" in name else t.nbytes // 8 for name, t in whole.items())
    assert sources[0].bytes_read == want


def test_random_numbers_differ():
    """The models of these tests would prove nothing if their tensors were alike."""
    with tempfile.TemporaryDirectory() as name:
        make_model(Path(name) / "a")
        state = load_file(Path(name) / "a/model.safetensors")
        sums = {key: float(value.double().sum()) for key, value in state.items()}
        assert len(set(sums.values())) == len(sums) and all(np.isfinite(list(sums.values())))
