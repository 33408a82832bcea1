"""Codes and scales computed from weights, and scales on a finer grid: values whose elements depend on whole blocks of an operand."""

import ml_dtypes
import numpy as np
import pytest
import torch
from value_cases import GRAIN, HEAD, HEADS, INNER, RNG, ROWS, SHAPES, check, chunked, executed, written

from reshard.executor import compute
from reshard.planner.make import plan as make_plan
from reshard.planner.values import Operand, Over, Value


def published(weight):
    """Block codes and scales by DeepGEMM's published formula, in torch."""
    rows, columns = weight.shape
    padded = torch.zeros(-(-rows // GRAIN) * GRAIN, -(-columns // GRAIN) * GRAIN)
    padded[:rows, :columns] = weight
    tiles = padded.view(-1, GRAIN, padded.shape[1] // GRAIN, GRAIN)
    largest = tiles.abs().float().amax(dim=(1, 3), keepdim=True).clamp(1e-4)
    codes = (tiles * (1.0 / (largest / 448.0))).to(torch.float8_e4m3fn).view_as(padded)[:rows, :columns]
    return codes, (largest / 448.0).view(tiles.shape[0], tiles.shape[2])


#: rows of two heads are three blocks: what is taken of the weight is whole pairs of heads, and of columns whole blocks
WHOLE_BLOCKS = Operand(
    "w", (Over((0,), (HEADS,), HEADS, closed=2), Over((1,), (HEAD,), HEAD, closed=HEAD), Over((2,), (INNER,), INNER, closed=GRAIN))
)
QUANTISE = (("rows", 2), ("out", GRAIN), ("in", GRAIN))


@pytest.mark.parametrize("into", [(1, 1, 1), (3, 1, 2), (6, 2, 5)])
def test_codes_depend_on_all_of_their_block_and_are_the_published_ones(tmp_path, monkeypatch, into):
    monkeypatch.setattr(compute, "ELEMENTS", 100)
    weight = RNG.normal(size=SHAPES["w"]).astype(ml_dtypes.bfloat16)
    weight[2:4] = 0  # blocks of zeros
    held = written(tmp_path, chunked("w", (1, 1, 1), dtype="BF16"), {("w", 0): weight})
    plan = make_plan(held, chunked("w.codes", into, lambda n: n), values={"w.codes": Value("fp8_codes", (WHOLE_BLOCKS,), "F8_E4M3", QUANTISE)},
                     sizes=lambda key: SHAPES[key[0]])  # fmt: skip
    codes, _ = published(torch.from_numpy(weight.astype(np.float32).reshape(ROWS, INNER)))
    expected = codes.view(torch.uint8).numpy().reshape(SHAPES["w"])
    out, read = executed(plan, tmp_path)
    assert read == plan.bytes_read
    for s in plan.destinations:
        ((_, block),) = s.blocks
        got = np.frombuffer(out[s.id], np.uint8).reshape(block.shape)
        assert np.array_equal(got, expected[tuple(slice(start, stop) for start, stop in block.box)]), s.name


def test_scales_are_of_the_elements_they_cover(tmp_path, monkeypatch):
    monkeypatch.setattr(compute, "ELEMENTS", 6)
    monkeypatch.setitem(SHAPES, "m", (40, 20))  # rows and columns: the last block of columns is partial
    monkeypatch.setitem(SHAPES, "m.scale", (5, 3))
    weight = RNG.normal(size=(40, 20)).astype(ml_dtypes.bfloat16)
    operand = Operand("m", (Over((0,), (5,), 40, times=GRAIN), Over((1,), (3,), 20, times=GRAIN)))
    value = Value("fp8_scale", (operand,), "F32", (("rows", 1), ("out", GRAIN), ("in", GRAIN)))
    held = written(tmp_path, chunked("m", (5, 1), dtype="BF16"), {("m", 0): weight})
    plan = make_plan(held, chunked("m.scale", (5, 3), lambda n: n), values={"m.scale": value}, sizes=lambda key: SHAPES[key[0]])
    _, scales = published(torch.from_numpy(weight.astype(np.float32)))
    out, read = executed(plan, tmp_path)
    assert read == plan.bytes_read == 2 * weight.size
    check(plan, out, {("m.scale", 0): scales.numpy()})


def test_scales_on_a_finer_grid_are_the_same_values(tmp_path, monkeypatch):
    """Refined: what a cut that misses the grain needs."""
    monkeypatch.setitem(SHAPES, "fine", (18, 6))
    monkeypatch.setitem(SHAPES, "coarse", (9, 3))
    coarse = RNG.normal(size=(9, 3)).astype(np.float32)
    value = Value("repeated", (Operand("coarse", (Over((0,), (18,), 9, grain=2), Over((1,), (6,), 3, grain=2))),))
    held = written(tmp_path, chunked("coarse", (3, 1), dtype="F32"), {("coarse", 0): coarse})
    plan = make_plan(held, chunked("fine", (6, 2), lambda n: n), values={"fine": value}, sizes=lambda key: SHAPES[key[0]])
    out, read = executed(plan, tmp_path)
    assert read == plan.bytes_read
    check(plan, out, {("fine", 0): coarse.repeat(2, 0).repeat(2, 1)})
