"""A side as text, and with the dtypes that its tensors have: what a control plane carries between trainers and engines."""

import json
import random
from dataclasses import fields

import pytest
import torch
from sync_world import LLAMA, QWEN3_MOE, blank, loopback

import reshard
from reshard import sync

LAYOUT, MOE = sync.layout(LLAMA), sync.layout(QWEN3_MOE)
LINEAR = frozenset({"q", "k", "v", "o", "gate", "up", "down"})
SIDES = {
    "megatron": lambda: sync.Side.placed(LAYOUT, "megatron", tp=2, pp=2, ranks=range(8)),
    "experts": lambda: sync.Side.placed(MOE, "vllm", tp=2, ep=2, ranks=(4, 5), dtype="fp16", dtypes={"router": "fp32"}, engine_version="0.11"),
    "fp8": lambda: sync.Side.placed(LAYOUT, "vllm", tp=3, ranks=range(3), fp8=sync.Fp8(LINEAR, edge=8)),
    "fp8 by default": lambda: sync.Side.placed(sync.layout({**LLAMA, "head_dim": 128}), "vllm", ranks=[0], fp8=True),
    "fsdp": lambda: sync.Side.sharded(LAYOUT, sync.fsdp(LAYOUT, dp=2, tp=2, replicas=2, ranks=range(8)), dtype="fp32"),
    "stacked": lambda: sync.Side.sharded(MOE, sync.fsdp(MOE, dp=3, ranks=range(3), variants=["stacked"])),
    "typed": lambda: sync.Side.placed(LAYOUT, "hf", ranks=[7]).typed({"model.norm.weight": "F32"}),
}  # fmt: skip


@pytest.mark.parametrize("name", SIDES)
def test_a_side_comes_back_from_its_text_as_it_was(name):
    side = SIDES[name]()
    text = side.to_json()
    again = sync.Side.from_json(text)
    for field in fields(side):
        if field.name not in ("layout", "recipe"):
            assert getattr(again, field.name) == getattr(side, field.name), field.name
    assert again.to_json() == text and len(text) < 12_000, "not the tensors: what they are made from"
    other = sync.Side.placed(side.layout, "hf", ranks=[20])
    if name != "fp8" and name != "fp8 by default":
        assert sync.plan(again, other).fingerprint == sync.plan(side, other).fingerprint


def test_texts_of_unlike_sides_differ():
    """The control of the test above: each argument reaches the text."""
    variants = [{}, {"tp": 2, "ranks": range(2)}, {"ranks": [1]}, {"dtype": "fp32"}, {"dtypes": {"norm": "fp32"}}, {"fp8": True}]
    texts = [sync.Side.placed(LAYOUT, "vllm", **{"ranks": [0], **options}).to_json() for options in variants]
    texts.append(sync.Side.placed(sync.layout({**LLAMA, "vocab_size": 384}), "vllm", ranks=[0]).to_json())
    assert len(set(texts)) == len(texts)


def test_what_has_no_text_is_refused_and_so_is_a_text_that_is_none(tmp_path):
    adapter = sync.adapter(LAYOUT, 4)
    with pytest.raises(reshard.PlanError, match="has no JSON form"):
        sync.Side.placed(adapter, "hf", ranks=[0]).to_json()
    chosen = sync.plan(SIDES["megatron"](), sync.Side.placed(LAYOUT, "hf", ranks=[8]), select=lambda key: key[0] == "q")
    with pytest.raises(reshard.PlanError, match="has no JSON form"):
        chosen.source.to_json()
    good = json.loads(SIDES["fsdp"]().to_json())
    rng = random.Random(0)
    for _ in range(150):
        bad = json.loads(json.dumps(good))
        at = bad if rng.random() < 0.4 else bad["sharded"] if rng.random() < 0.7 else bad["sharded"]["shardings"][0]
        key = rng.choice(list(at))
        at[key] = rng.choice([None, -1, "../../etc/passwd", [], {}, [[]], 1.5, {"a": 1}])
        try:
            sync.Side.from_json(json.dumps(bad))
        except reshard.ReshardError:
            pass
    for text in ("", "[]", "null", "{}", '{"reshard side": 2}', "[" * 100_000):
        with pytest.raises(reshard.PlanError, match="this is no side's JSON"):
            sync.Side.from_json(text)


def test_a_layout_of_ones_own_is_named_and_must_be_given_at_the_other_end(tmp_path):
    own = tmp_path / "mine.toml"
    own.write_text('extends = "llama"\narchitectures = ["LlamaForCausalLM"]\n')
    text = sync.Side.placed(sync.layout(LLAMA, own), "vllm", tp=2, ranks=range(2)).to_json()
    with pytest.raises(reshard.PlanError, match="layout mine is not one of reshard's"):
        sync.Side.from_json(text)
    assert sync.Side.from_json(text, own).to_json() == text


def test_dtypes_are_read_from_the_tensors():
    src, dst = sync.Side.placed(LAYOUT, "hf", ranks=[0]), sync.Side.placed(LAYOUT, "vllm", tp=2, ranks=(1, 2))
    held = {n: t.float() if "norm" in n else t.half() for n, t in blank(src, 0).items()}
    into = {r: {n: t.float() if n == "lm_head.weight" else t for n, t in blank(dst, r).items()} for r in (1, 2)}
    for tensor in held.values():
        tensor.normal_(generator=torch.Generator().manual_seed(3))
    with pytest.raises(reshard.PlanError, match="dtype F16, expected BF16"):
        loopback(sync.plan(src, dst), {0: held}, into)
    typed = src.typed(sync.dtypes(held)), dst.typed({**sync.dtypes(into[1]), **sync.dtypes(into[2])})
    assert {s.dtype for s in typed[0].members[0]} == {"F16", "F32"}
    loopback(sync.plan(*typed), {0: held}, into)
    assert torch.equal(into[2]["lm_head.weight"], held["lm_head.weight"][96:].float())
    assert torch.equal(into[1]["model.norm.weight"], held["model.norm.weight"].bfloat16())
    again = [sync.Side.from_json(side.to_json()) for side in typed]
    assert sync.plan(*again).fingerprint == sync.plan(*typed).fingerprint != sync.plan(src, dst).fingerprint
    with pytest.raises(reshard.PlanError, match="has none of the tensors whose dtypes are given"):
        dst.typed(sync.dtypes({"decoder.final_layernorm.weight": torch.zeros(1)}))
