"""Values computed from several operands: which boxes are read, that all of it is counted, and the numbers that come out, against numpy."""

from dataclasses import replace
from math import prod

import ml_dtypes
import numpy as np
import pytest
from value_cases import CODES, GRAIN, RNG, ROWS, SCALE, SHAPES, VALUES, check, chunked, executed, model, written

from reshard.errors import FormatError, PlanError
from reshard.executor import compute, values
from reshard.planner.batches import batches
from reshard.planner.make import plan as make_plan
from reshard.planner.tiles import split
from reshard.planner.values import Operand, Over, Value

CUTS = {
    "whole": (((1, 1, 1), (1, 1), (1, 1, 1))),
    "source cut by rows, inside blocks": (((6, 1, 1), (3, 1), (1, 1, 1))),
    "columns, on the grain or not": (((1, 1, 5), (1, 3), (3, 1, 2))),
    "both, every way": (((3, 2, 2), (9, 1), (2, 4, 5))),
}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS.keys())
def test_numbers_are_those_of_the_dumb_way_and_bytes_those_of_the_plan(tmp_path, monkeypatch, cuts, transposed):
    monkeypatch.setattr(compute, "ELEMENTS", 300)
    codes, scales, into = cuts
    numbers, expected = model()
    held = written(
        tmp_path, chunked("w.codes", codes, layers=2, dtype="F8_E4M3") + chunked("w.scale", scales, layers=2, dtype="F32"), numbers
    )
    plan = make_plan(held, chunked("w", into, lambda n: n, 2, transposed), values=VALUES, sizes=lambda key: SHAPES[key[0]])
    assert {s.dtype for s in plan.destinations} == {"BF16"}
    out, read = executed(plan, tmp_path)
    assert (
        read
        == plan.bytes_read
        == sum(each.source_bytes for run_ in plan.join.runs for i in range(run_.count) for each in plan.computed(run_, i))
    )
    check(plan, out, expected)
    assert len(plan.join.patterns) == 1  # both layers


def test_tiles_are_cut_where_no_scale_is_read_twice():
    value = VALUES["w"]
    box = tuple((0, n) for n in SHAPES["w"])
    assert value.cuts(box, 0) == (2, 2)  # two heads of 12 rows are three blocks of 8
    assert value.cuts(box, 1) is None  # would run through every head
    assert value.cuts(((1, 2), (0, 12), (0, 20)), 1) == (4, 8)  # rows 12 to 24: a block begins at row 16
    assert value.cuts(box, 2) == (8, 8)
    pieces = list(value.pieces(box, 500, (0, 1, 2)))
    assert pieces[0][0] == (0, 2) and prod(len(p) for p in pieces)
    assert [p[0] for p in pieces] == [(0, 2), (2, 4), (4, 6)]


def test_replicas_are_computed_once_and_compared(tmp_path):
    numbers, expected = model(1)
    two = chunked("w.codes", (1, 1, 1), dtype="F8_E4M3") + [
        s._replace(rank=1, name="again") for s in chunked("w.codes", (1, 1, 1), dtype="F8_E4M3")
    ]
    held = written(tmp_path, two + chunked("w.scale", (1, 1), dtype="F32"), numbers)
    into = chunked("w", (1, 1, 1)) + [s._replace(rank=1) for s in chunked("w", (1, 1, 1))]
    plan = make_plan(held, into, values=VALUES, sizes=lambda key: SHAPES[key[0]])
    size = prod(SHAPES["w"])
    assert plan.bytes_read == size + 4 * prod(SHAPES["w.scale"]) + 2 * size  # codes and scales once, then the replicas side by side
    out, read = executed(plan, tmp_path)
    assert read == plan.bytes_read
    check(plan, out, expected)
    path = tmp_path / held[1].file
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(FormatError, match="again.* both hold|both hold w.codes"):
        executed(plan, tmp_path)


def test_what_no_source_holds_is_told_by_operand():
    scales = chunked("w.scale", (3, 1), dtype="F32")[:2]
    with pytest.raises(
        PlanError, match=r"w of layer 0 is computed from w\.scale of layer 0, of which 9 of 27 elements are in no source file"
    ):
        make_plan(chunked("w.codes", (1, 1, 1), dtype="F8_E4M3") + scales, chunked("w", (1, 1, 1)), values=VALUES, complete=False)
    with pytest.raises(PlanError, match="of which 27 of 27"):
        make_plan(chunked("w.codes", (1, 1, 1), dtype="F8_E4M3"), chunked("w", (1, 1, 1)), values=VALUES, complete=False)
    with pytest.raises(PlanError, match=r"w\.scale of layer 0 .* has no place in the destination"):
        plain = chunked("w.codes", (1, 1, 1), dtype="F8_E4M3")
        make_plan(plain + chunked("w.scale", (1, 1), dtype="F32"), [s._replace(name="x") for s in chunked("w.codes", (1, 1, 1))],
                  values=VALUES, sizes=lambda key: SHAPES[key[0]])  # fmt: skip


def test_some_layers_are_computed_and_others_copied(tmp_path):
    numbers, expected = model(1)
    numbers["w", 1] = expected["w", 1] = RNG.normal(size=SHAPES["w"]).astype(ml_dtypes.bfloat16)
    plain = [s for s in chunked("w", (2, 1, 1), layers=2, dtype="BF16") if s.parts[0].first[1] == 1]
    quantised = chunked("w.codes", (3, 1, 1), dtype="F8_E4M3") + chunked("w.scale", (1, 1), dtype="F32")
    plan = make_plan(
        written(tmp_path, quantised + plain, numbers), chunked("w", (3, 1, 1), layers=2), values=VALUES, sizes=lambda key: SHAPES[key[0]]
    )
    out, read = executed(plan, tmp_path)
    assert read == plan.bytes_read
    check(plan, out, expected)


def test_a_plan_with_values_is_a_value(tmp_path):
    import pickle

    numbers, expected = model(1)
    held = written(tmp_path, chunked("w.codes", (3, 1, 1), dtype="F8_E4M3") + chunked("w.scale", (1, 1), dtype="F32"), numbers)
    into = [s._replace(file=f"out{i}") for i, s in enumerate(chunked("w", (2, 1, 1), lambda n: n))]
    plan = make_plan(held, into, values=VALUES)
    assert pickle.loads(pickle.dumps(plan)) == plan and pickle.loads(pickle.dumps(plan)).fingerprint == plan.fingerprint
    other = make_plan(held, into, values={"w": replace(VALUES["w"], settings=(("factor", 2),))})
    assert other.fingerprint != plan.fingerprint
    half = plan.only(["out1"])
    assert [s.file for s in half.destinations] == ["out1"] and half.bytes_read < plan.bytes_read
    out, read = executed(half, tmp_path)
    check(half, out, expected)
    assert read == half.bytes_read
    fetched = batches(plan, limit=200)
    files = {r.file for batch in fetched for r in batch.ranges[0]}
    assert files == {s.file for s in held} and len(fetched) > 1
    assert {tile.idle for batch in fetched for tile in batch.tiles} == {False}
    left = [batch.without({"out0"}) for batch in fetched]
    assert {into for batch in left for tile in batch.tiles for _, into in tile.flows} == {"out1"}


def test_a_broken_function_or_grain_is_seen(tmp_path, monkeypatch):
    numbers, expected = model(1)
    held = written(tmp_path, chunked("w.codes", (1, 1, 1), dtype="F8_E4M3") + chunked("w.scale", (1, 1), dtype="F32"), numbers)
    shifted = Operand("w.scale", (replace(SCALE.axes[0], grain=GRAIN - 1, size=ROWS), SCALE.axes[1]))
    with pytest.raises(PlanError, match=r"w\.scale"):
        make_plan(held, chunked("w", (1, 1, 1)), values={"w": replace(VALUES["w"], operands=(CODES, shifted))})
    coarse = Operand("w.scale", (replace(SCALE.axes[0], grain=2 * GRAIN), SCALE.axes[1]))
    plan = make_plan(held, chunked("w", (1, 1, 1)), values={"w": replace(VALUES["w"], operands=(CODES, coarse))}, complete=False)
    with pytest.raises(AssertionError):
        check(plan, executed(plan, tmp_path)[0], expected)
    plan = make_plan(held, chunked("w", (1, 1, 1)), values=VALUES)
    monkeypatch.setitem(values.FUNCTIONS, "scaled", lambda given: given.spread(0).astype(np.float32) / given.spread(1))
    with pytest.raises(AssertionError):
        check(plan, executed(plan, tmp_path)[0], expected)


def test_operands_of_other_axes_a_low_rank_update(tmp_path, monkeypatch):
    monkeypatch.setattr(compute, "ELEMENTS", 16)
    monkeypatch.setitem(SHAPES, "m", (16, 12))
    monkeypatch.setitem(SHAPES, "base", (16, 12))
    monkeypatch.setitem(SHAPES, "a", (3, 12))
    monkeypatch.setitem(SHAPES, "b", (16, 3))
    rank = Over((), (), 3)
    operands = (Operand.alike("base", (16, 12)), Operand("a", (rank, Over((1,), (12,), 12))), Operand("b", (Over((0,), (16,), 16), rank)))
    numbers = {(name, 0): RNG.normal(size=SHAPES[name]).astype(np.float32) for name in ("base", "a", "b")}
    held = written(tmp_path, [s for name in ("base", "a", "b") for s in chunked(name, (1, 1), dtype="F32")], numbers)
    plan = make_plan(held, chunked("m", (4, 2), lambda n: n), values={"m": Value("merged", operands, settings=(("factor", 0.5),))})
    out, read = executed(plan, tmp_path, jobs=1)
    assert read == plan.bytes_read
    base, a, b = (numbers[name, 0].astype(np.float64) for name in ("base", "a", "b"))
    for s in plan.destinations:
        ((_, block),) = s.blocks
        got = np.frombuffer(out[s.id], np.float32).reshape(block.shape)
        want = (base + 0.5 * b @ a)[tuple(slice(start, stop) for start, stop in block.box)]
        assert np.allclose(got, want, atol=1e-5)


def test_every_tile_of_what_is_computed_keeps_its_operands(tmp_path):
    held = chunked("w.codes", (1, 1, 1), dtype="F8_E4M3") + chunked("w.scale", (1, 1), dtype="F32")
    plan = make_plan([s._replace(file=s.name) for s in held], chunked("w", (1, 1, 1)), values=VALUES)
    (each,) = [each for run_ in plan.join.runs for each in plan.computed(run_, 0)]
    parts = each.parts(1)
    assert len(parts) == 3 and sum(part.source_bytes for part in parts) == each.source_bytes
    for part in parts:
        for number, box in enumerate(part.operands):
            assert sum(copy.move.size for copy in part.gathering(number)) == prod(stop - start for start, stop in box)
    assert [len(tile.computed) for tile in split(plan_tile(plan), 1)] == [1]


def plan_tile(plan):
    from reshard.planner.tiles import groups

    (group,) = groups(plan)
    return group.tile(plan)
