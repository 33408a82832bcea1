"""What is fetched for a plan: ranges, batches, the journal of them, and checksums of what passes by."""

import hashlib
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

import reshard
from reshard.conversion.journal import replay
from reshard.demo import make_model
from reshard.dtypes import DTYPE_SIZE
from reshard.hub.checksum import Checksum
from reshard.planner.batches import Range, batches, merged, of_plan, runs


@st.composite
def boxes(draw):
    """A strided box as layouts make them: each axis steps over what the axes below it span, or more; in any order of axes."""
    shape = draw(st.lists(st.integers(0, 4), min_size=0, max_size=4))
    strides, span = [], 1
    for size in shape:
        strides.append(span + draw(st.integers(0, 5)))
        span = strides[-1] * max(size, 1)
    order = draw(st.permutations(range(len(shape))))
    return draw(st.integers(0, 20)), tuple(shape[i] for i in order), tuple(strides[i] for i in order)


def elements(offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> set[int]:
    out = {offset}
    for size, stride in zip(shape, strides):
        out = {at + i * stride for at in out for i in range(size)}
    return out


@given(boxes(), st.integers(0, 12))
def test_runs_hold_the_box_and_little_more(box, gap):
    found, wanted = runs(*box, gap), elements(*box)
    held = [at for start, stop in found for at in range(start, stop)]
    assert len(held) == len(set(held)) and wanted <= set(held)
    assert all(start in wanted and stop - 1 in wanted for start, stop in found)
    between = sorted(wanted)
    assert all(b - a - 1 <= gap for a, b in pairwise(between) if set(range(a + 1, b)) & set(held))  # what is too much lies in small gaps
    if gap == 0:
        assert set(held) == wanted


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 50), st.integers(1, 10))), st.integers(0, 5))
def test_merged_ranges(parts, gap):
    out = merged([Range(file, start, start + size) for file, start, size in parts], gap)
    for file, start, size in parts:
        assert sum(r.file == file and r.start <= start and start + size <= r.stop for r in out) == 1
    assert all(b.file != a.file or b.start - a.stop > gap for a, b in pairwise(out))


TARGETS = [
    {"format": "vllm", "tp": 3},
    {"format": "megatron", "tp": 3, "pp": 2},
    {"format": "tp", "tp": 2},
    {"format": "vllm", "tp": 3, "rank": 2},
    {"format": "hf"},
]


@pytest.mark.parametrize("source", [None, {"format": "megatron", "tp": 3}, {"format": "vllm", "tp": 3}])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("gap", "limit"), [(0, 20_000), (1000, 20_000), (256 << 10, 4 << 20)])
def test_batches_are_the_plan(tmp_path_factory, source, target, gap, limit):
    """Every byte that a plan reads is in the ranges of its batch; a batch is small; nothing is written twice or left out."""
    folder = tmp_path_factory.getbasetemp() / f"fetch-{source and source['format']}"
    if not folder.exists():
        make_model(folder.with_name(f"{folder.name}-hf"))
        reshard.convert(folder.with_name(f"{folder.name}-hf"), folder, fsync=False, **(source or {"format": "hf"}))
    plan = reshard.plan(folder, **target).plan
    found = batches(plan, gap=gap, limit=limit)
    assert sum(c.move.size for b in found for t in b.tiles for c in t.copies) == sum(c.move.size for c in plan.copies)
    for batch in found:
        ranges = batch.ranges[0]
        for tile in batch.tiles:
            for stored, offset, shape, strides in of_plan(tile)[0]:
                width = DTYPE_SIZE[stored.dtype]
                for a, b in runs(offset, shape, strides, 0):
                    low, high = stored.start + a * width, stored.start + b * width
                    assert any(r.file == stored.file and r.start <= low and high <= r.stop for r in ranges)
        rows = max(
            (shape[-1] * DTYPE_SIZE[stored.dtype] * 8 for tile in batch.tiles for stored, _, shape, _ in of_plan(tile)[0] if shape),
            default=0,
        )
        assert batch.size <= max(limit, rows) + gap
    if gap == 0:
        assert sum(batch.size for batch in found) >= plan.least_bytes_read
        if "rank" not in target and source is None:
            assert sum(batch.size for batch in found) == plan.bytes_read


def test_journal_counts_batches_by_boot():
    notes = [{"fingerprint": "f"}, {"boot": "a"}, {"batch": 1}, {"mark": 1}, {"batch": 2}, {"durable": 1}, {"batch": 3}, {"file": "x"}]
    assert replay(notes, "a").batches == {1, 2, 3} and replay(notes, "a").files == {"x"}
    assert replay(notes, "b").batches == {1}  # noted before the mark whose durability was noted
    assert replay(notes, None).batches == {1} and replay([*notes, {"boot": "b"}, {"batch": 4}], "b").batches == {1, 4}
    assert replay([*notes, {"forget": True}, {"batch": 4}], "a").batches == {4}
    assert replay([*notes, {"boot": "b"}, {"batch": 4}, {"boot": "a"}], "a").batches == {1}  # a's memory is gone since b


@given(st.binary(max_size=400), st.randoms(use_true_random=False), st.integers(1, 60))
def test_checksum_in_any_order(content, random: Random, step):
    check = Checksum(len(content), 10_000)
    pieces = [(at, content[at : at + step + 3]) for at in range(0, len(content), step)]  # they overlap
    random.shuffle(pieces)
    for at, piece in pieces:
        assert check.result is None or at or not content
        check.offer(at, memoryview(piece))
    assert check.result == hashlib.sha256(content).hexdigest()


def test_checksum_gives_up_rather_than_hold_much():
    check = Checksum(100, 20)
    check.offer(50, memoryview(bytes(21)))
    check.offer(0, memoryview(bytes(100)))
    assert check.result is None
