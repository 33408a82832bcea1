"""Rank permutation: merged with ranks permuted, every family's shards must compute what the original computes.

It judges the descriptors' cuts with nothing of ours but the merge: transformers runs both models.
"""

import json
from pathlib import Path

import pytest

import reshard
from reshard.errors import FormatError

pytestmark = pytest.mark.samples
SAMPLES = Path(__file__).parents[2] / "shared" / "samples"
FAMILIES = ("llama", "llama-oddvocab", "llama-tied", "qwen2", "qwen3", "phi3", "gpt_neox", "gpt_oss", "qwen3_moe", "mixtral", "deepseek_v3")
CASES = (("tp", 2), ("vllm", 8), ("sglang", 4), ("megatron", 8))


def verify(folder: Path, reference: Path, **options):
    from reshard.verify import verify as run

    return run(folder, reference=reference, method="permute", device="cpu", **options)


def test_ranks_that_share_a_key_head_stay_together():
    from reshard.verify.permute import permuted_order

    assert permuted_order(2, 4) == [1, 0]
    assert permuted_order(4, 4) == [3, 2, 1, 0]
    assert permuted_order(8, 4) == [6, 7, 4, 5, 2, 3, 0, 1]
    assert permuted_order(3, 3) == [2, 1, 0]


@pytest.mark.models
@pytest.mark.parametrize("family", FAMILIES)
def test_every_descriptor_cuts_on_heads_and_columns(family, tmp_path):
    described = {format for format, _ in CASES} - ({"sglang", "megatron"} if family == "gpt_neox" else set())
    for format, tp in CASES:
        if format in described:
            reshard.convert(SAMPLES / "hf" / family, tmp_path / format, format=format, tp=tp, fsync=False)
            report = verify(tmp_path / format, SAMPLES / "hf" / family, format=format)
            assert report.passed, (format, report.describe())
            assert report.shards.figures.relative <= 1e-4
            assert len(report.controls) == 1 and not report.controls[0].figures.passed


@pytest.mark.models
@pytest.mark.parametrize("name, family", [("llama-tp2", "llama"), ("phi3-tp2", "phi3"), ("llama-kv2-tp4", "llama-kv2")])
def test_engines_own_files(name, family):
    assert verify(SAMPLES / "vllm" / name, SAMPLES / "vllm/hf" / family).passed


@pytest.mark.models
@pytest.mark.parametrize(
    ("family", "wrong"),
    [
        ("phi3", 'qkv = { name = ".qkv_proj.weight", of = "q k v", cut = "whole" }'),  # a plain chunk of queries, keys, values
        ("phi3", 'gate_up = { name = ".gate_up_proj.weight", of = "gate up", cut = "whole" }'),
        # halves, not alternate rows
        ("gpt_oss", 'expert_gate_up = { name = ".experts.gate_up_proj", of = "expert_gate expert_up", dims = "hidden moe_ffn" }'),
        ("gpt_neox", 'qkv = { name = ".query_key_value.weight", of = "q k v" }'),
    ],
)
def test_a_wrong_rule_is_found(family, wrong, tmp_path):
    """Wrong in both directions: the way there and back is the identity, and diff sees nothing; the permuted model is another."""
    layout, source = tmp_path / "wrong.toml", SAMPLES / "hf" / family
    architecture = json.loads((source / "config.json").read_text())["architectures"][0]
    layout.write_text(f'extends = "{family}"\narchitectures = ["{architecture}"]\n[hf]\n{wrong}\n')
    reshard.convert(source, tmp_path / "out", format="tp", tp=2, layout=layout, fsync=False)
    assert reshard.diff(source, tmp_path / "out", layout=layout)
    assert not verify(tmp_path / "out", source, layout=layout).shards.figures.passed


@pytest.mark.models
def test_nothing_to_permute_is_said(tmp_path):
    source = SAMPLES / "hf" / "llama"
    with pytest.raises(FormatError, match="one tensor-parallel rank"):
        verify(source, source)
    reshard.convert(source, tmp_path / "tp3", format="tp", tp=3, fsync=False)
    with pytest.raises(FormatError, match="ranks that hold unlike pieces") as error:
        verify(tmp_path / "tp3", source)
    assert "--method tp" in error.value.hint and "reshard diff" in error.value.hint


@pytest.mark.models
def test_without_a_planted_defect_nothing_is_proved(tmp_path, monkeypatch):
    """defects.md, tests: permute passed with zero controls"""
    from reshard.verify import permute

    reshard.convert(SAMPLES / "hf/llama", tmp_path / "out", format="tp", tp=2, fsync=False)
    monkeypatch.setattr(permute, "left_in_order", lambda checkpoint: None)
    report = verify(tmp_path / "out", SAMPLES / "hf/llama")
    assert report.shards.passed and not report.controls
    assert (
        not report
        and not report.to_json()["passed"]
        and report.verdict().startswith("INCONCLUSIVE: logits agree, but no defect could be planted")
    )


@pytest.mark.models
def test_a_layer_without_a_tensor_cut_by_input_still_gets_its_defect(tmp_path):
    """The middle layer's row-parallel tensors held whole by a descriptor: another cut tensor is left in order."""
    layout = tmp_path / "whole.toml"
    whole = 'o = "hidden (kv group half pair)"\ndown = "hidden ffn"\n'
    layout.write_text(f'extends = "llama"\narchitectures = ["LlamaForCausalLM"]\n[tensors]\n{whole}')
    reshard.convert(SAMPLES / "hf/llama", tmp_path / "out", format="tp", tp=2, layout=layout, fsync=False)
    report = verify(tmp_path / "out", SAMPLES / "hf/llama", layout=layout)
    assert len(report.controls) == 1 and "left in order" in report.controls[0].name


@pytest.mark.models
def test_settings_and_what_was_left_open_are_in_this_verdict_too(tmp_path):
    """defects.md D10, E14"""
    reshard.convert(SAMPLES / "hf/llama", tmp_path / "out", format="tp", tp=2, fsync=False)
    config = json.loads((tmp_path / "out/config.json").read_text())
    (tmp_path / "out/config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    report = verify(tmp_path / "out", SAMPLES / "hf/llama")
    assert report.shards.passed and not report and "max_position_embeddings is 64" in report.verdict()
    assert any("--method tp" in text for text in report.unexercised)
