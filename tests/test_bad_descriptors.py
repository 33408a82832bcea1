"""Wrong descriptors: each mistake is one LayoutError that names file, table and key. Nothing else comes out."""

import random

import pytest
from bad.descriptors import CONFIG, as_toml, builtin_texts, mutant, use
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reshard.errors import LayoutError, PlanError
from reshard.formats import get
from reshard.layout import Mesh, Placement, builtin_descriptors, load_descriptor
from reshard.layout.files import layout_dir

GOOD = """
architectures = ["X"]
[place.model]
hf = ""
parts = ["ends"]
[place.layer]
count = "num_hidden_layers"
hf = "l.{layer}"
parts = ["block"]
[axes]
hidden = "hidden_size"
[conditions]
odd = "layer % 2 == 1"
[part.ends]
axes.vocab = "vocab_size"
tensors.embed = { dims = "vocab* hidden", stage = "first" }
hf.embed = "embed"
[part.block]
at = "m"
axes.expert = "num_experts"
axes.kv = "num_key_value_heads"
[part.block.tensors]
a = "kv* hidden"
b = { dims = "kv* hidden", when = "odd" }
e = "{expert} kv* hidden"
[part.block.hf]
a = "a"
b = ".b"
e = "e.{expert}"
"""
BLOCK, ENTRY = "part.block: ", 'a = "a"'


def loaded(tmp_path, text):
    (tmp_path / "x.toml").write_text(text)
    return load_descriptor(tmp_path / "x.toml")


@pytest.mark.parametrize(
    ("old", "new", "place", "says"),
    [
        (ENTRY, 'a = "l.{layer.a"', BLOCK + "[hf] a", "brace"),
        (ENTRY, 'a = "l.{layer:>999999999}.a"', BLOCK + "[hf] a", "cannot parse"),
        (ENTRY, 'a = "l.{}.a"', BLOCK + "[hf] a", "brace"),
        (ENTRY, 'a = "l.{layer}.a"', BLOCK + "[hf] a", "only {expert} may stand in a name"),
        (ENTRY, 'a = "l.{expert}.a"', BLOCK + "[hf] a", "not numbered by it"),
        (ENTRY, 'a = "..."', BLOCK + "[hf] a", "is no name"),
        ('[part.block.hf]\n', '[part.block.hf]\ndrop = ["x.{0.__class__}"]\n', BLOCK + "[hf] drop", "cannot parse"),
        ('[part.block.hf]\n', '[part.block.hf]\ndrop = "x"\n', BLOCK + "[hf] drop", "list of texts"),
        (ENTRY, 'a = { name = "a", of = [["a"]] }', BLOCK + "[hf] a: of", "must be a text"),
        (ENTRY, 'a = { name = "a", of = "kv: a (" }', BLOCK + "[hf] a: of", "a group holds nothing"),
        (ENTRY, 'a = { name = "a", of = "a)" }', BLOCK + "[hf] a: of", "brackets do not match"),
        (ENTRY, 'a = { name = "a", of = "hidden: a" }', BLOCK + "[hf] a: of", "a has no axis 'hidden'"),
        (ENTRY, 'a = { name = "a", of = "a embed" }', BLOCK + "[hf] a", "no tensor 'embed'"),
        (ENTRY, 'a = { name = "a", of = "a e" }', BLOCK + "[hf] a", "numbered alike"),
        (ENTRY, 'c = "c"', BLOCK + "[hf] c", "no tensor 'c'"),
        (ENTRY, 'a = { name = "a", dim = 0 }', BLOCK + "[hf] a", "unknown key 'dim'"),
        (ENTRY, 'a = { name = "a", within = "kv" }', BLOCK + "[hf] a", "unknown key 'within'"),
        (ENTRY, 'a = { name = 3 }', BLOCK + "[hf] a", "expected a name"),
        (ENTRY, 'a = []', BLOCK + "[hf] a", "empty list"),
        (ENTRY, 'a = ["a", { name = "b", until = "new" }]', BLOCK + "[hf] a [1]", "not a version"),
        (ENTRY, 'a = ["a", { name = "b", until = "0.3", form = "x" }]', BLOCK + "[hf] a [1]", "until and form"),
        (ENTRY, 'a = { name = "a", dims = "kv" }', BLOCK + "[hf] a", "must hold the axes of a"),
        (ENTRY, 'a = { name = "a", dims = "kv* hidden" }', BLOCK + "[hf] a", "no star"),
        (ENTRY, 'a = { name = "a", dims = "(kv* hidden" }', BLOCK + "[hf] a", "cannot read dims"),
        (ENTRY, 'a = { name = "a", cut = "rows" }', BLOCK + "[hf] a", "cut must be"),
        (ENTRY, 'a = { name = "a", cut = "whole", align = "16" }', BLOCK + "[hf] a", "align does not go with"),
        (ENTRY, 'a = { name = "a", align = { b = "16" } }', BLOCK + "[hf] a", "align names 'b'"),
        (ENTRY, 'a = { name = "a", align = 16 }', BLOCK + "[hf] a: align", "expression in quotes"),
        (ENTRY, 'a = { name = "a", pad = { kv = false } }', BLOCK + "[hf] a: [pad] kv", "expression in quotes"),
        (ENTRY, 'a = { name = "a", pad = { vocab = "64" } }', BLOCK + "[hf] a", "pad names axis 'vocab', which a do not have"),
        (ENTRY, 'a = { name = "a", split = ["vocab"] }', BLOCK + "[hf] a", "split names axis 'vocab'"),
        (ENTRY, 'a = { name = "a", split = ["nothing"] }', BLOCK + "[hf] a", "[axes] does not define"),
        (ENTRY, 'a = { name = "a", view = 3 }', BLOCK + "[hf] a", "view must list"),
        (ENTRY, 'a = { name = "a", when = 5 }', BLOCK + "[hf] a: when", "expression in quotes"),
        (ENTRY, 'a = { name = "a", copy = "yes" }', BLOCK + "[hf] a: copy", "true or false"),
        (ENTRY, 'a = { name = "a", transform = "square" }', BLOCK + "[hf] a", "unknown transform"),
        (ENTRY, 'a = { name = "a", scheme = "fp8" }', BLOCK + "[hf] a", "can only say none"),
        (ENTRY, 'a = { name = "a", dtype = "F31" }', BLOCK + "[hf] a", "unknown dtype"),
        (ENTRY, 'a = { name = "a", stage = "third" }', BLOCK + "[hf] a", "stage must be"),
        (ENTRY, 'a = { omit = true, name = "x" }', BLOCK + "[hf] a", "unknown key 'name'"),
        (ENTRY, 'a = false', BLOCK + "[hf] a = false", "none to take away"),
        (ENTRY, 'a = "a"\nc = { name = "c", constant = 1e300, dtype = "F32" }', BLOCK + "[hf] c", "does not fit F32"),
        (ENTRY, 'a = "a"\nc = { name = "c", constant = 1, dtype = "I32" }', BLOCK + "[hf] c", "can't be written"),
        (ENTRY, 'a = "a"\nc = { name = "c", constant = 1, dtype = "F32", shape = [9999999] }', BLOCK + "[hf] c", "short list"),
        (ENTRY, 'a = "a"\nc = { name = "c", constant = 1 }', BLOCK + "[hf] c", "needs a value and a dtype"),
        ('e = "e.{expert}"', 'e = "e.{expert}"\n[hf]\na = false\nz = false', "[hf] z = false", "none to take away"),
        ('e = "e.{expert}"', 'e = "e.{expert}"\n[hf]\nab = { name = "x", of = "a embed" }', "[hf] ab", "do not stand in one place"),
        ('e = "e.{expert}"', 'e = "e.{expert}"\n[hf]\nc = { name = "c", constant = 1, dtype = "F32" }', "[hf] c", "needs a part"),
        ('e = "e.{expert}"', 'e = "e.{expert}"\n[tensors]\nq = "hidden"', "[tensors] q", "no part in use has this tensor"),
        ('e = "e.{expert}"', 'e = "e.{expert}"\n[tensors]\nq = false', "[tensors] q", "none to take away"),
        ('e = "e.{expert}"', 'e = "e.{expert}"\n[hf]\ndrop = ["x"]', "[hf] drop", "must begin with /"),
        ('e = "e.{expert}"', 'e = "e.{expert}"\n[vllm]\na = "x"', "[vllm]", "no place has a prefix"),
        ('e = "e.{expert}"', 'e = "e.{expert}"\n[sglang]\nlike = "trtllm"', "[sglang] like = 'trtllm'", "no other format"),
        ('e = "e.{expert}"', 'e = "e.{expert}"\n[sglang]\nlike = "sglang"', "[sglang] like = 'sglang'", "no other format"),
        ('at = "m"', "", BLOCK + "[hf] b", "has no at for hf"),
        ('at = "m"', "at = 3", "part.block", "at must be"),
        ('at = "m"', 'at = { hg = "m" }', "part.block: at", "unknown key 'hg'"),
        ('a = "kv* hidden"', 'a = "kv* hiden"', BLOCK + "[tensors] a", "uses axis 'hiden'"),
        ('a = "kv* hidden"', 'a = "(kv* hidden"', BLOCK + "[tensors] a", "cannot read dims"),
        ('a = "kv* hidden"', 'a = "kv* kv"', BLOCK + "[tensors] a", "an axis stands twice"),
        ('a = "kv* hidden"', 'a = "2 hidden"', BLOCK + "[tensors] a", "'2' is no axis"),
        ('a = "kv* hidden"', 'a = "{layer} kv* hidden"', BLOCK + "[tensors] a", "not {layer}"),
        ('a = "kv* hidden"', 'a = { dims = "kv* hidden", whn = "odd" }', BLOCK + "[tensors] a", "unknown key 'whn'"),
        ('a = "kv* hidden"', 'a = false', BLOCK + "[tensors] a", "nothing to take away"),
        ('odd = "layer % 2 == 1"', 'odd = "layer % "', "[conditions] odd", "cannot parse"),
        ('odd = "layer % 2 == 1"', 'hidden = "true"', "", "'hidden' is an axis and a condition"),
        ('odd = "layer % 2 == 1"', 'tp = "true"', "[conditions]", "'tp' can't be a name"),
        ('odd = "layer % 2 == 1"', "odd = \"__import__('os')\"", "[conditions] odd", "Call is not allowed"),
        ('hidden = "hidden_size"', "hidden = 4", "[axes] hidden", "expression in quotes"),
        ('hidden = "hidden_size"', 'vocab = "1"', "", "uses axis 'hidden'"),
        ('count = "num_hidden_layers"', "count = 3", "[place.layer] count", "expression in quotes"),
        ('count = "num_hidden_layers"', 'cout = "3"', "[place.layer]", "unknown key 'cout'"),
        ('count = "num_hidden_layers"', 'count = "3"\ncarry = true', "[place.layer]", "carry and count together"),
        ('hf = "l.{layer}"', 'hf = "l.{model.x"', "[place.layer] hf", "brace"),
        ('hf = "l.{layer}"', 'hf = []', "[place.layer] hf", "needs a prefix"),
        ('hf = ""', 'hf = "{layer}"', "[place.model] hf", "another place without a count"),
        ('parts = ["block"]', 'parts = ["blok"]', "[place.layer] parts: blok", "no such part"),
        ('parts = ["block"]', 'parts = "block"', "[place.layer] parts", "must be a list"),
        ('parts = ["block"]', 'parts = [{ part = "block", wen = "odd" }]', "[place.layer] parts: block", "unknown key 'wen'"),
        ('parts = ["block"]', 'parts = ["block", "block"]', "place layer", "both have tensor 'a'"),
        ('[place.model]', '[place]\nx = false\n[place.model]', "[place] x = false", "no such place"),
        ('architectures = ["X"]', "", "", "architectures must list"),
        ('architectures = ["X"]', 'architectures = "X"', "architectures", "list of texts"),
        ('architectures = ["X"]', 'architectures = ["X"]\nextends = "nowhere"', "extends", "cannot extend 'nowhere'"),
        ('architectures = ["X"]', 'architectures = ["X"]\nextends = "../llama"', "", "cannot extend"),
        ('architectures = ["X"]', 'architectures = ["X"]\nextends = 3', "", "cannot extend 3"),
        ('architectures = ["X"]', 'architectures = ["X"]\nextends = "x"', "extends", "cannot extend 'x'"),
        ('architectures = ["X"]', 'architectures = ["X"]\ndescription = 3', "description", "must be a text"),
        ('architectures = ["X"]', 'architectures = ["X"]\nreplicate = "kv"', "replicate", "list of texts"),
        ('architectures = ["X"]', 'architectures = ["X"]\nreplicate = ["heads"]', "replicate", "[axes] does not define"),
        ('architectures = ["X"]', 'architectures = ["X"]\nhg = 3', "", "unknown key 'hg'"),
        ("[axes]", "[axes", "", "layout"),
    ],
)  # fmt: skip
def test_every_mistake_names_file_table_and_key(tmp_path, old, new, place, says):
    """defects.md A5, A6, L1: tracebacks, or accepted and wrong later."""
    assert GOOD.count(old) == 1
    with pytest.raises(LayoutError) as caught:
        loaded(tmp_path, GOOD.replace(old, new))
    text = str(caught.value)
    assert str(tmp_path / "x.toml") in text and place in text and says in text, text


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('kv = "num_key_value_heads"', 'kv = "ceil_to(hidden_size, 0)"', "[axes] kv: 'ceil_to(hidden_size, 0)': ceil_to a multiple of 0"),
        ('kv = "num_key_value_heads"', 'kv = "len(hidden_size)"', "[axes] kv: 'len(hidden_size)': len of 16, which is no list"),
        ('kv = "num_key_value_heads"', 'kv = "kv_heads"', "[axes] kv: 'kv_heads': config.json has no 'kv_heads'"),
        ('kv = "num_key_value_heads"', 'kv = "hidden_size / 3"', "16 is not divisible by 3"),
        ('kv = "num_key_value_heads"', 'kv = "0 - 1"', "is -1, not a size"),
        ('kv = "num_key_value_heads"', 'kv = "kinds[9]"', "there is no item 9: it has 2"),
        ('kv = "num_key_value_heads"', 'kv = "hidden_size * 9000000000000000000"', "2**63 or more"),
        ('count = "num_hidden_layers"', 'count = "0 - 2"', "[place.layer] count = '0 - 2' is -2"),
        ('count = "num_hidden_layers"', 'count = "5000"', "more than the 4096 allowed"),
        ('odd = "layer % 2 == 1"', 'odd = "even"\neven = "not odd"', "is defined by itself"),
        ('odd = "layer % 2 == 1"', 'odd = "hidden_size in 5"', "[conditions] odd: 'hidden_size in 5': cannot compare"),
    ],
)
def test_what_only_a_config_shows_names_the_expression(tmp_path, old, new, says):
    """defects.md A6, M6: values that no size can have, and towers of squares (forty axes, each the last one squared)."""
    with pytest.raises(LayoutError) as caught:
        layout = loaded(tmp_path, GOOD.replace(old, new)).bind(CONFIG | {"kinds": ["x", "y"]})
        layout.exists(layout.descriptor.tensors["b"], 1)
    assert says in str(caught.value), caught.value


def test_forty_squares_end_at_once(tmp_path):
    """defects.md M6: integers had no bound."""
    tower = "\n".join(f'x{i} = "x{i - 1} * x{i - 1}"' if i else 'x0 = "hidden_size"' for i in range(40))
    text = GOOD.replace("[axes]", f"[axes]\n{tower}").replace('a = "kv* hidden"', 'a = "kv* x39"')
    with pytest.raises(LayoutError, match="2\\*\\*63 or more"):
        loaded(tmp_path, text).bind(CONFIG)


def test_a_condition_is_a_name_and_no_text_to_replace(tmp_path):
    """defects.md A9: its letters were replaced inside quoted strings too."""
    text = GOOD.replace('when = "odd"', "when = \"odd and kind in ['odd', 'even']\"").replace(
        "[conditions]", "[defaults]\nkind = \"'odd'\"\n[conditions]"
    )
    layout = loaded(tmp_path, text).bind(CONFIG)
    assert [layout.exists(layout.descriptor.tensors["b"], layer) for layer in (0, 1)] == [False, True]


def test_two_entries_of_one_name_are_refused_before_anything_is_written(tmp_path):
    """defects.md A6: job.py failed on an assertion."""
    layout = loaded(tmp_path, GOOD.replace('b = ".b"', 'b = "a"')).bind(CONFIG)
    from reshard.formats import Target

    placement = Placement(layout, layout.section("hf"), get("tp").rules, Mesh())
    with pytest.raises((LayoutError, PlanError), match=r"l\.1\.a.*a.*b"):
        Target(placement, placement.ranks).by_rank(list(placement.stored()))


def test_files_of_every_family_still_read(tmp_path):
    """Control for the mutants below: what comes with reshard is right, and can be used in each way that they are."""
    for family in builtin_descriptors():
        use(layout_dir() / f"{family}.toml")


@settings(
    max_examples=250, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.integers(0, 2**32))
def test_no_mutant_of_a_descriptor_gives_anything_but_a_layout_error(tmp_path, seed):
    """defects.md A6, L1: letters, lines and values changed at random; what loads can also be bound and placed."""
    (tmp_path / "x.toml").write_bytes(as_toml(mutant(random.Random(seed), builtin_texts())))
    try:
        use(tmp_path / "x.toml")
    except (LayoutError, PlanError) as error:
        assert "content is malformed" not in str(error), error
