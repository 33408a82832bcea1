"""Quantised checkpoints: codes and scales copied, cut and fused like weights, and computed back, against genuine samples and their twins."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from reshard import api
from reshard.errors import CastError, FormatError, LayoutError, PlanError
from reshard.layout.schemes import load_scheme

SAMPLES = Path(__file__).parent.parent.parent / "shared/samples"
HF, VLLM = SAMPLES / "hf", SAMPLES / "vllm"
pytestmark = [pytest.mark.samples, pytest.mark.skipif(not SAMPLES.is_dir(), reason="no samples beside the checkout")]


def raw(folder):
    """Name → dtype, shape and bytes, of all files of a folder."""
    out = {}
    for path in sorted(folder.glob("*.safetensors")):
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        header.pop("__metadata__", None)
        for name, at in header.items():
            begin, end = at["data_offsets"]
            out[path.name if "rank" in path.name else "", name] = at["dtype"], at["shape"], content[start + begin : start + end]
    return out


@pytest.mark.parametrize("model", ["deepseek_v3-fp8", "gpt_oss-mxfp4"])
def test_dequantised_weights_are_those_of_the_twin(tmp_path, model):
    job = api.plan(HF / model, format="hf", dequantise=True)
    report = api.convert(HF / model, tmp_path / "out", format="hf", dequantise=True)
    assert raw(tmp_path / "out") == raw(HF / f"{model}-dequantized-bf16")
    assert report.bytes_read == job.bytes_read
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "quantization_config" not in config
    assert api.diff(tmp_path / "out", HF / f"{model}-dequantized-bf16").equal


@pytest.mark.parametrize("target", [{"format": "vllm", "tp": 2}, {"format": "megatron", "tp": 4, "ep": 2}, {"format": "tp", "tp": 3}])
def test_dequantised_on_any_mesh_as_the_twin_is_converted(tmp_path, target):
    api.convert(HF / "deepseek_v3-fp8", tmp_path / "a", dequantise=True, **target)
    api.convert(HF / "deepseek_v3-fp8-dequantized-bf16", tmp_path / "b", **target)
    names = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.suffix in (".safetensors", ".pt"))
    assert names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_codes_and_scales_are_cut_as_vllm_cuts_them(tmp_path):
    api.convert(VLLM / "hf/llama-fp8", tmp_path / "tp2", format="vllm", tp=2)
    assert raw(tmp_path / "tp2") == raw(VLLM / "llama-fp8-tp2")
    api.convert(VLLM / "llama-fp8-tp2", tmp_path / "back", format="hf", config=VLLM / "hf/llama-fp8")
    assert raw(tmp_path / "back") == raw(VLLM / "hf/llama-fp8")
    assert json.loads((tmp_path / "back/config.json").read_text())["quantization_config"]["weight_block_size"] == [128, 128]
    api.convert(tmp_path / "tp2", tmp_path / "tp", format="tp", tp=2)
    api.convert(tmp_path / "tp", tmp_path / "again", format="hf")
    assert raw(tmp_path / "again") == raw(VLLM / "hf/llama-fp8")


def test_a_cut_inside_a_block_is_refused_with_the_sizes_that_fit(tmp_path):
    with pytest.raises(PlanError) as caught:  # 4 key/value heads of 64: at tp 4 one head, half a block
        api.plan(VLLM / "hf/llama-fp8", format="vllm", tp=4)
    assert "block" in str(caught.value) and "tp sizes that fit this model here: 1, 2" in caught.value.hint
    assert str(caught.value).count("\n") < 8  # one line per family, not per layer
    assert api.plan(VLLM / "hf/llama-fp8", format="vllm", tp=4, dequantise=True).bytes_read  # no codes are cut there


def test_what_does_not_hold_codes_is_told(tmp_path):
    with pytest.raises(PlanError, match="format megatron cannot hold weights quantised as fp8_block") as caught:
        api.plan(HF / "deepseek_v3-fp8", format="megatron", tp=2)
    assert caught.value.hint == "use --dequantise"
    with pytest.raises(PlanError, match="is not quantised"):
        api.plan(HF / "llama", format="hf", dequantise=True)


def copied(tmp_path, change):
    folder = tmp_path / "changed"
    shutil.copytree(HF / "deepseek_v3-fp8", folder)
    folder.chmod(0o755)
    for path in folder.iterdir():
        path.chmod(0o644)
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_planted_defects_in_scales_are_seen(tmp_path):
    name = "model.layers.1.mlp.experts.2.up_proj.weight_scale_inv"

    def halved(state):
        state[name][1, 0] /= 2

    folder = copied(tmp_path, halved)
    api.convert(folder, tmp_path / "out", format="hf", dequantise=True)
    difference = api.diff(tmp_path / "out", HF / "deepseek_v3-fp8-dequantized-bf16")
    assert not difference.equal and "up" in str(difference)


def test_a_scale_that_lacks_or_does_not_fit_is_told(tmp_path):
    name = "model.layers.1.mlp.experts.2.up_proj.weight_scale_inv"
    with pytest.raises((PlanError, FormatError), match="up_proj.weight_scale_inv is missing"):
        api.open(copied(tmp_path, lambda state: state.pop(name)))
    shutil.rmtree(tmp_path / "changed")
    with pytest.raises((PlanError, FormatError), match=r"shape \[1, 2\], expected \[2, 2\]"):
        api.open(copied(tmp_path, lambda state: state.update({name: state[name][:1].clone()})))


def test_layers_may_be_quantised_or_not(tmp_path):
    with safe_open(HF / "deepseek_v3-fp8-dequantized-bf16/model.safetensors", "pt") as twin:

        def plain(state):
            for name in list(state):
                if "layers.0." in name and name.endswith("_scale_inv"):
                    state.pop(name)
                    state[name.removesuffix("_scale_inv")] = twin.get_tensor(name.removesuffix("_scale_inv"))

        folder = copied(tmp_path, plain)
    api.convert(folder, tmp_path / "out", format="hf", dequantise=True)
    assert raw(tmp_path / "out") == raw(HF / "deepseek_v3-fp8-dequantized-bf16")
    api.convert(folder, tmp_path / "codes", format="tp", tp=2)
    api.convert(tmp_path / "codes", tmp_path / "back", format="hf")
    assert raw(tmp_path / "back") == raw(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[codes]\ndims = "out sideways"', "cannot read 'sideways'"),
        ('[codes]\ndims = "out in"\nfoo = 1', "unknown key 'foo'"),
        ('[codes]\ndims = "out in"\nhf = 3', "must be a text"),
        ("[codes]\nquantised = 3", "unknown key 'quantised'"),
        ("[codes", "Expected"),
    ],
)
def test_a_page_that_is_wrong_names_itself(tmp_path, text, message):
    path = tmp_path / "mine.toml"
    path.write_text(f'value = "scaled"\ndtype = "BF16"\nquantised = "true"\n{text}')
    with pytest.raises(LayoutError, match=message) as caught:
        load_scheme(path)
    assert "mine" in str(caught.value)


def test_a_weight_that_its_dtype_has_no_room_for_is_refused(tmp_path):
    def enlarged(state):
        state["model.layers.1.mlp.experts.2.up_proj.weight_scale_inv"] *= 1e9

    folder = copied(tmp_path, enlarged)
    with pytest.raises(CastError, match="up of layer 1, expert 2|up_proj.*do not fit F16"):
        api.convert(folder, tmp_path / "out", format="hf", dequantise=True, dtype="fp16")
    report = api.plan(folder, format="hf", dequantise=True, dtype="fp16", allow_overflow=True)
    assert report.casts is not None
    api.convert(folder, tmp_path / "wide", format="hf", dequantise=True, dtype="fp32")
    assert {at[0] for at in raw(tmp_path / "wide").values()} == {"F32"}


def quantised_llama(tmp_path, strategy, block):
    """A Llama of one's own in FP8 as compressed-tensors writes it, and its weights computed by torch, tensor by tensor."""
    torch.manual_seed(0)
    source, folder = VLLM / "hf/llama-fp8", tmp_path / "ct"
    folder.mkdir()
    config = json.loads((source / "config.json").read_text())
    weights = {"strategy": strategy, "num_bits": 8, "type": "float", "block_structure": block}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"weights": weights}},
    }
    (folder / "config.json").write_text(json.dumps(config))
    state, plain = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.endswith("_scale_inv"):
            continue
        state[name] = plain[name] = tensor
        if tensor.dtype == torch.float8_e4m3fn:
            rows, columns = tensor.shape
            bo, bi = block or (1, columns)
            scale = torch.rand(-(-rows // bo), -(-columns // bi)) + 0.5
            state[f"{name}_scale"] = scale.bfloat16()
            spread = scale.bfloat16().float().repeat_interleave(bo, 0)[:rows].repeat_interleave(bi, 1)[:, :columns]
            plain[name] = (tensor.float() * spread).bfloat16()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder, plain


@pytest.mark.parametrize(("strategy", "block"), [("channel", None), ("block", [64, 32])])
def test_compressed_tensors_fp8(tmp_path, strategy, block):
    folder, plain = quantised_llama(tmp_path, strategy, block)
    api.convert(folder, tmp_path / "plain", format="hf", dequantise=True)
    made = load_file(tmp_path / "plain/model.safetensors")
    assert made.keys() == plain.keys() and all(torch.equal(made[name], plain[name]) for name in plain)
    job = api.plan(folder, format="vllm", tp=4)  # a head of 64 is whole rows, and whole blocks
    assert {s.dtype for s in job.plan.destinations if s.name.endswith("_scale")} == {"F32"}
    api.convert(folder, tmp_path / "vllm", format="vllm", tp=4)
    own = [load_file(path) for path in sorted((tmp_path / "vllm").glob("*.safetensors"))]
    state = load_file(folder / "model.safetensors")
    at = "model.layers.1.self_attn."
    for rank, held in enumerate(own):
        wanted = [state[f"{at}{x}_proj.weight_scale"].float().chunk(4)[rank] for x in "qkv"]
        assert torch.equal(held[f"{at}qkv_proj.weight_scale"], torch.cat(wanted))
        o = state[f"{at}o_proj.weight_scale"].float()
        assert torch.equal(held[f"{at}o_proj.weight_scale"], o.chunk(4, 1)[rank] if block else o)  # rows whole on every rank
    api.convert(tmp_path / "vllm", tmp_path / "back", format="hf")
    assert raw(tmp_path / "back") == raw(folder)  # and scales in BF16 again
    loaded = api.load(folder, format="vllm", tp=4, rank=2, dequantise=True)
    assert torch.equal(loaded[f"{at}o_proj.weight"], plain[f"{at}o_proj.weight"].chunk(4, 1)[2])


def test_packed_codes_are_cut_in_whole_groups(tmp_path):
    """gpt-oss: 96 inputs of a projection are three groups of 32."""
    source = HF / "gpt_oss-mxfp4"
    api.convert(source, tmp_path / "tp3", format="tp", tp=3)
    api.convert(tmp_path / "tp3", tmp_path / "back", format="hf")
    assert raw(tmp_path / "back") == raw(source)
    api.convert(tmp_path / "tp3", tmp_path / "plain", format="hf", dequantise=True)
    assert raw(tmp_path / "plain") == raw(HF / "gpt_oss-mxfp4-dequantized-bf16")
    with pytest.raises(PlanError, match=r"expert_down, cut over 2 ranks, would be cut inside a block \(32 of input\)"):
        api.plan(source, format="tp", tp=2)
    with pytest.raises(PlanError, match="format sglang cannot hold weights quantised as mxfp4"):
        api.plan(source, format="sglang", tp=1)


@pytest.mark.parametrize("model", ["deepseek_v3-fp8", "gpt_oss-mxfp4"])
def test_diff_of_a_quantised_checkpoint_and_its_twin(tmp_path, model):
    """The twin in another layout, in either order; and every planted defect is told by the twin's name, with its elements."""
    twin = HF / f"{model}-dequantized-bf16"
    api.convert(twin, tmp_path / "vllm", format="vllm", tp=2)
    assert api.diff(HF / model, twin, dequantise=True).equal and api.diff(tmp_path / "vllm", HF / model, dequantise=True).equal
    assert not api.diff(HF / model, twin).equal  # codes are no weights
    with pytest.raises(PlanError, match="neither is quantised"):
        api.diff(twin, twin, dequantise=True)
    with pytest.raises(PlanError, match="both are quantised"):
        api.diff(HF / model, HF / model, dequantise=True)


@pytest.mark.parametrize("defect", ["halved", "exchanged", "shifted"])
def test_diff_finds_planted_defects_in_scales(tmp_path, defect):
    name = "model.layers.1.mlp.experts.2.up_proj.weight_scale_inv"

    def planted(state):
        scale = state[name]
        if defect == "halved":
            scale[1, 0] /= 2
        elif defect == "exchanged":
            scale[0, 0], scale[1, 1] = scale[1, 1].clone(), scale[0, 0].clone()
        else:
            state[name] = scale.roll(1, 1)

    folder = copied(tmp_path, planted)
    found = api.diff(folder, HF / "deepseek_v3-fp8-dequantized-bf16", dequantise=True)
    assert [d.name for d in found.differing] == [name.removesuffix("_scale_inv")]
    assert found.differing[0].elements and found.differing[0].max_abs_diff > 0
