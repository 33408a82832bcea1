"""Pages for people: what they draw is what the plan and the comparison say, and they need nothing from elsewhere."""

import re
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_cli import model, run  # noqa: F401  fixtures

import reshard
from reshard.comparison.heat import Heat
from reshard.geometry.block import Block
from reshard.pages.plan import families, intervals, plan_page


class Checked(HTMLParser):
    """Tags that are closed as they were opened, and nothing that is fetched."""

    def __init__(self):
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attributes):
        assert not {"src", "href", "srcset"} & {name for name, _ in attributes}, f"{tag} fetches something"
        if tag not in ("meta", "rect", "li", "!doctype"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert tag == "rect"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def checked(path: str) -> str:
    text = Path(path).read_text()
    parser = Checked()
    parser.feed(text)
    assert not parser.open and "@import" not in text and "url(" not in text and "http" not in text
    return text


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.data())
def test_intervals_hold_exactly_the_elements_of_a_block(shape, data):
    steps, step = [], 1
    for size in reversed(shape):
        step *= data.draw(st.integers(1, 2))
        steps.append(step)
        step *= size
    strides = tuple(reversed(steps))
    block = Block(tuple((0, size) for size in shape), data.draw(st.integers(0, 5)), strides)
    there = {block.offset + sum(i * s for i, s in zip(index, strides)) for index in np.ndindex(*shape)}
    drawn = [i for start, stop in intervals(block) for i in range(start, stop)]
    assert len(drawn) == len(set(drawn)) and set(drawn) == there


@given(st.lists(st.integers(1, 60), min_size=1, max_size=3), st.data())
def test_a_map_counts_every_element_in_its_cell(shape, data):
    lead = data.draw(st.integers(0, len(shape)))
    box = tuple((low, data.draw(st.integers(low + 1, size))) for size in shape for low in [data.draw(st.integers(0, size - 1))])
    rng = np.random.default_rng(0)
    differs = rng.random([stop - start for start, stop in box]) < 0.1
    heat = Heat(tuple(shape), lead)
    heat.add(box, differs)
    expected = np.zeros_like(heat.counts)
    (high, wide), (down, across) = heat.size, heat.cells
    for index in zip(*np.nonzero(differs)):
        at = [i + start for i, (start, _) in zip(index, box)]
        row = np.ravel_multi_index(at[:lead], shape[:lead]) if lead else 0
        column = np.ravel_multi_index(at[lead:], shape[lead:]) if lead < len(shape) else 0
        expected[row * down // high, column * across // wide] += 1
    assert (heat.counts == expected).all()


def test_the_page_of_a_plan(model, run):  # noqa: F811
    assert run("plan model --to megatron --tp 3 --report plan.html")[0] == 0
    text = checked("plan.html")
    job = reshard.plan("model", format="megatron", tp=3)
    found = {family.tensors: family for family in families(job.plan.join.sources, job.plan.destinations)}
    fused = next(family for names, family in found.items() if set(names) == {"q", "k", "v"})
    assert [s.rank for s in fused.destinations] == [0, 1, 2] and len(fused.sources) == 3
    assert fused.instances == 3 * job.source.layout.layers
    drawn = re.findall(r'aria-label="(q\[[^"]*megatron[^"]*|q\[[^"]*rank_02[^"]*)"', text)
    assert drawn and all("linear_qkv.weight of rank 2" in label for label in drawn)
    assert sum(family.instances for family in found.values()) == len({key for s in job.source.stored for key, _ in s.blocks})


def test_the_page_of_a_comparison_shows_an_exchanged_head(model, run):  # noqa: F811
    from safetensors.numpy import load_file, save_file

    name = "model.layers.1.self_attn.q_proj.weight"
    reshard.convert("model", "other", format="hf", dtype="fp32")
    reshard.convert("model", "wide", format="hf", dtype="fp32")
    state = load_file("other/model.safetensors")
    head = state[name].shape[0] // 9
    state[name][:head], state[name][head : 2 * head] = state[name][head : 2 * head].copy(), state[name][:head].copy()
    save_file(state, "other/model.safetensors", {"format": "pt"})
    Path("other/reshard.json").unlink()
    assert run("diff wide other --report diff.html")[0] == 3
    text = checked("diff.html")
    assert escape(name) in text and text.count("<figure>") == 1
    (difference,) = reshard.diff("wide", "other", maps=True).differing
    rows = difference.heat.counts.sum(axis=1)
    cells = len(rows)
    assert rows[: 2 * cells // 9 - 1].all() and not rows[2 * cells // 9 + 1 :].any(), "two heads of nine, the first two"
    assert difference.heat.counts.sum() == difference.elements
    assert reshard.diff("wide", "other").differing[0].heat is None


def test_equal_checkpoints_have_a_page_too(model, run):  # noqa: F811
    assert run("diff model model --report same.html")[0] == 0
    assert "<figure>" not in checked("same.html")


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", 'a"b'])
def test_names_are_escaped(model, name, monkeypatch):  # noqa: F811
    job = reshard.plan("model", format="tp", tp=3)
    monkeypatch.setattr(type(job.source), "architecture", name)
    text = plan_page(job)
    assert name not in text and escape(name) in text
