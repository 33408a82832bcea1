"""The join against a brute-force one, block by block; and a plan as a value: pickled, compared, hashed, divided."""

import json
import pickle
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path

import pytest

import reshard
from reshard import formats
from reshard.demo import make_model
from reshard.errors import ReshardError
from reshard.geometry.block import overlap
from reshard.layout.find import find_descriptor
from reshard.layout.mesh import Mesh
from reshard.layout.place import Placement
from reshard.planner.join import join

SAMPLES = Path(__file__).parents[2] / "shared" / "samples" / "hf"
FAMILIES = ("llama-oddvocab", "qwen2", "phi3", "gpt_neox", "mixtral", "gpt_oss", "deepseek_v3")
MESHES = (Mesh(), Mesh(2), Mesh(4), Mesh(3), Mesh(2, 2), Mesh(4, 1, 2, 1))


@cache
def sides(family: str) -> list:
    """(format, mesh, stored tensors) of everything that can cut the model."""
    layout = find_descriptor(config := json.loads((SAMPLES / family / "config.json").read_text())).bind(config)
    found = []
    for name, mesh in product(("hf", "tp", "vllm", "megatron"), MESHES):
        kind = formats.get(name)
        try:
            placement = Placement(layout, layout.section(kind.section), kind.rules, mesh)
            stored = list(placement.stored())
        except ReshardError:
            continue
        if not placement.problems:
            found.append((name, mesh, stored))
    return found


def by_brute_force(source, destination) -> Counter:
    """Every pair of blocks of one tensor that meet: where the box that they share lies on either side."""
    found: Counter = Counter()
    for (i, a), (j, b) in product(enumerate(source), enumerate(destination)):
        for (key, mine), (other, theirs) in product(a.blocks, b.blocks):
            box = overlap(mine.box, theirs.box) if key == other else None
            if box:
                here, there = mine.clip(box), theirs.clip(box)
                found[key, i, j, box, here.offset, here.strides, there.offset, there.strides] += 1
    return found


def spelled_out(joined) -> Counter:
    found: Counter = Counter()

    def place(slot, start, box):
        return start + sum((low[0] - own[0]) * stride for low, own, stride in zip(box, slot.box, slot.strides)), slot.strides

    for run in joined.runs:
        pattern = joined.patterns[run.pattern]
        for n in range(run.count):
            here, there = ([column.at(n) for column in side] for side in (run.sources, run.destinations))
            for piece in pattern.pieces:
                for a, b in product(piece.sources, piece.destinations):
                    mine = place(pattern.sources[a], here[a][1], piece.box)
                    theirs = place(pattern.destinations[b], there[b][1], piece.box)
                    found[run.key(n), here[a][0], there[b][0], piece.box, *mine, *theirs] += 1
    return found


@pytest.mark.samples
@pytest.mark.parametrize("family", FAMILIES)
def test_the_join_finds_what_brute_force_finds(family):
    found = sides(family)
    assert len(found) > 10
    first = [(a, b) for a in found[:1] for b in found[1:]]
    for a, b in first + list(zip(found[1:], found[2:] + found[1:2])):
        joined = join(a[2], b[2])
        assert spelled_out(joined) == by_brute_force(a[2], b[2]), (a[:2], b[:2])
        assert spelled_out(join(b[2], a[2])) == by_brute_force(b[2], a[2]), (b[:2], a[:2])


@pytest.mark.samples
def test_layers_and_experts_that_lie_alike_are_one_pattern():
    by_name = {(name, mesh): stored for name, mesh, stored in sides("mixtral")}
    joined = join(by_name["hf", Mesh()], by_name["vllm", Mesh(2)])
    assert sum(joined.counts) == len({key for s in by_name["hf", Mesh()] for key, _ in s.blocks})
    assert len(joined.patterns) < 12 and max(joined.counts) >= 8


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    model = tmp_path_factory.mktemp("plan") / "model"
    make_model(model)
    return reshard.plan(model, format="vllm", tp=3).plan


def test_a_plan_is_a_value(plan):
    again = pickle.loads(pickle.dumps(plan))
    assert again == plan and again.fingerprint == plan.fingerprint and again.copies == plan.copies
    assert all(s.file and s.start for s in (*plan.join.sources, *plan.join.destinations))  # both sides know where they lie


def test_equal_plans_and_only_they_have_equal_fingerprints(plan):
    held = plan.join.destinations
    part = held[0].parts[0]
    changed = [
        held[0]._replace(name="other"),
        held[0]._replace(dtype="F32"),
        held[0]._replace(start=held[0].start + 1),
        held[0]._replace(file="other"),
        held[0]._replace(parts=(part._replace(block=part.block.moved(1)), *held[0].parts[1:])),
        held[0]._replace(parts=held[0].parts[:-1]),
    ]
    prints = {plan.fingerprint, replace(plan, compare=False).fingerprint}
    for stored in changed:
        other = replace(plan, join=join(plan.join.sources, (stored, *held[1:])))
        assert other != plan
        prints.add(other.fingerprint)
    assert len(prints) == 2 + len(changed)


def test_a_plan_divides_by_output_file(plan):
    files = sorted({s.file for s in plan.destinations})
    assert len(files) == 3
    parts = [plan.only([file]) for file in files]
    assert sum(len(part.copies) for part in parts) == len(plan.copies)
    assert {copy for part in parts for copy in part.copies} == set(plan.copies)
    assert sum(part.bytes_held for part in parts) == plan.bytes_held
