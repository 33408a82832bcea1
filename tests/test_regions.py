"""Boxes and flat ranges of stored tensors, against a model that knows each element by its number; and what is told of bad ones."""

import random
from math import prod

import numpy as np
import pytest
from geometry_oracle import draw_items, fused_numbers, painted

from reshard.formats.pieces import Piece, placed
from reshard.geometry import block, regions
from reshard.geometry.block import Part, Stored, row_major, singles
from reshard.geometry.regions import Chunk, FlatRange, boxes_of, parts_in, slice_dim, unsound
from reshard.layout.fusion import fuse


def drawn(rng: random.Random):
    """A stored tensor of fused, maybe stacked tensors: its parts, the numbers of each of its elements, the arrays they come from."""
    case = draw_items(rng)
    numbers, whole = fused_numbers(*case)
    shape, blocks = fuse(case[0], case[1], case[2], *case[3:])
    parts = singles(((name,), placed) for name, placed in blocks)
    if rng.random() < 0.5:  # experts, one after another
        count = rng.randint(1, 3)
        step = prod(shape)
        parts = tuple(Part((name, 4), placed, count, step if count > 1 else 0) for name, placed in blocks)
        total = sum(array.size for array in numbers.values())
        numbers = {(name, 4 + i): np.where(array, array + i * total, 0) for name, array in numbers.items() for i in range(count)}
        whole, shape = np.stack([np.where(whole, whole + i * total, 0) for i in range(count)]), (count, *shape)
    else:
        numbers = {(name,): array for name, array in numbers.items()}
    return Stored(0, "w", "F32", shape, parts, pad=int((whole == 0).sum())), whole, numbers


def drawn_region(rng: random.Random, shape):
    if rng.random() < 0.5:
        first = rng.randint(0, prod(shape) - 1)
        return FlatRange(first), (rng.randint(0, prod(shape) - first),)
    ranges = [sorted(rng.choices(range(size + 1), k=2)) for size in shape]
    return Chunk(tuple(low for low, _ in ranges)), tuple(high - low for low, high in ranges)


def expected(whole, region, size):
    if isinstance(region, FlatRange):
        return whole.reshape(-1)[region.first : region.first + prod(size)]
    return whole[tuple(slice(begin, begin + count) for begin, count in zip(region.offsets, size))]


def check(seed: int) -> None:
    rng = random.Random(seed)
    stored, whole, numbers = drawn(rng)
    for _ in range(6):
        region, size = drawn_region(rng, stored.shape)
        parts = parts_in(stored.shape, stored.parts, region, size)
        want = expected(whole, region, size)
        blocks = [pair for part in parts for pair in part.each()]
        assert np.array_equal(painted(prod(size), blocks, numbers), want.reshape(-1)), (seed, region, size)
        held = np.zeros(stored.shape, int)
        for box in boxes_of(stored.shape, region, size):
            held[tuple(slice(*each) for each in box)] += 1
        assert np.array_equal(np.sort(whole[held == 1]), np.sort(want.reshape(-1))) and held.max(initial=0) <= 1


def test_regions_hold_what_numpy_says():
    for seed in range(400):
        check(seed)


@pytest.mark.parametrize("broken", ["dropped", "late", "other axis"])
def test_the_model_sees_a_broken_cutter(monkeypatch, broken):
    spoil = {
        "dropped": lambda parts: parts[1:],
        "late": lambda parts: [part.moved(1) for part in parts],
        "other axis": lambda parts: [part._replace(strides=part.strides[::-1]) for part in parts],
    }
    regions._cut_to.cache_clear()
    monkeypatch.setattr(regions, "cut", lambda *at: spoil[broken](block.cut(*at)))
    with pytest.raises((AssertionError, ValueError, IndexError)):
        for seed in range(20):
            check(seed)
    regions._cut_to.cache_clear()


def test_pieces_are_sound_exactly_when_each_element_is_counted_once():
    """``unsound`` against counting: overlaps that are not equal, and elements that none holds."""
    seen = set()
    for seed in range(600):
        rng = random.Random(seed)
        shape = tuple(rng.randint(1, 4) for _ in range(rng.randint(1, 3)))
        cut = rng.randint(0, shape[0])
        chosen = [(Chunk((low,) + (0,) * (len(shape) - 1)), (high - low, *shape[1:])) for low, high in ((0, cut), (cut, shape[0]))]
        if rng.random() < 0.6:
            chosen = [drawn_region(rng, shape) for _ in range(rng.randint(1, 4))] + (chosen if rng.random() < 0.5 else [])
        times, once = np.zeros(shape, int), {}
        for region, size in chosen:
            at = expected(np.arange(prod(shape)).reshape(shape), region, size).reshape(-1)
            once.setdefault((region, size), at)
        for at in once.values():
            np.add.at(times.reshape(-1), at, 1)
        both, held, hole = unsound(shape, tuple(chosen))
        assert (both is not None) == (times.max(initial=0) > 1), (seed, shape, chosen)
        if both is None:
            assert held == (times > 0).sum()
            assert (hole is None) == (times.min() > 0)
        if hole is not None:
            assert times[tuple(slice(*each) for each in hole)].max() == 0
        seen.add((both is None, hole is None))
    assert len(seen) == 4


def test_a_dimension_is_sliced_whatever_the_order_of_its_axes():
    """Axes of one position have strides that say nothing."""
    blocks = [("a", block.Block(((0, 1), (0, 4), (0, 8)), 0, (999, 8, 1)))]
    shape, cut = slice_dim((4, 8), blocks, 0, 1, 3)
    assert shape == (2, 8) and cut == [("a", block.Block(((0, 1), (1, 3), (0, 8)), 0, (cut[0][1].strides[0], 8, 1)))]


def whole_tensor(shape=(4, 6)):
    return Stored(0, "w", "F32", shape, singles([(("w",), block.Block(tuple((0, n) for n in shape), 0, row_major(shape)))]))


BAD = {
    "past the end": ([Piece("a", 0, "F32", (3, 6), "w", 0, Chunk((2, 0)), holder=1)], ["[2:5, 0:6]", "[4, 6]", "rank 1"]),
    "other rank": ([Piece("a", 0, "F32", (4,), "w", 0, Chunk((0,)))], ["[0:4]", "[4, 6]"]),
    "flat past the end": ([Piece("a", 0, "F32", (5,), "w", 0, FlatRange(20))], ["elements 20 to 25", "[4, 6]"]),
    "overlap": (
        [Piece("a", 0, "F32", (3, 6), "w", 0, Chunk((0, 0)), holder=0), Piece("b", 0, "F32", (2, 6), "w", 0, Chunk((2, 0)), holder=3)],
        ["a (rank 0) holds elements [0:3, 0:6]", "b (rank 3) holds elements [2:4, 0:6]", "overlap in 6 elements"],
    ),
    "hole": (
        [Piece("a", 0, "F32", (1, 6), "w", 0, Chunk((0, 0)), holder=2), Piece("a", 24, "F32", (12,), "w", 0, FlatRange(12), holder=2)],
        ["rank 2 hold 18 of 24", "[1:2, 0:6]"],
    ),
    "twice": ([Piece("a", 0, "F32", (4, 6), "w"), Piece("b", 0, "F32", (4, 6), "w")], ["both a and b", "rank 0"]),
    "shape": ([Piece("a", 0, "F32", (4, 3), "w", 0, Chunk((0, 0)), whole=(4, 3))], ["shape [4, 3], expected [4, 6] by us"]),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_names_tensor_file_rank_and_both_numbers(case):
    pieces, words = BAD[case]
    found = placed([whole_tensor()], pieces, " by us")
    assert len(found.problems) == 1 and not found.stored and all(word in found.problems[0] for word in ["w", *words]), found.problems


def test_all_that_is_wrong_is_told_together():
    every = [piece._replace(name=case, rank=0) for case, (pieces, _) in BAD.items() for piece in pieces]
    found = placed([whole_tensor()._replace(name=case) for case in BAD], every)
    assert len(found.problems) == len(BAD)


def test_replicas_strides_and_strangers():
    """Equal pieces of several ranks are replicas; strides are the file's; what no stored tensor is made of is handed back."""
    first, second = (Piece(f, 8, "BF16", (2, 6), "w", 0, Chunk((at, 0)), (1, 2), h) for f, at, h in (("a", 0, 0), ("b", 2, 1)))
    found = placed(
        [whole_tensor(), whole_tensor()._replace(name="gone")],
        [first, second, second._replace(file="c", holder=5), first._replace(name="x")],
    )
    assert [(s.rank, s.file, s.start, s.dtype, s.shape) for s in found.stored] == [
        (0, "a", 8, "BF16", (2, 6)),
        (1, "b", 8, "BF16", (2, 6)),
        (5, "c", 8, "BF16", (2, 6)),
    ]
    assert found.stored[1].blocks[0] == (("w",), block.Block(((2, 4), (0, 6)), 0, (1, 2)))
    assert [s.name for s in found.missing] == ["gone"] and [piece.name for piece in found.rest] == ["x"] and not found.problems
    one_rank = placed([whole_tensor()], [second], complete=False)
    assert not one_rank.problems and one_rank.stored[0].shape == (2, 6)
