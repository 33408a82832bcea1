"""Descriptors against genuine files: names, shapes, and every value moved by this file's own plain numpy code."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from reshard import formats
from reshard.layout import Mesh, Placement, Section, builtin_descriptors, find_descriptor
from reshard.layout.files import layout_dir
from reshard.layout.fusion import parse

SAMPLES = Path(__file__).parents[2] / "shared" / "samples"

HF = [f"hf/{name}" for name in (
    "llama", "llama-oddvocab", "llama-tied", "qwen2", "qwen3", "phi3", "gpt_neox", "qwen3_moe", "mixtral", "gpt_oss",
    "deepseek_v3", "gpt_oss-mxfp4-dequantized-bf16", "deepseek_v3-fp8-dequantized-bf16",
)] + [f"vllm/hf/{name}" for name in ("llama", "llama-kv2", "qwen2", "phi3", "qwen3-moe", "gpt-oss", "deepseek-v3")] + [
    f"megatron/{name}/hf" for name in ("llama", "qwen2", "qwen3_moe", "deepseek_v3")]  # fmt: skip
VLLM = [("llama-tp2", "llama"), ("llama-kv2-tp4", "llama-kv2"), ("llama-tp2-pp2", "llama"), ("qwen2-tp2", "qwen2"),
        ("phi3-tp2", "phi3"), ("qwen3-moe-tp2", "qwen3-moe"), ("gpt-oss-tp2", "gpt-oss"), ("deepseek-v3-tp2", "deepseek-v3")]  # fmt: skip
MEGATRON = ["llama", "qwen2", "qwen3_moe", "deepseek_v3"]
SPLIT = [(f"vllm/{name}", f"vllm/hf/{original}") for name, original in VLLM] + [
    (f"megatron/{name}/legacy_tp2", f"megatron/{name}/hf") for name in MEGATRON]  # fmt: skip


def bind(folder: Path):
    config = json.loads((folder / "config.json").read_text())
    return find_descriptor(config).bind(config)


def safetensors(path: Path) -> dict[str, tuple[str, tuple[int, ...], np.ndarray]]:
    """Name → (dtype, shape, elements as flat unsigned integers), read with no library."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    width = {"F32": "u4", "BF16": "u2", "F16": "u2"}
    return {
        name: (t["dtype"], tuple(t["shape"]), np.frombuffer(raw[8 + size :][slice(*t["data_offsets"])], width[t["dtype"]]))
        for name, t in header.items() if name != "__metadata__"
    }  # fmt: skip


def legacy(path: Path) -> dict[str, tuple[str, tuple[int, ...], np.ndarray]]:
    torch = pytest.importorskip("torch")
    model = torch.load(path, map_location="cpu", weights_only=False)["model"]
    words = {torch.bfloat16: ("BF16", torch.uint16), torch.float32: ("F32", torch.uint32)}
    return {
        name: (words[t.dtype][0], tuple(t.shape), t.contiguous().view(words[t.dtype][1]).numpy().reshape(-1))
        for name, t in model.items() if not name.endswith("_extra_state")
    }  # fmt: skip


def ranks(folder: Path) -> list[dict]:
    """Genuine tensors of each rank, in the format's order."""
    if folder.name.startswith("legacy"):
        return [legacy(path) for path in sorted(folder.glob("release/*/model_optim_rng.pt"))]
    return [safetensors(path) for path in sorted(folder.glob("*.safetensors"))]


def placement(layout, folder: Path, section: Section | None = None) -> Placement:
    name = "megatron" if folder.name.startswith("legacy") else "vllm" if folder.parent.name == "vllm" else "hf"
    files = [path.name for path in folder.glob("*.safetensors")]
    pp = 1 + max((int(f.split("-")[2]) for f in files if f.startswith("model-pp-")), default=0)
    tp = len(ranks(folder)) // pp if name != "hf" else 1
    return Placement(layout, section or layout.section(name), formats.get(name).rules, Mesh(tp, pp))


def view(flat: np.ndarray, block) -> np.ndarray:
    return np.lib.stride_tricks.as_strided(flat[block.offset :], block.shape, [s * flat.itemsize for s in block.strides])


def canonical(folder: Path, layout) -> dict:
    """Every tensor of the model, whole, out of the HF file."""
    whole = {}
    file = safetensors(folder / "model.safetensors")
    for stored in placement(layout, folder).stored():
        for key, block in stored.blocks:
            assert block.box == tuple((0, size) for size in layout.shape(layout.descriptor.tensors[key[0]])), key
            whole[key] = np.array(view(file[stored.name][2], block))
    return whole


def wrong_values(name: str, original: str, section: Section | None = None) -> list[str]:
    """Tensors of the genuine folder whose bits differ from those that the layout moves there from the HF file."""
    folder = SAMPLES / name
    layout = bind(SAMPLES / original)
    whole, genuine, wrong = canonical(SAMPLES / original, layout), ranks(folder), []
    for stored in placement(layout, folder, section).stored():
        dtype, shape, bits = genuine[stored.rank][stored.name]
        wide = stored.entry.dtype == "F32"
        made = np.zeros(stored.size, np.uint32 if wide else np.uint16)
        filled = np.zeros(stored.size, np.uint8)
        for key, block in stored.blocks:
            part = whole[key][tuple(slice(*edge) for edge in block.box)]
            if wide and part.dtype == np.uint16:
                part = part.astype(np.uint32) << 16  # BF16 is the upper half of F32
            view(made, block)[...] = part
            view(filled, block)[...] += 1
        assert filled.max(initial=0) <= 1, f"{stored.name}: blocks overlap"
        assert int((filled == 0).sum()) == stored.padding
        if stored.shape != shape or dtype != ("F32" if wide else "BF16") or not np.array_equal(made, bits):
            wrong.append(stored.name)
    return wrong


@pytest.mark.samples
@pytest.mark.parametrize("folder", HF)
def test_hf_names_and_shapes(folder):
    layout = bind(SAMPLES / folder)
    place = placement(layout, SAMPLES / folder)
    file = safetensors(SAMPLES / folder / "model.safetensors")
    assert {s.name: s.shape for s in place.stored()} == {name: shape for name, (_, shape, _) in file.items()}
    assert not place.problems


@pytest.mark.parametrize("model", [name.partition("/")[2] for name in HF if (SAMPLES / name / "_memory_tensors.json").exists()])
def test_names_in_memory_are_variants(model):
    """transformers' names in memory (which its distributed checkpoints have) are the base entries or a variant's."""
    folder = SAMPLES / "hf" / model
    layout = bind(folder)
    section = layout.section("hf")
    for _, _, variant in section.variants:
        section = section.overlaid(variant)
    memory = json.loads((folder / "_memory_tensors.json").read_text())
    made = {s.name: list(s.shape) for s in placement(layout, folder, section).stored(aliases=True)}
    assert made == {name: shape for name, (_, shape) in memory.items()}


@pytest.mark.samples
@pytest.mark.parametrize("name, original", SPLIT)
def test_split_names_shapes_and_values(name, original):
    layout = bind(SAMPLES / original)
    place = placement(layout, SAMPLES / name)
    for rank, genuine in zip(place.ranks, ranks(SAMPLES / name), strict=True):
        made = {s.name: s.shape for s in place.stored([rank])}
        constants = dict(place.constants(rank))
        assert made | {n: c.shape for n, c in constants.items()} == {n: shape for n, (_, shape, _) in genuine.items()}
        for n, constant in constants.items():
            assert genuine[n][0] == constant.dtype and genuine[n][2].view("f4") == constant.value
    assert not place.problems
    assert wrong_values(name, original) == []


def changed(section: Section, label: str, **changes) -> Section:
    assert any(entry.label == label for entry in section.entries)
    changes |= {"fusion": parse(changes["fusion"])} if "fusion" in changes else {}
    return replace(section, entries=tuple(replace(e, **changes) if e.label == label else e for e in section.entries))


WRONG = [
    ("megatron/llama/legacy_tp2", "megatron/llama/hf", "qkv", {"fusion": "q k v", "cut": "parts"}),
    ("megatron/llama/legacy_tp2", "megatron/llama/hf", "qkv", {"fusion": "q k v"}),
    ("megatron/qwen2/legacy_tp2", "megatron/qwen2/hf", "qkv_bias", {"fusion": "kv: q_bias v_bias k_bias"}),
    ("megatron/llama/legacy_tp2", "megatron/llama/hf", "fc1", {"cut": "whole"}),
    ("megatron/llama/legacy_tp2", "megatron/llama/hf", "fc1", {"fusion": "up gate"}),
    ("megatron/qwen3_moe/legacy_tp2", "megatron/qwen3_moe/hf", "expert_fc1", {"fusion": "expert_up expert_gate"}),
    ("vllm/llama-tp2", "vllm/hf/llama", "qkv", {"fusion": "kv: q k v"}),
    ("vllm/phi3-tp2", "vllm/hf/phi3", "qkv", {"cut": "whole"}),
    ("vllm/gpt-oss-tp2", "vllm/hf/gpt-oss", "expert_gate_up", {"fusion": "expert_gate expert_up"}),
    ("vllm/gpt-oss-tp2", "vllm/hf/gpt-oss", "expert_down_bias", {"only_rank0": False}),
    ("vllm/deepseek-v3-tp2", "vllm/hf/deepseek-v3", "qkv_a", {"fusion": "kv_a q_a"}),
]  # fmt: skip


@pytest.mark.samples
@pytest.mark.parametrize("name, original, label, changes", WRONG)
def test_the_value_check_sees_a_wrong_rule(name, original, label, changes):
    section = bind(SAMPLES / original).section(name.split("/")[0])
    entry = next(e for e in section.entries if e.label == label)
    pattern = entry.name.split("{layer}")[1].split("{")[0]
    wrong = wrong_values(name, original, changed(section, label, **changes))
    assert wrong and all(pattern in tensor for tensor in wrong)


@pytest.mark.samples
def test_more_ranks_than_heads_repeat_them_in_order():
    """rank // (tp / heads), as vLLM does; rank % heads would exchange the middle two of four."""
    layout = bind(SAMPLES / "vllm/hf/llama-kv2")
    place = placement(layout, SAMPLES / "vllm/llama-kv2-tp4")
    held = [s.blocks[1][1].box[0] for s in place.stored() if s.name == "model.layers.0.self_attn.qkv_proj.weight"]
    assert held == [(0, 1), (0, 1), (1, 2), (1, 2)]


FORMATS = ["hf", "vllm", "sglang", "megatron"]


def test_every_builtin_descriptor_loads_and_says_why_it_lacks_a_format():
    for name, descriptor in builtin_descriptors().items():
        assert descriptor.architectures
        for format in set(FORMATS) - set(descriptor.formats):
            chain = [name]
            while parent := re.search(r'^extends = "(\w+)"', (layout_dir() / f"{chain[-1]}.toml").read_text(), re.M):
                chain.append(parent[1])
            texts = [(layout_dir() / f"{file}.toml").read_text() for file in chain]
            assert any(re.search(rf"^{format} = false +# .{{8,}}", text, re.M) for text in texts), f"{name} lacks {format} without a reason"


@pytest.mark.samples
@pytest.mark.parametrize("format, folder", [
    (format, folder) for format in FORMATS for folder in HF
    if "vllm" not in folder and (format, folder) not in (("sglang", "hf/gpt_neox"), ("megatron", "hf/gpt_neox"))])  # fmt: skip
def test_every_tensor_is_stored_exactly_once(folder, format):
    """In each format, at tp 1 and 2 and in every variant: all elements of all tensors, none twice, blocks apart."""
    layout = bind(SAMPLES / folder)
    base = layout.section(format)
    sections = [base] + [base.overlaid(variant) for _, _, variant in base.variants]
    if format == "vllm":
        sections += [base.for_version(version) for version in ((0, 11, 2), (0, 14, 0), (0, 19, 1), (0, 20, 2), (0, 23, 0))]
    expected = {}
    for tensor in layout.descriptor.tensors.values():
        for layer in range(layout.layers) if "layer" in tensor.index else [None]:
            for expert in range(layout.sizes["expert"]) if "expert" in tensor.index else [None]:
                if layout.exists(tensor, layer):
                    expected[tuple(x for x in (tensor.name, layer, expert) if x is not None)] = layout.shape(tensor)
    for section in sections:
        for tp in (1, 2) if format != "hf" else (1,):
            place = Placement(layout, section, formats.get(format).rules, Mesh(tp))
            count = {key: np.zeros(shape, np.uint8) for key, shape in expected.items()}
            for stored in place.stored():
                filled = np.zeros(stored.size, np.uint8)
                for key, block in stored.blocks:
                    count[key][tuple(slice(*edge) for edge in block.box)] |= 1
                    view(filled, block)[...] += 1
                assert filled.max(initial=0) <= 1, stored.name
            assert not place.problems
            assert [key for key, seen in count.items() if not seen.all()] == []


EXPERTS = {"experts.w13_weight", "experts.w2_weight"}
ROUTED = {"experts.routed_experts.w13_weight", "experts.routed_experts.w2_weight"}
SHARED = {"shared_experts.gate_up_proj.weight", "shared_experts.down_proj.weight"}
DENSE = {"gate_up_proj.weight", "down_proj.weight"}  # of DeepSeek's first layers
# What each release's model has under .mlp., of several names for one storage the smallest.
QWEN3_MOE = {
    (0, 11, 2): {"gate.weight"} | EXPERTS,
    (0, 14, 1): {"gate.weight"} | EXPERTS,
    (0, 15, 0): {"experts._gate.weight"} | EXPERTS,
    (0, 19, 1): {"experts._gate.weight"} | EXPERTS,
    (0, 20, 2): {"gate.weight"} | EXPERTS,
    (0, 21, 0): {"experts.runner.gate.weight"} | EXPERTS,
    (0, 23, 0): {"experts.runner.gate.weight"} | EXPERTS,
    (0, 24, 0): {"experts.gate.weight"} | ROUTED,
    None: {"experts.gate.weight"} | ROUTED,
}
HELD = {"experts._gate.weight", "experts._gate.e_score_correction_bias",
        "experts._shared_experts.gate_up_proj.weight", "experts._shared_experts.down_proj.weight"} | EXPERTS | DENSE  # fmt: skip
RUN = {"experts.runner.gate.weight", "experts.e_score_correction_bias"} | SHARED | EXPERTS | DENSE
LAYERED = {"experts.gate.weight", "experts.gate.e_score_correction_bias",
           "experts._shared_experts._layer.gate_up_proj.weight", "experts._shared_experts._layer.down_proj.weight"} | ROUTED | DENSE  # fmt: skip
DEEPSEEK_V3 = {
    (0, 11, 2): HELD,
    (0, 14, 0): HELD,
    (0, 19, 1): HELD,
    (0, 20, 2): RUN - {"experts.runner.gate.weight"} | {"gate.weight"},
    (0, 21, 0): RUN,
    (0, 23, 0): RUN,
    (0, 24, 0): LAYERED,
    None: LAYERED,
}


@pytest.mark.samples
@pytest.mark.parametrize("model, version, names", [
    (model, version, names) for model, releases in (("qwen3-moe", QWEN3_MOE), ("deepseek-v3", DEEPSEEK_V3))
    for version, names in releases.items()])  # fmt: skip
def test_variants_by_engine_release(model, version, names):
    layout = bind(SAMPLES / "vllm/hf" / model)
    place = Placement(layout, layout.section("vllm").for_version(version), formats.get("vllm").rules, Mesh(2), engine=version)
    stored = list(place.stored())
    assert {s.name.partition(".mlp.")[2] for s in stored if ".mlp." in s.name} == names
    assert {s.name for s in stored if s.entry.dtype} == {s.name for s in stored if "correction_bias" in s.name}
    scales = {name for name in dict(place.constants(place.ranks[0])) if name.endswith("_k_scale")}
    inner = "mla_attn.mla_attn" if model == "deepseek-v3" else "attn"
    assert scales == {f"model.layers.{i}.self_attn.{inner}._k_scale" for i in range(layout.layers) if version is None or version >= (0, 14)}


@pytest.mark.samples
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_expert_names_by_engine_release(name):
    layout = bind(SAMPLES / "hf" / name)
    for version in ((0, 11, 2), (0, 23, 0), (0, 24, 0), None):
        holder = ".experts.routed_experts.w" if version is None or version >= (0, 24) else ".experts.w"
        place = Placement(layout, layout.section("vllm").for_version(version), formats.get("vllm").rules, Mesh(2), engine=version)
        experts = [s.name for s in place.stored() if ".experts." in s.name]
        assert experts and all(holder in name for name in experts)


@pytest.mark.samples
@pytest.mark.parametrize("version, prefix, head", [
    ((0, 11, 2), "gpt_neox.", "embed_out.weight"), ((0, 31, 0), "gpt_neox.", "embed_out.weight"), ((0, 32, 0), "model.", "lm_head.weight"), (None, "model.", "lm_head.weight"),
])  # fmt: skip
def test_gpt_neox_by_engine_release(version, prefix, head):
    """vLLM's own model has all queries of a rank first; transformers' model a plain half of what the HF file has."""
    folder = SAMPLES / "hf/gpt_neox"
    layout = bind(folder)
    whole, file = canonical(folder, layout), safetensors(folder / "model.safetensors")
    place = Placement(layout, layout.section("vllm").for_version(version), formats.get("vllm").rules, Mesh(2), engine=version)
    names = {s.name for s in place.stored()} | set(dict(place.constants(place.ranks[0])))
    assert head in names and all(name.startswith(prefix) for name in names - {head})
    for stored in place.stored(place.ranks[1:]):
        if stored.name != f"{prefix}layers.1.attention.query_key_value.weight":
            continue
        made = np.zeros(stored.size, file["gpt_neox.layers.1.attention.query_key_value.weight"][2].dtype)
        for key, block in stored.blocks:
            view(made, block)[...] = whole[key][tuple(slice(*edge) for edge in block.box)]
        if prefix == "model.":
            assert np.array_equal(made, file["gpt_neox.layers.1.attention.query_key_value.weight"][2][stored.size :])
        else:
            parts = [whole[part, 1] for part in "qkv"]
            assert np.array_equal(made, np.concatenate([part[len(part) // 2 :].reshape(-1) for part in parts]))
        break
    else:
        raise AssertionError(f"no fused attention in {sorted(names)}")


@pytest.mark.samples
def test_sglang_keeps_biases_in_f32():
    """In SGLang's gpt-oss the biases of experts, in its DeepSeek the router's; nothing else."""
    for name, wide in (("gpt_oss", {"w13_weight_bias", "w2_weight_bias"}), ("deepseek_v3", {"e_score_correction_bias"})):
        entries = bind(SAMPLES / "hf" / name).section("sglang").entries
        assert {e.name.rpartition(".")[2] for e in entries if e.dtype == "F32"} == wide
        assert {e.dtype for e in entries} == {None, "F32"}


@pytest.mark.samples
@pytest.mark.parametrize("engine, count", [((0, 11, 2), 0), ((0, 14, 1), 4), (None, 4)])
def test_constants_by_engine_release(engine, count):
    layout = bind(SAMPLES / "vllm/hf/llama")
    place = Placement(layout, layout.section("vllm"), formats.get("vllm").rules, Mesh(2), engine=engine)
    assert len(dict(place.constants(place.ranks[0]))) == count * layout.layers


@pytest.mark.samples
def test_megatron_grouped_experts_are_transposed_stacks():
    """GroupedMLP's weight1 says [hidden, experts·2·ffn] but lies as [experts, hidden, 2·ffn]; weight2 as [experts, ffn, hidden]."""
    layout = bind(SAMPLES / "megatron/qwen3_moe/hf")
    variant = next(v for label, _, v in layout.section("megatron").variants if label == "grouped")
    whole = canonical(SAMPLES / "megatron/qwen3_moe/hf", layout)
    rules = formats.get("megatron").rules
    for stored in Placement(layout, variant, rules, Mesh(2, ep=1)).stored():
        experts, hidden, ffn = 8, 64, 24
        flat = np.zeros(stored.size, np.uint16)
        for key, block in stored.blocks:
            view(flat, block)[...] = whole[key][tuple(slice(*edge) for edge in block.box)]
        layer, cut = int(stored.name.split(".")[2]), slice(stored.rank * ffn, (stored.rank + 1) * ffn)
        if stored.name.endswith("weight1"):
            assert stored.shape == (hidden, experts * 2 * ffn)
            one = [np.concatenate([whole["expert_gate", layer, e][cut], whole["expert_up", layer, e][cut]]).T for e in range(experts)]
        else:
            assert stored.shape == (experts * ffn, hidden)
            one = [whole["expert_down", layer, e][:, cut].T for e in range(experts)]
        assert np.array_equal(flat, np.stack(one).reshape(-1))
