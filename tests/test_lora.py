"""LoRA adapters: merged as the formula says, put into every format, cut and put together; PEFT itself is asked by scripts/check_frameworks.py."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import reshard
from reshard.cli import main
from reshard.executor import compute

SAMPLES = Path(__file__).parents[2] / "shared" / "samples"
RNG = np.random.default_rng(0)
P = "base_model.model.model.layers."
#: without experts, with fused targets, by Conv1D's and the like's own orders
GENUINE = [("llama-linear-r8", "llama"), ("phi3-r8", "phi3")]


def adapter(folder: Path, factors: dict[str, tuple[int, ...]], **settings) -> dict[str, np.ndarray]:
    """An adapter of random numbers under PEFT's names; its tensors."""
    folder.mkdir()
    tensors = {name: RNG.normal(0, 0.1, shape).astype(np.float32) for name, shape in factors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 12} | settings))
    return tensors


def linear(layer: int, module: str, rank: int, out: int, inner: int) -> dict[str, tuple[int, ...]]:
    stem = f"{P}{layer}.{module}"
    return {f"{stem}.lora_A.weight": (rank, inner), f"{stem}.lora_B.weight": (out, rank)}


@pytest.mark.samples
@pytest.mark.models
@pytest.mark.parametrize("name, base", GENUINE)
def test_genuine_adapters_merged_give_their_own_logits(tmp_path, name, base):
    import torch
    from safetensors.torch import load_file as load
    from transformers import AutoModelForCausalLM

    original = SAMPLES / "hf" / base
    main_ok("merge", original, SAMPLES / "lora" / name, tmp_path / "out", "--to", "hf", "-q")
    reference = load(SAMPLES / "lora" / name / "reference.safetensors.ref")
    off = []
    for folder in (tmp_path / "out", original):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        with torch.no_grad():
            off.append(float((model(reference["input_ids"]).logits - reference["logits"]).abs().max()))
    assert off[0] < 1e-5 and off[1] > 0.1  # the control: the base's logits are others


def main_ok(*args) -> None:
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, args)))
    assert ended.value.code == 0


@pytest.mark.samples
def test_ranks_and_scales_differ_from_layer_to_layer(tmp_path, monkeypatch):
    """By pattern, rsLoRA; layers without an adapter are copied; tiles smaller than a row's head."""
    monkeypatch.setattr(compute, "ELEMENTS", 700)
    base = load_file(SAMPLES / "hf/llama/model.safetensors")
    factors = (
        linear(0, "self_attn.q_proj", 6, 128, 64) | linear(1, "self_attn.q_proj", 4, 128, 64) | linear(1, "self_attn.o_proj", 4, 64, 128)
    )
    held = adapter(tmp_path / "a", factors, rank_pattern={r"layers\.0\.self_attn\.q_proj": 6}, alpha_pattern={"o_proj": 3}, use_rslora=True)
    strength = {(0, "q_proj"): 12 / 6**0.5, (1, "q_proj"): 12 / 2, (1, "o_proj"): 3 / 2}
    for (layer, word), scale in strength.items():
        a, b = (held[f"{P}{layer}.self_attn.{word}.lora_{letter}.weight"] for letter in "AB")
        base[f"model.layers.{layer}.self_attn.{word}.weight"] += np.float32(scale) * (b @ a)
    reshard.convert(SAMPLES / "hf/llama", tmp_path / "out", format="hf", adapter=tmp_path / "a")
    found = load_file(tmp_path / "out/model.safetensors")
    assert found.keys() == base.keys()
    for name, want in base.items():
        np.testing.assert_allclose(found[name], want, rtol=0, atol=2e-6, err_msg=name)
    plain = load_file(SAMPLES / "hf/llama/model.safetensors")
    assert sum(np.array_equal(found[n], plain[n]) for n in plain) == len(plain) - 3


@pytest.mark.samples
@pytest.mark.parametrize("family, transposed", [("qwen3_moe", False), ("gpt_oss", True)])
def test_stacked_experts_are_unpacked_as_peft_packs_them(tmp_path, family, transposed):
    """A has the expert slowest, B fastest; the last parameter of the module is wrapped outermost."""
    original = SAMPLES / "hf" / family
    config = json.loads((original / "config.json").read_text())
    experts, hidden = config.get("num_experts") or config["num_local_experts"], config["hidden_size"]
    ffn, rank = config.get("moe_intermediate_size") or config["intermediate_size"], 4
    factors = {}
    for outer, out, inner in ((".base_layer", 2 * ffn, hidden), ("", hidden, ffn)):
        factors[f"{P}1.mlp.experts{outer}.lora_A.weight"] = (rank * experts, inner)
        factors[f"{P}1.mlp.experts{outer}.lora_B.weight"] = (out, rank * experts)
    held = adapter(tmp_path / "a", factors, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    reshard.convert(original, tmp_path / "out", format="transformers", adapter=tmp_path / "a", dtype="fp32")
    reshard.convert(original, tmp_path / "plain", format="transformers", dtype="fp32")
    found, plain = (
        {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()} for folder in (tmp_path / "out", tmp_path / "plain")
    )
    for outer, word in ((".base_layer", "gate_up_proj"), ("", "down_proj")):
        a, b = (held[f"{P}1.mlp.experts{outer}.lora_{letter}.weight"] for letter in "AB")
        update = np.stack([3 * sum(np.outer(b[:, r * experts + e], a[e * rank + r]) for r in range(rank)) for e in range(experts)])
        want = plain.pop(f"model.layers.1.mlp.experts.{word}") + (update.transpose(0, 2, 1) if transposed else update)
        np.testing.assert_allclose(found.pop(f"model.layers.1.mlp.experts.{word}"), want, rtol=0, atol=2e-6)
    assert found.keys() == plain.keys() and all(np.array_equal(found[n], plain[n]) for n in plain)


@pytest.mark.samples
@pytest.mark.parametrize(
    "target", [("vllm", {"tp": 2}), ("megatron", {"tp": 2, "pp": 2}), ("tp", {"tp": 3}), ("dcp", {"tp": 3})], ids=lambda t: t[0]
)
def test_a_merge_into_any_format_is_the_merged_model_there(tmp_path, target):
    """Fused and cut: no element of it depends on where its rows were computed."""
    format, mesh = target
    source, own = SAMPLES / "hf/llama", SAMPLES / "lora/llama-linear-r8"
    reshard.convert(source, tmp_path / "hf", format="hf", adapter=own)
    reshard.convert(source, tmp_path / "direct", format=format, adapter=own, **mesh)
    report = reshard.diff(tmp_path / "hf", tmp_path / "direct", atol=1e-6)
    assert report and report.tensors == 21
    assert not reshard.diff(source, tmp_path / "direct", atol=1e-2)  # the control
    if format == "vllm":
        state = reshard.load(source, adapter=own, format=format, rank=1, **mesh)
        assert any("qkv_proj" in name for name in state)


@pytest.mark.samples
@pytest.mark.parametrize("name, base", GENUINE)
def test_an_adapter_is_cut_as_its_base_and_comes_back(tmp_path, name, base):
    """B goes with the rows of a column-parallel weight, A with the columns of a row-parallel one; the other is on every rank."""
    own, config = SAMPLES / "lora" / name, SAMPLES / "hf" / base
    whole = load_file(own / "adapter_model.safetensors")
    reshard.convert(reshard.open(own, config=config), tmp_path / "tp", format="tp", tp=2)
    ranks = [load_file(tmp_path / f"tp/shard-0000{rank + 1}-model-00001-of-00001.safetensors") for rank in range(2)]
    down = f"{P}0.mlp.down_proj.lora_"
    for rank, held in enumerate(ranks):
        assert np.array_equal(held[f"{down}A.weight"], np.split(whole[f"{down}A.weight"], 2, 1)[rank])
        assert np.array_equal(held[f"{down}B.weight"], whole[f"{down}B.weight"])
    if name == "phi3-r8":  # each of query, key and value is cut by itself
        at, sizes = f"{P}0.self_attn.qkv_proj.lora_B.weight", (128, 64, 64)
        parts = np.split(whole[at], np.cumsum(sizes)[:-1])
        for rank, held in enumerate(ranks):
            assert np.array_equal(held[at], np.concatenate([np.split(part, 2)[rank] for part in parts]))
    before = tmp_path / "tp"
    for format, tp in (("dcp", 3), ("tp", 4), ("peft", 1)):
        reshard.convert(reshard.open(before, config=config), tmp_path / f"{format}{tp}", format=format, tp=tp)
        before = tmp_path / f"{format}{tp}"
        assert (before / "adapter_config.json").read_bytes() == (own / "adapter_config.json").read_bytes()
        assert not (before / "config.json").exists()
    found = load_file(before / "adapter_model.safetensors")
    assert found.keys() == whole.keys() and all(np.array_equal(found[n], whole[n]) for n in whole)


@pytest.mark.samples
def test_what_is_no_plain_lora_is_refused_by_name(tmp_path, capsys):
    base = SAMPLES / "hf/llama"
    good = linear(0, "self_attn.q_proj", 4, 128, 64)
    cases = [
        ({"use_dora": True}, good, "DoRA"),
        ({"peft_type": "LOHA"}, good, "type LOHA"),
        ({"init_lora_weights": "pissa_niter_4"}, good, "pissa_niter_4"),
        ({"r": 8}, good, r"shape [4, 64], expected [8, 64]"),
        ({"rank_pattern": {"(a+)+$": 4}}, good, "as a pattern"),
        ({"lora_alpha": "12"}, good, "lora_alpha is '12'"),
        ({}, {k: v for k, v in good.items() if "lora_A" in k}, "lora_B.weight is missing"),
        ({}, linear(0, "self_attn.z_proj", 4, 128, 64), "none of its 2 tensors"),
        ({}, good | linear(7, "self_attn.q_proj", 4, 128, 64), "is not in layout llama"),
        ({}, good | {"base_model.model.lm_head.weight": (300, 64)}, "shape [300, 64], expected [320, 64]"),
    ]
    for number, (settings, factors, told) in enumerate(cases):
        adapter(tmp_path / str(number), factors, **settings)
        with pytest.raises(reshard.ReshardError) as error:
            reshard.plan(base, format="hf", adapter=tmp_path / str(number))
        assert told in str(error.value), (told, str(error.value))
    tied = adapter(tmp_path / "tied", good | {"base_model.model.model.embed_tokens.weight": (320, 64)})
    assert tied
    with pytest.raises(reshard.ReshardError, match="one tensor for input and output embedding"):
        reshard.plan(SAMPLES / "hf/llama-tied", format="hf", adapter=tmp_path / "tied")
    for folder, format, told in ((SAMPLES / "lora/llama-linear-r8", "vllm", "reshard merge"), (base, "peft", "--to hf")):
        with pytest.raises(reshard.PlanError) as error:
            reshard.plan(reshard.open(folder, config=base), format=format)
        assert told in error.value.hint
    alone = shutil.copytree(SAMPLES / "lora/phi3-r8", tmp_path / "alone")
    with pytest.raises(reshard.ReshardError, match="lies in the destination, which would be replaced"):
        reshard.convert(SAMPLES / "hf/phi3", alone, format="hf", adapter=alone, overwrite=True)
    (alone / "adapter_config.json").unlink()
    with pytest.raises(reshard.FormatError, match="no adapter_config.json, which tells their scale"):
        reshard.plan(SAMPLES / "hf/phi3", format="hf", adapter=alone)
    with pytest.raises(reshard.FormatError, match="no LoRA adapter"):
        reshard.plan(base, format="hf", adapter=base)
    with pytest.raises(reshard.PlanError, match="cannot take an update"):
        reshard.plan(SAMPLES / "hf/deepseek_v3-fp8", format="hf", adapter=SAMPLES / "lora/llama-linear-r8")


@pytest.mark.samples
def test_what_is_saved_whole_takes_the_bases_place_and_is_told(tmp_path, capsys):
    held = adapter(tmp_path / "a", linear(1, "mlp.up_proj", 4, 160, 64) | {"base_model.model.lm_head.weight": (320, 64)})
    main_ok("merge", SAMPLES / "hf/llama", tmp_path / "a", tmp_path / "out", "--to", "hf")
    assert "rank 4, scale 3) into 1 tensor; taken from it as they are: 1 tensor (lm_head)" in capsys.readouterr().out
    found = load_file(tmp_path / "out/model.safetensors")
    assert np.array_equal(found["lm_head.weight"], held["base_model.model.lm_head.weight"])
    assert not (tmp_path / "out/adapter_config.json").exists()


@pytest.mark.samples
def test_another_scale_is_another_conversion(tmp_path):
    """The fingerprint tells merges apart that read the same bytes."""
    from reshard.conversion.fingerprint import fingerprint

    base = SAMPLES / "hf/llama"
    shutil.copytree(SAMPLES / "lora/llama-linear-r8", tmp_path / "a")
    one = fingerprint(reshard.plan(base, format="hf", adapter=tmp_path / "a"))
    assert fingerprint(reshard.plan(base, format="hf", adapter=tmp_path / "a")) == one
    config = tmp_path / "a/adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 16', '"lora_alpha": 17'))
    assert fingerprint(reshard.plan(base, format="hf", adapter=tmp_path / "a")) != one
