"""A small weight in FP8 blocks that end inside its heads, in files cut any way; plans run on it, and what they give."""

from itertools import product

import ml_dtypes
import numpy as np

from reshard.dtypes import DTYPE_SIZE, numbers_of, words_of
from reshard.executor.run import run
from reshard.executor.sources import Source
from reshard.geometry.block import Block, Part, Stored, row_major
from reshard.planner.values import Operand, Over, Value

RNG = np.random.default_rng(0)
HEADS, HEAD, INNER, GRAIN = 6, 12, 20, 8  # 72 rows in blocks of 8, which end inside heads of 12; 20 columns: the last block partial
ROWS = HEADS * HEAD
SCALE = Operand("w.scale", (Over((0, 1), (HEADS, HEAD), ROWS // GRAIN, GRAIN), Over((2,), (INNER,), -(-INNER // GRAIN), GRAIN)))
CODES = Operand.alike("w.codes", (HEADS, HEAD, INNER))
VALUES = {"w": Value("scaled", (CODES, SCALE), "BF16")}
SHAPES = {"w": (HEADS, HEAD, INNER), "w.codes": (HEADS, HEAD, INNER), "w.scale": (ROWS // GRAIN, -(-INNER // GRAIN))}


def chunked(name, cuts, rank_of=lambda index: 0, layers=1, transposed=False, dtype=""):
    """Tensor `name` of each layer, its axes cut into `cuts` equal boxes, each box a stored tensor of its own."""
    out, shape = [], SHAPES[name]
    for layer in range(layers):
        for number, index in enumerate(product(*map(range, cuts))):
            box = tuple((i * n // c, (i + 1) * n // c) for i, n, c in zip(index, shape, cuts))
            size = tuple(stop - start for start, stop in box)
            steps = tuple(reversed(row_major(tuple(reversed(size))))) if transposed else row_major(size)
            part = Part((name, layer), Block(box, 0, steps))
            out.append(Stored(rank_of(number), f"{name}.{layer}.{number}", dtype, size, (part,)))
    return out


def written(folder, stored, numbers):
    """`stored` in files of `folder`, filled from `numbers` (name, layer) → array; with their places."""
    out = []
    for i, s in enumerate(stored):
        ((key, block),) = s.blocks
        array = numbers[key][tuple(slice(start, stop) for start, stop in block.box)]
        order = "F" if block.strides and block.strides != row_major(s.shape) else "C"
        (folder / f"{i}.{s.name}").write_bytes(b"1234567" + array.astype(numbers_of(s.dtype)).tobytes(order))
        out.append(s._replace(file=f"{i}.{s.name}", start=7))
    return out


def executed(plan, folder, jobs=2):
    """The destinations' numbers as they were written, and the bytes read for them."""
    held = {s.id: bytearray(b"\xaa" * s.size * DTYPE_SIZE[s.dtype]) for s in plan.destinations}

    def write(stored, element, content):
        at = element * DTYPE_SIZE[stored.dtype]
        held[stored.id][at : at + len(content)] = content

    source = Source(folder)
    run(plan, source, write, jobs=jobs)
    source.close()
    return held, source.bytes_read


def check(plan, held, expected):
    for s in plan.destinations:
        for key, block in s.blocks:
            words = np.frombuffer(held[s.id], words_of(DTYPE_SIZE[s.dtype]))[block.offset :]
            got = np.lib.stride_tricks.as_strided(words, block.shape, [n * words.itemsize for n in block.strides])
            want = expected[key][tuple(slice(start, stop) for start, stop in block.box)].astype(numbers_of(s.dtype))
            assert np.array_equal(got, np.ascontiguousarray(want).view(got.dtype)), s.name


def model(layers=2):
    """Codes and scales, and by the dumb way what they give."""
    numbers, expected = {}, {}
    for layer in range(layers):
        codes = RNG.normal(0, 60, SHAPES["w.codes"]).astype(ml_dtypes.float8_e4m3fn)
        scale = RNG.uniform(0.001, 2, SHAPES["w.scale"]).astype(np.float32)
        numbers["w.codes", layer], numbers["w.scale", layer] = codes, scale
        flat, out = codes.astype(np.float32).reshape(ROWS, INNER), np.empty((ROWS, INNER), np.float32)
        for r, c in product(range(ROWS), range(INNER)):
            out[r, c] = flat[r, c] * scale[r // GRAIN, c // GRAIN]
        expected["w", layer] = out.reshape(SHAPES["w"])
    return numbers, expected
