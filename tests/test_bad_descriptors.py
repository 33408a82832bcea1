"""Wrong descriptors: each mistake is one LayoutError that names file, table and key. Nothing else comes out."""

import random

import pytest
from bad.descriptors import CONFIG, as_toml, builtin_texts, mutant, use
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reshard.descriptors import layout_dir, load_descriptor
from reshard.errors import LayoutError, PlanError
from reshard.formats import get
from reshard.place import Mesh, Placement

GOOD = """
architectures = ["X"]
[axes]
layer = "num_hidden_layers"
expert = "num_experts"
hidden = "hidden_size"
kv = "num_key_value_heads"
vocab = "vocab_size"
[conditions]
odd = "layer % 2 == 1"
[tensors]
embed = { dims = "vocab* hidden", stage = "first" }
a = "{layer} kv* hidden"
b = { dims = "{layer} kv* hidden", when = "odd" }
e = "{layer} {expert} kv* hidden"
[hf]
embed = "embed"
a = "l.{layer}.a"
b = "l.{layer}.b"
e = "l.{layer}.e.{expert}"
"""


def loaded(tmp_path, text):
    (tmp_path / "x.toml").write_text(text)
    return load_descriptor(tmp_path / "x.toml")


@pytest.mark.parametrize(
    ("old", "new", "place", "says"),
    [
        ('a = "l.{layer}.a"', 'a = "l.{layer.a"', "[hf] a", "brace"),
        ('a = "l.{layer}.a"', 'a = "l.{layer:>999999999}.a"', "[hf] a", "brace"),
        ('a = "l.{layer}.a"', 'a = "l.{}.a"', "[hf] a", "brace"),
        ('[hf]\n', '[hf]\ndrop = ["x.{0.__class__}"]\n', "[hf] drop", "brace"),
        ('[hf]\n', '[hf]\ndrop = ["x.{hidden_size}"]\n', "[hf] drop", "{hidden_size}"),
        ('a = "l.{layer}.a"', 'a = { name = "l.{layer}.a", of = [["a"]] }', "[hf] a", "of must be a list"),
        ('a = "l.{layer}.a"', 'a = { name = "l.{layer}.a", dim = "0" }', "[hf] a", "dim = '0'"),
        ('a = "l.{layer}.a"', 'a = { name = "l.{layer}.a", dim = true }', "[hf] a", "dim = True"),
        ('a = "l.{layer}.a"', 'a = { name = 3 }', "[hf] a", "expected a name"),
        ('a = "l.{layer}.a"', 'a = { name = "l.{layer}.a", pad = { hidden = "64" } }', "[hf] a", "padded inside"),
        ('a = "l.{layer}.a"', 'a = { name = "l.a", pad = { kv = "64" } }', "[hf] a", "padded inside"),
        ('e = "l.{layer}.e.{expert}"', 'e = { name = "l.{layer}.e", view = [[0], [0]] }', "[hf] e", "each once"),
        ('a = "l.{layer}.a"', 'a = { name = "l.{layer}.a", split = ["vocab"] }', "[hf] a", "a has no axis 'vocab'"),
        ('a = "l.{layer}.a"', 'a = { name = "l.{layer}.a", when = 5 }', "[hf] a when", "expression in quotes"),
        ('a = "l.{layer}.a"', 'a = { name = "l.{layer}.a", alias = "yes" }', "[hf] a", "alias must be true or false"),
        ('odd = "layer % 2 == 1"', 'odd = "layer % "', "[conditions] odd", "cannot parse"),
        ('odd = "layer % 2 == 1"', 'hidden = "true"', "[conditions]", "'hidden' is defined in [axes]"),
        ('odd = "layer % 2 == 1"', 'tp = "true"', "[conditions]", "'tp' can't be a name"),
        ('a = "{layer} kv* hidden"', 'a = "{layer} {layer} kv* hidden"', "[tensors] a", "each once"),
        ('[hf]\n', '[hf]\nconstants = { "c{layer}" = { value = 1e300, dtype = "F32" } }\n', "[hf.constants] c{layer}", "does not fit F32"),
        ('[hf]\n', '[hf]\nconstants = { "c" = { value = 1, dtype = "I32" } }\n', "[hf.constants] c", "can't be written"),
        ('[hf]\n', '[hf]\nconstants = { "c" = { value = 1, dtype = "F32", shape = [9999999] } }\n', "[hf.constants] c", "short list"),
        ('[hf]\n', '[hf]\nvariants = { x = { until = "new", a = "l.{layer}.q" } }\n', "[hf.variants.x] until", "not a version"),
        ('[hf]\n', '[hf]\nvariants = { x = 3 }\n', "[hf.variants.x]", "expected a table"),
        ('architectures = ["X"]', 'architectures = ["X"]\nextends = "nowhere"', "extends", "no descriptor 'nowhere'"),
        ('architectures = ["X"]', 'architectures = ["X"]\nextends = 3', "extends", "cannot extend 3"),
        ('architectures = ["X"]', 'architectures = ["X"]\nextends = "x"', "extends", "cannot extend 'x'"),
        ('architectures = ["X"]', 'architectures = ["X"]\ndescription = 3', "description", "must be a text"),
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
        ('kv = "num_key_value_heads"', 'kv = "num_experts - num_experts"', "[tensors] a has no elements: axis kv"),
        ('kv = "num_key_value_heads"', 'kv = "hidden_size * 9000000000000000000"', "2**63 or more"),
        ('odd = "layer % 2 == 1"', 'odd = "odd"', "odd stands for itself"),
        ('odd = "layer % 2 == 1"', 'odd = "hidden_size in 5"', "[conditions] odd: 'hidden_size in 5': cannot compare"),
    ],
)
def test_what_only_a_config_shows_names_the_expression(tmp_path, old, new, says):
    """defects.md A6, M6: values that no size can have, and towers of squares (forty axes, each the last one squared)."""
    with pytest.raises(LayoutError) as caught:
        layout = loaded(tmp_path, GOOD.replace(old, new)).bind(CONFIG)
        layout.exists(layout.descriptor.tensors["b"], 1)
    assert says in str(caught.value) and "x.toml" in str(caught.value) or "has no elements" in str(caught.value), caught.value


def test_forty_squares_end_at_once(tmp_path):
    """defects.md M6: integers had no bound."""
    tower = "\n".join(f'x{i} = "x{i - 1} * x{i - 1}"' if i else 'x0 = "hidden_size"' for i in range(40))
    with pytest.raises(LayoutError, match="2\\*\\*63 or more"):
        loaded(tmp_path, GOOD.replace("[axes]", f"[axes]\n{tower}")).bind(CONFIG)


def test_a_condition_is_a_name_and_no_text_to_replace(tmp_path):
    """defects.md A9: its letters were replaced inside quoted strings too."""
    text = GOOD.replace('when = "odd"', "when = \"odd and kind in ['odd', 'even']\"").replace(
        "[conditions]", "[defaults]\nkind = \"'odd'\"\n[conditions]"
    )
    layout = loaded(tmp_path, text).bind(CONFIG)
    assert [layout.exists(layout.descriptor.tensors["b"], layer) for layer in (0, 1)] == [False, True]


def test_two_entries_of_one_name_are_refused_before_anything_is_written(tmp_path):
    """defects.md A6: job.py failed on an assertion."""
    layout = loaded(tmp_path, GOOD.replace('b = "l.{layer}.b"', 'b = "l.{layer}.a"')).bind(CONFIG)
    from reshard.formats import Target

    placement = Placement(layout, layout.section("hf"), get("tp").rules, Mesh())
    with pytest.raises((LayoutError, PlanError), match=r"l\.1\.a.*a.*b"):
        Target(placement, placement.ranks).by_rank(list(placement.stored()))


def test_files_of_every_family_still_read(tmp_path):
    """Control for the mutants below: what comes with reshard is right, and can be used in each way that they are."""
    for path in layout_dir().glob("*.toml"):
        use(path)


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
