"""Weights into FP8 codes and scales by the published formula, and scales repeated on finer blocks where a cut misses them."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from quantised_cases import CONFIG, write
from safetensors.torch import load_file, save_file

from reshard import api
from reshard.cli import cli
from reshard.errors import PlanError


def published(weight):
    """Codes and scales of blocks of 128 × 128 as DeepGEMM's and vLLM's per_block_cast_to_fp8 compute them."""
    rows, columns = weight.shape
    tiles = torch.nn.functional.pad(weight, (0, -columns % 128, 0, -rows % 128)).view(-(-rows // 128), 128, -(-columns // 128), 128)
    scale = tiles.abs().float().amax((1, 3), keepdim=True).clamp(1e-4) / 448.0
    codes = (tiles * (1.0 / scale)).to(torch.float8_e4m3fn).view(tiles.shape[0] * 128, -1)[:rows, :columns].contiguous()
    return codes, scale.view(tiles.shape[0], tiles.shape[2])


def equal(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


def tensors(folder):
    return {name: t for path in sorted(Path(folder).glob("*.safetensors")) for name, t in load_file(path).items()}


def model(folder, **config):
    """A model in bf16 with random weights, whose heads (48, 80) end inside blocks; ffn is no multiple of a block."""
    torch.manual_seed(3)
    config = CONFIG | {"dtype": "bfloat16", "num_hidden_layers": 1, "hidden_size": 320, "intermediate_size": 512} | config
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    hidden, head = config["hidden_size"], config["head_dim"]
    at = "model.layers.0."
    shapes = {"model.embed_tokens.weight": (64, hidden), "lm_head.weight": (64, hidden), "model.norm.weight": (hidden,),
              f"{at}input_layernorm.weight": (hidden,), f"{at}post_attention_layernorm.weight": (hidden,),
              f"{at}self_attn.q_proj.weight": (8 * head, hidden), f"{at}self_attn.k_proj.weight": (4 * head, hidden),
              f"{at}self_attn.v_proj.weight": (4 * head, hidden), f"{at}self_attn.o_proj.weight": (hidden, 8 * head)}  # fmt: skip
    if experts := config.get("num_experts"):
        ffn = config["moe_intermediate_size"]
        shapes |= {
            f"{at}mlp.gate.weight": (experts, hidden),
            f"{at}self_attn.q_norm.weight": (head,),
            f"{at}self_attn.k_norm.weight": (head,),
        }
        for expert in range(experts):
            mlp = f"{at}mlp.experts.{expert}."
            shapes |= {
                f"{mlp}gate_proj.weight": (ffn, hidden),
                f"{mlp}up_proj.weight": (ffn, hidden),
                f"{mlp}down_proj.weight": (hidden, ffn),
            }
    else:
        ffn = config["intermediate_size"]
        shapes |= {
            f"{at}mlp.gate_proj.weight": (ffn, hidden),
            f"{at}mlp.up_proj.weight": (ffn, hidden),
            f"{at}mlp.down_proj.weight": (hidden, ffn),
        }
    state = {
        name: (torch.randn(shape) * torch.rand(shape[0]).view(-1, *[1] * (len(shape) - 1))).bfloat16() for name, shape in shapes.items()
    }
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return state


@pytest.mark.parametrize("head", [32, 48, 80])
def test_codes_and_scales_are_the_published_ones(tmp_path, monkeypatch, head):
    monkeypatch.setattr("reshard.executor.compute.ELEMENTS", 20_000)  # many tiles: blocks must stay whole
    state = model(tmp_path / "bf16", head_dim=head)
    state["model.layers.0.mlp.up_proj.weight"][:130, :130] = 0
    save_file(state, tmp_path / "bf16/model.safetensors", {"format": "pt"})
    api.convert(tmp_path / "bf16", tmp_path / "fp8", format="hf", quantise="fp8")
    made, expected = tensors(tmp_path / "fp8"), {}
    for name, weight in state.items():
        if "_proj" in name:
            expected[name], expected[f"{name}_scale_inv"] = published(weight)
        else:
            expected[name] = weight
    assert made.keys() == expected.keys()
    assert [name for name in made if not equal(made[name], expected[name])] == []
    told = json.loads((tmp_path / "fp8/config.json").read_text())["quantization_config"]
    assert told["modules_to_not_convert"] == ["lm_head", "model.embed_tokens"] and told["weight_block_size"] == [128, 128]
    api.convert(tmp_path / "fp8", tmp_path / "plain", format="hf", dequantise=True)
    back = tensors(tmp_path / "plain")
    worst = max(float((back[n].float() - state[n].float()).abs().max() / state[n].float().abs().max()) for n in state)
    assert 0 < worst < 0.05  # rounded to three bits, and no further
    expected["model.layers.0.mlp.up_proj.weight_scale_inv"][1, 1] *= 2  # the control
    assert not equal(made["model.layers.0.mlp.up_proj.weight_scale_inv"], expected["model.layers.0.mlp.up_proj.weight_scale_inv"])


def test_quantised_on_the_way_as_afterwards(tmp_path):
    model(tmp_path / "bf16")
    api.convert(tmp_path / "bf16", tmp_path / "megatron", format="megatron", tp=2)
    api.convert(tmp_path / "megatron", tmp_path / "fp8", format="hf", quantise="fp8", config=tmp_path / "bf16")
    api.convert(tmp_path / "fp8", tmp_path / "b", format="tp", tp=1)
    api.convert(tmp_path / "bf16", tmp_path / "a", format="tp", tp=1, quantise="fp8")
    a, b = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)
    with pytest.raises(PlanError, match="is quantised already, as fp8_block"):
        api.plan(tmp_path / "fp8", format="hf", quantise="fp8")
    with pytest.raises(PlanError, match="format megatron cannot hold weights quantised as fp8_block"):
        api.plan(tmp_path / "bf16", format="megatron", quantise="fp8")
    with pytest.raises(PlanError, match="'int3' is no recipe"):
        api.plan(tmp_path / "bf16", format="hf", quantise="int3")
    run = CliRunner().invoke(cli, ["plan", str(tmp_path / "bf16"), "--to", "hf", "--quantise", "fp8"])
    assert run.exit_code == 0 and "fp8_codes, fp8_scale" in run.output


def test_scales_are_repeated_where_a_cut_misses_blocks(tmp_path):
    state, plain = write(tmp_path / "hf", "fp8 blocks")  # blocks of 64 × 32; key/value heads of 32: at tp 4 half a block
    with pytest.raises(PlanError, match="would be cut inside a block"):
        api.plan(tmp_path / "hf", format="vllm", tp=4)
    for format in ("vllm", "tp"):
        api.convert(tmp_path / "hf", tmp_path / format, format=format, tp=4, refine=True)
        told = json.loads((tmp_path / format / "config.json").read_text())["quantization_config"]
        assert told["weight_block_size"] == [32, 16]
        api.convert(tmp_path / format, tmp_path / f"{format} hf", format="hf")
        back = tensors(tmp_path / f"{format} hf")
        assert back.keys() == state.keys()
        for name, held in state.items():
            fine = held.repeat_interleave(2, 0).repeat_interleave(2, 1) if name.endswith("_scale_inv") else held
            assert equal(back[name], fine), name
        api.convert(tmp_path / format, tmp_path / f"{format} plain", format="hf", dequantise=True)
        made = tensors(tmp_path / f"{format} plain")
        assert all(equal(made[name], plain[name]) for name in plain)
    same = api.plan(tmp_path / "hf", format="vllm", tp=2, refine=True)
    assert not same.plan.computes and same.quantised_anew is None  # nothing to repeat where all cuts fit
    with pytest.raises(PlanError, match="holds no scales that could be repeated"):
        model(tmp_path / "bf16")
        api.plan(tmp_path / "bf16", format="vllm", refine=True)


MOE = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256,
       "norm_topk_prob": True, "hidden_size": 256, "head_dim": 128, "decoder_sparse_step": 1, "mlp_only_layers": []}  # fmt: skip


def test_experts_alone_are_refined_for_an_engine_as_vllm_does(tmp_path):
    """At tp 4 an expert has 64 rows on a rank: gcd(128, 128, 64, 256) = 64. config.json keeps its 128, by which linears are cut."""
    model(tmp_path / "bf16", **MOE)
    api.convert(tmp_path / "bf16", tmp_path / "hf", format="hf", quantise="fp8")
    with pytest.raises(PlanError, match="would be cut inside a block"):
        api.plan(tmp_path / "hf", format="vllm", tp=4)
    api.convert(tmp_path / "hf", tmp_path / "vllm", format="vllm", tp=4, refine=True)
    state = tensors(tmp_path / "hf")
    held = load_file(tmp_path / "vllm/model-rank-3-part-0.safetensors")
    at, fine = "model.layers.0.mlp.experts.", lambda t: t.repeat_interleave(2, 0).repeat_interleave(2, 1)
    for expert in range(4):
        w13 = [fine(state[f"{at}{expert}.{x}_proj.weight_scale_inv"]).chunk(4)[3] for x in ("gate", "up")]
        assert equal(held[f"{at}routed_experts.w13_weight_scale_inv"][expert], torch.cat(w13))
        assert equal(
            held[f"{at}routed_experts.w2_weight_scale_inv"][expert], fine(state[f"{at}{expert}.down_proj.weight_scale_inv"]).chunk(4, 1)[3]
        )
    assert held["model.layers.0.self_attn.o_proj.weight_scale_inv"].shape == (2, 2)
    assert json.loads((tmp_path / "vllm/config.json").read_text())["quantization_config"]["weight_block_size"] == [128, 128]
    api.convert(tmp_path / "hf", tmp_path / "plain", format="hf", dequantise=True)
    api.convert(tmp_path / "vllm", tmp_path / "again", format="hf", dequantise=True)  # what was written is read, too
    a, b = tensors(tmp_path / "plain"), tensors(tmp_path / "again")
    assert a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)
    with pytest.raises(PlanError, match="scales of experts are on finer blocks"):
        api.plan(tmp_path / "vllm", format="hf")
