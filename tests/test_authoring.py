"""`layouts check` finds what is wrong in a descriptor without weights; `layouts new` drafts one, and counts what it gets right."""

import json
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from click.testing import CliRunner

from reshard.authoring.draft import draft
from reshard.authoring.frameworks import Loaded, engine_entries
from reshard.authoring.review import doubts, review
from reshard.cli import cli
from reshard.errors import ReshardError
from reshard.layout import builtin_descriptors, load_descriptor

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
from check_drafts import judged  # noqa: E402
from family_checkpoints import DATA, checkpoint  # noqa: E402

OLMO2_AS_LLAMA = """
extends = "llama"
architectures = ["Olmo2ForCausalLM"]
[place.layer]
parts = ["gqa", "gated_mlp", "own"]
[tensors]
attn_norm = false
[part.own]
tensors.mlp_post = "hidden"
hf.mlp_post = "post_feedforward_layernorm.weight"
vllm.mlp_post = "post_feedforward_layernorm.weight"
megatron.mlp_post = "post.weight"
"""


def config(family: str) -> dict:
    return json.loads((DATA / f"{family}.json").read_text())["config"]


def own(tmp_path: Path, text: str):
    (tmp_path / "own.toml").write_text(text)
    return load_descriptor(tmp_path / "own.toml")


@pytest.mark.parametrize("family", ["llama_biases", "olmo2", "gpt2", "opt_350m", "falcon_40b", "gpt_neox"])
def test_a_builtin_descriptor_is_consistent(family):
    descriptor = next(d for d in builtin_descriptors().values() if config(family)["architectures"][0] in d.architectures)
    found = review(descriptor, config(family))
    assert not [f for f in found if f.wrong] and sum(not f.cannot for f in found) > 0.7 * len(found)
    assert {f.format for f in found} >= {"hf", "tp", "rank-pt", "vllm"}
    one, two = (next(f for f in found if f.format == "tp" and f.mesh.tp == tp and f.mesh.pp == 1) for tp in (1, 2))
    assert one.largest // 2 <= two.largest < one.largest and two.tensors == 2 * one.tensors
    assert doubts(descriptor) == []


@pytest.mark.parametrize(
    ("text", "format", "says"),
    [
        ('[vllm]\nnorm = { name = "norm.weight", when = "tp < 4" }\n', "vllm", "nothing holds norm"),
        ('[vllm]\nnorm = "embed_tokens.weight"\n', "vllm", "two entries of the layout store something under this name"),
        ('[hf]\no = { name = ".o_proj.weight", when = "layer == 0" }\n', "hf", r"nothing holds o \(number 1\)"),
    ],
)
def test_what_is_inconsistent_is_told_for_its_format_alone(tmp_path, text, format, says):
    found = review(own(tmp_path, 'extends = "llama"\narchitectures = ["X"]\n' + text), config("llama"))
    wrong = [f for f in found if f.wrong]
    assert all(re.search(says, " ".join(f.wrong)) for f in wrong if f.format == format)
    assert format in {f.format for f in wrong} and ("tp" in {f.format for f in wrong}) == (format == "hf")
    if "tp < 4" in text:
        assert {f.mesh.tp for f in wrong} == {4, 8}


def test_the_norm_that_stands_elsewhere_is_asked_about(tmp_path):
    asked = doubts(own(tmp_path, OLMO2_AS_LLAMA))
    assert len(asked) == 1 and "post_attention_layernorm.weight holds mlp_norm" in asked[0] and "Megatron-LM" in asked[0]
    assert not any(doubts(d) for d in builtin_descriptors().values())


def test_a_parents_tensors_may_go_with_its_own_entries(tmp_path):
    """GLM-4 without the norms that its own [hf] and [vllm] rename."""
    descriptor = own(tmp_path, 'extends = "glm4"\narchitectures = ["X"]\n[tensors]\nattn_post_norm = false\nmlp_post_norm = false\n')
    assert not [f for f in review(descriptor, config("glm")) if f.wrong]


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "phi3", "gemma2", "glm4", "starcoder2", "nemotron"])
def test_a_draft_is_right_unaided(family, tmp_path):
    """As if its own descriptor were not known; the judge is that descriptor's cut, byte for byte. All: scripts/check_drafts.py."""
    status, detail = judged(family, tmp_path, {})
    assert status == "right", detail


def test_a_draft_marks_what_the_files_cannot_tell(tmp_path):
    """OLMo 2's norm over all queries has as many weights as the hidden state: which it is, and whether it is split, a person decides."""
    status, _ = judged("olmo2", tmp_path, {}, frozenset(("olmo2", "olmo3")))
    text = (tmp_path / "draft.toml").read_text()
    line = next(line for line in text.splitlines() if line.startswith("self_attn_q_norm ="))
    assert status == "opens" and "DECIDE" in line
    assert "vllm = false" in text and "megatron = false" in text


def test_check_and_new_from_the_command_line(tmp_path):
    source, run = checkpoint("qwen3", tmp_path / "hf"), CliRunner().invoke
    settings = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(settings | {"architectures": ["NewForCausalLM"]}))
    made = run(cli, ["layouts", "new", str(source), "-o", str(tmp_path / "new.toml")])
    assert made.exit_code == 0 and "nothing to decide" in made.output, made.output
    assert (tmp_path / "new.toml").read_text() == 'extends = "qwen3"\narchitectures = ["NewForCausalLM"]\n'
    checked = run(cli, ["layouts", "check", str(tmp_path / "new.toml"), "--config", str(source), "--json"])
    assert checked.exit_code == 0 and json.loads(checked.output)["ok"]
    again = run(cli, ["layouts", "new", str(source), "-o", str(tmp_path / "new.toml")])
    assert again.exit_code != 0 and "is there already" in str(again.exception)
    (tmp_path / "new.toml").write_text(
        'extends = "qwen3"\narchitectures = ["X"]\n[vllm]\nnorm = { name = "norm.weight", when = "tp < 4" }\n'
    )
    checked = run(cli, ["layouts", "check", str(tmp_path / "new.toml"), "--config", str(source)])
    assert checked.exit_code == 3 and "INCONSISTENT" in checked.output and "nothing holds norm" in checked.output
    with pytest.raises(Exception, match="no descriptor that is known"):
        draft(source, without=frozenset(builtin_descriptors()))


def test_what_vllm_told_is_written_where_it_differs():
    """Of Llama's own parameters nothing; a norm that is an own tensor, a router in float32 and two halves in another order are."""
    layout = builtin_descriptors()["llama"].bind(config("llama"))
    at = "model.layers.0."
    held = {"model.layers.*.q": ("q",), "model.layers.*.k": ("k",), "model.layers.*.v": ("v",), "model.layers.*.own": ("own",),
            "model.layers.*.gate": ("gate",), "model.layers.*.up": ("up",), "lm_head.weight": ("lm_head",)}  # fmt: skip
    qkv, fused = at + "self_attn.qkv_proj.weight", at + "mlp.gate_up_proj.weight"
    plain = {at + "q": [Loaded(qkv, 0, "colwise", False)], at + "k": [Loaded(qkv, 1, "colwise", False)], at + "v": [Loaded(qkv, 2, "colwise", False)],
             at + "gate": [Loaded(fused, 0, "colwise", False)], at + "up": [Loaded(fused, 1, "colwise", False)],
             "lm_head.weight": [Loaded("lm_head.weight", 0, "colwise", False)]}  # fmt: skip
    assert engine_entries(layout, held, plain) == []
    turned = plain | {at + "gate": [Loaded(fused, 1, "colwise", False)], at + "up": [Loaded(fused, 0, "colwise", False)],
                      at + "own": [Loaded(at + "router.weight", 0, "replicated", True)]}  # fmt: skip
    assert engine_entries(layout, held, turned) == [
        'up = { name = "mlp.gate_up_proj.weight", of = "up gate" }',
        'own = { name = "router.weight", of = "own", dtype = "F32" }',
    ]
    elsewhere = {at + "own": [Loaded("transformer.h.0.own", 0, None, False)]}
    assert engine_entries(layout, held, elsewhere) is None  # no entry can say it: left to a person


def test_a_draft_that_asks_for_what_is_not_here_says_so(tmp_path):
    source = checkpoint("llama", tmp_path / "hf")
    if find_spec("vllm"):
        pytest.skip("vLLM is installed")
    with pytest.raises(ReshardError, match="--from-vllm needs vLLM"):
        draft(source, from_vllm=True)
