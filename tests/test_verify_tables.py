"""verify's tables of names and cuts: strict, complete for all that is written anywhere, and enough for a new family by themselves."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from reshard import formats
from reshard.errors import FormatError, LayoutError
from reshard.layout import Mesh, Placement, find_descriptor
from reshard.layout.model import parse_version
from reshard.verify.tables import TABLES, engine_of, engines, families, rows_of, table

#: whose config has words of its own for sizes
OLDER = {
    "gpt2": [("gpt2", {})],
    "opt": [("opt", {"word_embed_proj_dim": 128})],
    "falcon": [("falcon_7b", {"parallel_attn": False}), ("falcon_11b", {}), ("falcon_40b", {})],
}
DISTRIBUTED = (
    "dist",
    "local_dist",
    "singleton",
    "fsdp",
    "fsdp_sequential",
)  # forms of torch_dist and fsdp_dtensor, which verify does not run
SAMPLES = Path(__file__).parents[2] / "shared" / "samples"
BUILT_IN = ("llama", "qwen2", "qwen3", "phi3", "gpt_neox", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")


@pytest.mark.parametrize("family, format, stored, name, cut", [
    ("mixtral", "hf", "model.layers.3.block_sparse_moe.experts.2.w3.weight", "model.layers.3.mlp.experts.2.up_proj.weight", "experts"),
    ("llama", "tp", "model.layers.3.self_attn.q_proj.weight", "model.layers.3.self_attn.q_proj.weight", "column"),
    ("gpt_oss", "vllm", "model.layers.3.attn.qkv_proj.bias", "model.layers.3.self_attn.qkv_proj.bias", "column"),
    ("deepseek_v3", "vllm", "model.layers.3.self_attn.mla_attn.o_proj.weight", "model.layers.3.self_attn.o_proj.weight", "row"),
    ("gpt_oss", "vllm", "model.layers.3.mlp.experts.routed_experts.w13_bias", "model.layers.3.mlp.experts.gate_up_proj_bias", "experts"),
    ("deepseek_v3", "vllm", "model.layers.3.mlp.experts._shared_experts._layer.down_proj.weight", "model.layers.3.mlp.shared_experts.down_proj.weight", "row"),
    ("qwen3_moe", "sglang", "model.layers.3.mlp.experts.w2_weight", "model.layers.3.mlp.experts.down_proj", "experts"),
    ("deepseek_v3", "sglang", "model.layers.3.self_attn.fused_qkv_a_proj_with_mqa.weight", "model.layers.3.self_attn.qkv_a_proj.weight", "whole"),
    ("llama", "megatron", "decoder.layers.3.self_attention.linear_qkv.layer_norm_weight", "model.layers.3.input_layernorm.weight", "whole"),
    ("mixtral", "megatron", "decoder.layers.3.mlp.experts.linear_fc1.weight11", "model.layers.3.mlp.experts.11.gate_up_proj.weight", "experts"),
    ("llama", "megatron", "output_layer.weight", "lm_head.weight", "vocabulary"),
    ("olmo2", "hf", "model.layers.3.self_attn.q_norm.weight", "model.layers.3.self_attn.q_norm.weight", "whole"),
])  # fmt: skip
def test_names(family, format, stored, name, cut):
    row, layer, expert = table(family, engine_of()[format].name).find(stored)
    assert f"{row.path}.{row.kind}".format(layer=layer, expert=expert) == name and row.cut == cut


@pytest.mark.parametrize("format, name, kind", [
    ("hf", "model.layers.3.self_attn.rotary_emb.inv_freq", "ignored"), ("vllm", "model.layers.3.self_attn.attn._k_scale", "scales"),
    ("megatron", "decoder.layers.3.self_attention.core_attention._extra_state", "ignored"), ("hf", "mtp.fc.weight", "prediction"),
    ("vllm", "model.layers.3.self_attn.attn.k_scales", None), ("vllm", "model.layers.3.mlp.k_scale", None), ("hf", "model.norm.weight", None), ("megatron", "x_extra_state", None),
])  # fmt: skip
def test_what_is_no_weight(format, name, kind):
    assert engine_of()[format].kind_beside(name) == kind


@pytest.mark.parametrize("name", [
    "model.layers.3.self_attn.q_proj.weight",  # fused in this engine
    "model.layers.03.mlp.down_proj.weight", "model.layers.3.mlp.down_proj.weight2", "model.layers.x.mlp.down_proj.weight", "x.lm_head.weight",
    "model.layers.3.self_attn.sinks", "modelXnorm.weight",
])  # fmt: skip
def test_names_that_no_row_has(name):
    assert table("llama", "vllm").find(name) is None


def test_one_leaf_means_another_thing_in_another_family():
    """A name is looked up in its own family's table alone."""

    def words(family, name):
        row = table(family, "hf").find(name)[0]
        return row.cut, row.holds, row.gathered

    norm = "model.layers.0.self_attn.q_norm.weight"
    assert words("qwen3", norm) == ("whole", (), "") and words("olmo2", norm) == ("whole", (), "q_proj")
    assert table("llama", "hf").find(norm) is None and table("starcoder2", "hf").find("model.layers.0.mlp.down_proj.weight") is None
    for model_type in families():
        for engine in engines():
            if rows_of(families()[model_type], engine):
                table(model_type, engine)  # no name has two rows


def test_a_model_type_that_has_no_table():
    with pytest.raises(FormatError, match="no table of how vllm names and cuts starcoder2") as error:
        table("starcoder2", "vllm")
    assert "llama" in str(error.value) and "permute" in error.value.hint


GOOD = """model_types = ["made_up"]
[[group]]
engines = ["hf"]
stored = "model.layers.{layer}"
[group.rows]
"a.{kind}" = { cut = "column", holds = ["query"] }
"""


@pytest.mark.parametrize("change, said", [
    (('cut = "column"', 'cut = "columns"'), "made_up.toml: group 1 'a.{kind}': unknown cut 'columns'"),
    (('holds = ["query"]', 'hold = ["query"]'), "made_up.toml: group 1 'a.{kind}': unknown key 'hold'"),
    (('holds = ["query"]', 'holds = ["queries"]'), "'a.{kind}' holds: unknown word 'queries'"),
    (('holds = ["query"]', 'holds = "query"'), "'a.{kind}' holds is 'query', and should be a list of texts"),
    (('holds = ["query"]', "local = true"), "'a.{kind}': 'local' is no word for cut 'column'"),
    (('holds = ["query"]', "order = 3"), "'a.{kind}': order is 3, and should be a text"),
    (('holds = ["query"]', 'parts = ["a", "b"], holds = ["query"]'), "'a.{kind}': 2 parts, but it holds 1"),
    (('holds = ["query"]', 'to = "b.{expert}.{kind}"'), "'a.{kind}': model.layers.{layer}.a.weight and model.layers.{layer}.b.{expert}.weight do not have"),
    (('"a.{kind}"', '"a.{king}"'), "do not have the same braces"),
    (('{ cut = "column", holds = ["query"] }', "{ }"), "'a.{kind}': unknown cut None"),
    (('{ cut = "column", holds = ["query"] }', "7"), "'a.{kind}' is 7, and should be a table"),
    (('engines = ["hf"]', 'engines = ["hg"]'), "made_up.toml: group 1 engines: unknown word 'hg'"),
    (('engines = ["hf"]', ""), "made_up.toml: group 1 engines is None"),
    (("stored =", "store ="), "made_up.toml: group 1: unknown key 'store'"),
    (("[[group]]", "[[groups]]"), "made_up.toml: unknown key 'groups'"),
    (("[[group]]", "use = { nothing = 'every' }\n[[group]]"), "nothing.toml can't be read"),
    (("[[group]]", "use = { llama = 'hf' }\n[[group]]"), "made_up.toml: [use] llama is 'hf'"),
    (('"a.{kind}"', '"a.weight" = "whole"\n"a.{kind}"'), "a name like model.layers.0.a.weight matches made_up.toml: group 1 'a.weight' too"),
    (('"a.{kind}"', '"1.{kind}" = "whole"\n"{expert}.{kind}" = { cut = "experts", holds = ["up"], to = "b.{expert}.{kind}" }\n"a.{kind}"'), "made_up.toml: group 1 '1.{kind}' too"),
    (('["made_up"]', '["llama"]'), "model_types: llama is in "),
    (("model_types", "model_types = ["), "made_up.toml can't be read"),
])  # fmt: skip
def test_a_wrong_table_is_told_by_file_table_and_key(change, said, tmp_path):
    assert change[0] in GOOD
    for folder, text in (("good", GOOD), ("bad", GOOD.replace(*change, 1))):
        shutil.copytree(TABLES, tmp_path / folder)
        (tmp_path / folder / "made_up.toml").write_text(text)
    assert table("made_up", "hf", tmp_path / "good").find("model.layers.1.a.bias")
    with pytest.raises(LayoutError) as error:
        table("made_up", "hf", tmp_path / "bad")
    assert said in str(error.value)


def written_names(engine: str, config: dict) -> set[str]:
    """Every name that the descriptor of `config` has for `engine`, in any release and any form but those of other folders than legacy ones."""
    layout = find_descriptor(config).bind(config)
    if engine not in layout.descriptor.formats:
        return set()
    base = layout.section(engine)
    sections = [base, *(base.overlaid(variant) for name, _, variant in base.variants if name not in DISTRIBUTED)]
    releases = [r for r in ((0, 11, 2), (0, 19, 1), (0, 20, 2), (0, 23, 0)) if engine == "vllm" and r >= parse_version(base.since or "0.0")]
    sections += [base.for_version(release) for release in releases]
    rules = formats.get(engine).rules
    return {
        stored.name
        for section in sections
        for mesh in (Mesh(1), Mesh(1, pp=2))
        for stored in Placement(layout, section, rules, mesh).stored()
    }


def small_model_names(model_type: str, folder: Path) -> set[str]:
    """The names that transformers itself gives a small model's tensors, in memory and in files, as on the Hub."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from safetensors import safe_open

    sys.path.append(str(Path(__file__).parents[1] / "scripts"))
    import tiny_models
    from verify_families import make

    names = set()
    for family, changes in OLDER.get(model_type, [("", {})]):
        config = tiny_models.families()[family]["config"] | changes if family else None
        model = tiny_models.make(config, folder) if config else make(model_type, folder)
        with safe_open(folder / "model.safetensors", "np") as file:
            names |= {*model.state_dict(), *file.keys()}
    return names


@pytest.mark.models
@pytest.mark.samples
def test_every_stored_name_has_one_row_and_every_row_a_name(tmp_path):
    """Rows that nothing uses are guesses; names without a row are refused. Descriptors, engines' own files and transformers must agree."""
    used, rows = set(), {}
    for model_type in families():
        for engine in engines():
            if not (own := rows_of(families()[model_type], engine)):
                continue
            names = set()
            if model_type in BUILT_IN:
                config = json.loads((SAMPLES / "hf" / model_type / "config.json").read_text())
                names = written_names(engine, config) | (
                    written_names(engine, config | {"q_lora_rank": None}) if "q_lora_rank" in config else set()
                )
            elif engine == "hf":
                names = small_model_names(model_type, tmp_path / model_type)
            elif model_type in OLDER:
                names = written_names(engine, json.loads((tmp_path / model_type / "config.json").read_text()))
            found = {name: table(model_type, engine).find(name) for name in names}
            assert [name for name, match in found.items() if match is None] == [], (model_type, engine)
            used |= {key(match[0]) for match in found.values()}
            rows |= {key(row): row for row in own}
    assert sorted(str(rows[key]) for key in rows.keys() - used) == []


def key(row) -> tuple[str, str]:
    """A row as its file has it, weight and bias together, each of its other spellings apart."""
    return row.where, re.sub("weight|bias", "", row.pattern)


@pytest.mark.samples
@pytest.mark.parametrize(
    "folder", ["llama-tp2", "llama-tp2-pp2", "qwen2-tp2", "phi3-tp2", "qwen3-moe-tp2", "gpt-oss-tp2", "deepseek-v3-tp2"]
)
def test_names_that_vllm_wrote(folder):
    model_type = folder.rpartition("-tp2")[0].removesuffix("-tp2").replace("-", "_")
    model_type = model_type if model_type in families() else "llama"
    engine = engine_of()["vllm"]
    stored = {piece.name for piece in formats.get("vllm").read(SAMPLES / "vllm" / folder).pieces}
    assert stored and [name for name in stored if not engine.kind_beside(name) and table(model_type, "vllm").find(name) is None] == []


@pytest.mark.samples
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3_moe", "deepseek_v3"])
def test_names_that_megatron_reads(model_type):
    engine = engine_of()["megatron"]
    stored = {piece.name for piece in formats.get("megatron").read(SAMPLES / "megatron" / model_type / "legacy_tp2").pieces}
    assert stored and [name for name in stored if not engine.kind_beside(name) and table(model_type, "megatron").find(name) is None] == []


def test_no_architecture_and_no_engine_is_named_in_python():
    """Only tables name them. (Megatron's args beside config.json are settings, not names and cuts.)"""
    words = {*families(), *(engine for engine in engines() if engine != "hf")} - {"phi"}
    for path in sorted(TABLES.parent.glob("*.py")):
        if path.name == "settings.py":
            continue
        code = "\n".join(line.partition("#")[0] for line in re.sub(r'""".*?"""', "", path.read_text(), flags=re.S).splitlines())
        assert [word for word in words if re.search(rf"\b{word}\b", code)] == [], path.name
