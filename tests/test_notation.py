"""What the notation's elements mean, on a small made-up model with layers of unequal size, and files written and read by it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import reshard
from reshard import formats
from reshard.errors import LayoutError, PlanError
from reshard.layout import Mesh, Placement, load_descriptor

LAYOUT = """
architectures = ["MadeUpForCausalLM"]
[place.root]
hf = ""
vllm = ""
[place.model]
hf = ["model", ""]
vllm = "model"
parts = ["ends"]
[place.layer]
count = "depth"
hf = "{model}.layers.{layer}"
vllm = "{model}.layers.{layer}"
parts = ["attention", { part = "mlp", when = "layer != 1", at = "ffn" }]
[place.mtp]
count = "more"
hf = "{model}.layers.{depth + mtp}"
parts = ["mlp"]
optional = true
[defaults]
more = "0"
kinds = "['full', 'shared', 'full']"
[axes]
width = "width"
kv = "4 if full else 2"
head = "2"
wide = "sizes[layer] if kinds[layer] != 'shared' else 4"
[conditions]
full = "kinds[layer] == 'full'"
[part.ends]
tensors.words = { dims = "vocab* width", stage = "first" }
tensors.norm = "width"
axes.vocab = "words"
hf.words = "words"
hf.norm = "/norm"
hf.head = { name = "/head", of = "words", form = "twice", copy = true }
vllm.words = { name = "words", pad = { vocab = "ceil_to(vocab, 8)" } }
vllm.norm = "/norm"
vllm.head = { name = "/head", of = "words", pad = { vocab = "ceil_to(vocab, 8)" }, copy = true }
[part.attention]
at = "attn"
[part.attention.tensors]
q = "(kv* head) width"
k = { dims = "(kv* head) width", optional = "not full" }
v = { dims = "(kv* head) width", when = "full" }
[part.attention.hf]
q = ".q"
k = ".k"
v = ".v"
[part.attention.vllm]
qkv = [
    { name = ".qkv", of = "q k v", when = "full" },
    { name = ".q", of = "q", when = "not full" },
]
k = { omit = true, when = "not full" }
[part.mlp]
at = "mlp"
[part.mlp.tensors]
up = "wide* width"
down = "width wide*"
[part.mlp.hf]
up = [".up", { name = ".w1", form = "old" }]
down = ".down"
[part.mlp.vllm]
up = [".up", { name = ".mid.up", until = "0.20" }, { name = ".first.up", until = "0.10" }]
down = ".down"
"""
CONFIG = {"architectures": ["MadeUpForCausalLM"], "depth": 3, "words": 20, "width": 6, "sizes": [4, 0, 8]}


def shapes(more: int = 0, prefix: str = "model.", up: str = "up") -> dict[str, tuple[int, int]]:
    out = {prefix + "words": (20, 6), "norm": (6,)}
    for layer, (kv, wide) in enumerate([(4, 4), (2, 0), (4, 8)]):
        at = f"{prefix}layers.{layer}."
        out |= {f"{at}attn.{x}": (kv * 2, 6) for x in ("q", "k", "v")[: 3 if kv == 4 else 2]}
        out |= {f"{at}ffn.{up}": (wide, 6), f"{at}ffn.down": (6, wide)} if wide else {}
    return out | ({f"{prefix}layers.3.mlp.up": (4, 6), f"{prefix}layers.3.mlp.down": (6, 4)} if more else {})


def write(folder, of, config=CONFIG, text=LAYOUT):
    torch.manual_seed(0)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: torch.randn(shape).bfloat16() for name, shape in of.items()}, folder / "model.safetensors")
    (folder.parent / "own.toml").write_text(text)
    return reshard.open(folder, layout=folder.parent / "own.toml")


def test_layers_of_unequal_size_there_and_back(tmp_path):
    source = write(tmp_path / "hf", shapes())
    assert source.layout.shape_of(("up", 2)) == (8, 6) and source.layout.shape_of(("q", 1)) == (2, 2, 6)
    own = {"layout": tmp_path / "own.toml"}
    reshard.convert(source, tmp_path / "tp", format="tp", tp=2)
    assert reshard.diff(tmp_path / "hf", tmp_path / "tp", **own)
    reshard.convert(reshard.open(tmp_path / "tp", **own), tmp_path / "back", format="hf")
    assert (tmp_path / "back/model.safetensors").read_bytes() and reshard.diff(tmp_path / "hf", tmp_path / "back", **own)
    whole, back = load_file(tmp_path / "hf/model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    assert whole.keys() == back.keys() and all(torch.equal(whole[name], back[name]) for name in whole)


def test_entries_may_see_the_layer_and_what_is_omitted_is_told(tmp_path):
    """A layer that reuses keys of another: the files still have them, the engine does not."""
    source = write(tmp_path / "hf", shapes())
    job = reshard.plan(source, format="vllm", tp=2)
    assert job.left_out == ["model.layers.1.attn.k"] and "left out: 1 tensor, 48 B" in job.describe()
    names = {s.name for s in job.plan.destinations}
    assert {"model.layers.0.attn.qkv", "model.layers.1.attn.q", "model.layers.2.ffn.up", "head"} <= names
    assert not names & {"model.layers.1.attn.qkv", "model.layers.1.ffn.up", "model.layers.1.attn.k"}
    reshard.convert(source, tmp_path / "out", format="vllm", tp=2)
    report = reshard.diff(tmp_path / "hf", tmp_path / "out", layout=tmp_path / "own.toml")
    assert report.missing_in_b == ["model.layers.1.attn.k"] and not report.differing


def test_an_optional_tensor_may_lack(tmp_path):
    of = shapes()
    del of["model.layers.1.attn.k"]
    source = write(tmp_path / "hf", of)
    assert source.layout.lacking == {("k", 1)}
    assert reshard.plan(source, format="vllm", tp=2).left_out == []
    reshard.convert(source, tmp_path / "tp", format="tp", tp=2)
    assert reshard.diff(tmp_path / "hf", tmp_path / "tp", layout=tmp_path / "own.toml")
    (tmp_path / "two").mkdir()
    del of["model.layers.0.attn.k"]
    with pytest.raises(PlanError, match="model.layers.0.attn.k is missing"):
        write(tmp_path / "two/hf", of)


def test_a_second_numbered_stack_is_there_whole_or_not_at_all(tmp_path):
    """Layers past the last are kept where the format has a prefix for them, and told as left out where it has none."""
    config = CONFIG | {"more": 1, "sizes": [4, 0, 8, 4], "kinds": ["full", "shared", "full"]}
    text = (
        LAYOUT.replace('parts = ["mlp"]', 'parts = ["draft"]')
        + """
[part.draft]
at = "mlp"
axes.narrow = "4"
tensors.draft_up = "narrow* width"
tensors.draft_down = "width narrow*"
hf.draft_up = ".up"
hf.draft_down = ".down"
"""
    )
    source = write(tmp_path / "hf", shapes(more=1), config, text)
    assert {s.name for s in source.stored if "layers.3" in s.name} == {"model.layers.3.mlp.up", "model.layers.3.mlp.down"}
    reshard.convert(source, tmp_path / "tp", format="tp", tp=2)
    assert reshard.diff(tmp_path / "hf", tmp_path / "tp", layout=tmp_path / "own.toml")
    assert set(reshard.plan(source, format="vllm", tp=2).left_out) == {
        "model.layers.1.attn.k",
        "model.layers.3.mlp.up",
        "model.layers.3.mlp.down",
    }
    without = write(tmp_path / "without", shapes(), config, text)
    assert without.layout.absent == {"mtp"} and reshard.plan(without, format="hf").left_out == []
    half = shapes(more=1)
    del half["model.layers.3.mlp.up"]
    with pytest.raises(PlanError, match="model.layers.3.mlp.up is missing, though others of place mtp are there"):
        write(tmp_path / "half", half, config, text)


def test_files_may_have_another_prefix_and_another_form(tmp_path):
    source = write(tmp_path / "hf", shapes(prefix="", up="w1"))
    assert {s.name for s in source.stored} == set(shapes(prefix="", up="w1"))
    reshard.convert(source, tmp_path / "out", format="hf")
    assert set(load_file(tmp_path / "out/model.safetensors")) == set(shapes())


def test_a_copy_is_read_where_it_is_there(tmp_path):
    of = shapes() | {"head": (20, 6)}
    with torch.random.fork_rng():
        source = write(tmp_path / "hf", of)
    assert "head" in {s.name for s in source.stored}
    job = reshard.plan(source, format="hf")
    assert "head" not in {s.name for s in job.plan.destinations}


@pytest.mark.parametrize(
    ("engine", "name"),
    [(None, "up"), ((0, 21), "up"), ((0, 20, 3), "mid.up"), ((0, 11), "mid.up"), ((0, 10), "first.up"), ((0, 9), "first.up")],
)
def test_names_by_release(tmp_path, engine, name):
    (tmp_path / "own.toml").write_text(LAYOUT)
    layout = load_descriptor(tmp_path / "own.toml").bind(CONFIG)
    place = Placement(layout, layout.section("vllm").for_version(engine), formats.get("vllm").rules, Mesh(2), engine=engine)
    assert {s.name for s in place.stored() if s.name.endswith("up")} == {f"model.layers.{i}.ffn.{name}" for i in (0, 2)}


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('k = { omit = true, when = "not full" }', "", r"\[vllm\]: nothing holds k \(number 1\)"),
        ('k = { omit = true, when = "not full" }', "k = { omit = true }", "k is held by .*qkv and by k \\(omit\\) \\(number 0, 2\\)"),
        ('down = ".down"\n"""', "", None),
        ('vllm.norm = "/norm"', 'vllm.norm = { name = "/norm", when = "tp > 2" }', "nothing holds norm"),
    ],
)
def test_a_format_holds_every_tensor_once(tmp_path, old, new, says):
    source = write(tmp_path / "hf", shapes(), text=LAYOUT.replace(old, new))
    if says is None:
        reshard.plan(source, format="vllm", tp=2)
        return
    with pytest.raises(LayoutError, match=says) as caught:
        reshard.plan(source, format="vllm", tp=2)
    assert "own.toml" in str(caught.value)


def test_a_stack_of_unequal_layers_is_refused(tmp_path):
    source = write(tmp_path / "hf", shapes(), text=LAYOUT.replace('vllm = "{model}.layers.{layer}"', 'vllm = "{model}.layers"'))
    with pytest.raises(PlanError, match="stack over layers of unequal size"):
        reshard.plan(source, format="vllm")


def test_one_tensor_in_two_places(tmp_path):
    """q k k: one source fills both, and either can be read."""
    text = LAYOUT.replace('of = "q k v", when = "full"', 'of = "q k k", when = "full"').replace("tensors]\nq =", "tensors]\nq =")
    text = text.replace('v = { dims = "(kv* head) width", when = "full" }', 'v = { dims = "(kv* head) width", when = "false" }')
    (tmp_path / "own.toml").write_text(text)
    layout = load_descriptor(tmp_path / "own.toml").bind(CONFIG)
    place = Placement(layout, layout.section("vllm"), formats.get("vllm").rules, Mesh(2))
    fused = next(s for s in place.stored() if s.name == "model.layers.0.attn.qkv")
    (q, _), (k, first), (again, second) = fused.blocks
    assert (q, k, again) == (("q", 0), ("k", 0), ("k", 0)) and first.box == second.box and second.offset - first.offset == first.size


def child(tmp_path, text, parent="llama"):
    (tmp_path / "own.toml").write_text(f'extends = "{parent}"\narchitectures = ["X"]\n{text}')
    return load_descriptor(tmp_path / "own.toml")


def names(descriptor, format, label=None):
    return {e.name for e in descriptor.section(format).entries if label in (None, e.label)}


def test_an_own_entry_takes_the_history_with_it(tmp_path):
    """Alternatives by release and form go with the entry; copies stay, and entries of one table do not take each other away."""
    own = child(tmp_path, '[vllm]\nrouter = ".gate.weight"\n[hf]\nembed = "wte.weight"\n', "qwen3_moe")
    for version in (None, (0, 23, 0), (0, 20, 0), (0, 19, 0), (0, 14, 0)):
        routers = {e.name for e in own.section("vllm").for_version(version).entries if e.of == ("router",)}
        assert routers == {"model.layers.{layer}.mlp.gate.weight"}
    assert names(own, "hf", "tied_head") == {"lm_head.weight"} and names(own, "hf", "embed") == {"model.wte.weight"}


def test_a_fused_own_entry_replaces_all_that_hold_its_tensors(tmp_path):
    own = child(tmp_path, '[hf]\nqkv = { name = ".qkv", of = "q k v" }\n')
    assert not {"q", "k", "v"} & {e.label for e in own.section("hf").entries}
    assert names(own, "hf", "qkv") == {"model.layers.{layer}.self_attn.qkv"} and names(own, "vllm", "qkv") == {
        "model.layers.{layer}.self_attn.qkv_proj.weight"
    }


def test_a_childs_place_overlays_its_parents_key_by_key(tmp_path):
    own = child(tmp_path, '[place.model]\nhf = "model.language_model"\n[place.root]\nvllm = "language_model"\n')
    assert names(own, "hf", "q") == {"model.language_model.layers.{layer}.self_attn.q_proj.weight"} and names(own, "hf", "lm_head") == {
        "lm_head.weight"
    }
    assert names(own, "vllm", "lm_head") == {"language_model.lm_head.weight"} == names(own, "sglang", "lm_head")


def test_false_takes_away(tmp_path):
    own = child(tmp_path, 'megatron = false\n[place.layer]\nparts = ["gqa", "gated_mlp"]\n[tensors]\no_bias = false\n')
    assert "megatron" not in own.formats and {"hf", "vllm", "sglang"} <= set(own.formats) and "o_bias" not in own.tensors


def test_parts_that_differ_ask_for_a_decision(tmp_path):
    use = '[place.layer]\nparts = ["gqa", "gated_mlp", "other"]\n[part.other]\naxes.ffn = "width"\n'
    with pytest.raises(LayoutError, match=r"\[axes\] ffn is 'intermediate_size' in part gated_mlp, 'width' in part other"):
        child(tmp_path, use)
    assert child(tmp_path, use + '[axes]\nffn = "7"\n').axes["ffn"] == "7"


def test_a_table_of_several_formats_and_a_pad_of_all_entries(tmp_path):
    own = child(tmp_path, '["hf, vllm"]\nembed = "wte.weight"\n[vllm]\npad.vocab = "ceil_to(vocab, 7)"\nnorm = "ln.weight"\n')
    assert names(own, "hf", "embed") == {"model.wte.weight"} == names(own, "vllm", "embed") == names(own, "sglang", "embed")
    pads = {format: {e.label: dict(e.pad) for e in own.section(format).entries if e.pad} for format in own.formats}
    assert pads["hf"] == {} and pads["vllm"] == {label: {"vocab": "ceil_to(vocab, 7)"} for label in ("embed", "lm_head", "tied_head")}
    assert "64 * tp" in pads["sglang"]["embed"]["vocab"] and "128 * tp" in pads["megatron"]["lm_head"]["vocab"]
    for text, says in (
        ('["hf, vllm"]\nembed = "a"\n[hf]\nembed = "b"\n', r"\[hf\] embed stands in two tables of hf"),
        ('["hf, torch"]\nembed = "a"\n', r"unknown key 'hf, torch'"),
        ('[vllm]\npad.width = "8"\n', r"\[vllm\] pad uses axis 'width', which \[axes\] does not define"),
    ):
        with pytest.raises(LayoutError, match=says):
            child(tmp_path, text)


def test_releases_before_a_formats_first_are_refused(tmp_path):
    section = child(tmp_path, '[vllm]\nsince = "0.32"\n').section("vllm")
    for version in ((0, 31, 9), (0, 31), (0, 24, 0)):
        with pytest.raises(LayoutError, match="only since 0.32"):
            section.for_version(version)
    assert section.for_version((0, 32, 0)).entries == section.for_version(None).entries == section.for_version((0, 33)).entries
    assert child(tmp_path, '[vllm]\nsince = "0.32"\n').section("sglang").since is None
