"""Boxes that are computed: their operands fetched into buffers of their own, the function run, the result cast and written.

Operands stay together: a tile holds all that its box of the result takes. What a cut does not touch (a scale of all columns, a
low-rank factor) is fetched once for all tiles of a box, so that what is read is what the plan says.
"""

from collections import defaultdict
from collections.abc import Callable

import numpy as np

from reshard.dtypes import DTYPE_SIZE, words_of
from reshard.errors import FormatError
from reshard.executor.casts import Casts
from reshard.executor.sources import InMemory, Source, Workspace
from reshard.executor.values import Array, Given, evaluate, numbers, undefined
from reshard.geometry.block import Block, Box, Stored, end, row_major
from reshard.geometry.coverage import label, where
from reshard.planner.copies import Computed, Copy, Move, abreast
from reshard.planner.tiles import Tile

#: elements of a result at a time: a few arrays of four bytes each are held of them
ELEMENTS = 512 << 10

Write = Callable[[Stored, int, memoryview], None]
Held = dict[tuple[object, ...], tuple[Box, Array]]


def compute(tile: Tile, source: Source | InMemory, write: Write, space: Workspace, casts: Casts | None) -> int:
    """Compute all boxes of a tile, and write them. Returns bytes read from the source."""
    held: Held = {}
    casts, read = casts or Casts(), 0
    for parts in abreast(tile.computed, ELEMENTS):
        made: dict[tuple[int, str, str, int], list[tuple[Stored, Block, Array]]] = defaultdict(list)
        for part in parts:
            size, arrays = _operands(part, source, space, held)
            read += size
            given = Given(part.value, part.box, part.operands, arrays)
            result, dtype = evaluate(given)
            if result.dtype.kind == "f" and (lost := undefined(given, result)):
                raise FormatError(
                    f"{where(part.takers[0].stored)}: {lost} values of {label(part.key)} have no {part.value.function}",
                    "is the source damaged?",
                )
            for stored, block in part.takers:
                made[stored.rank, stored.name, stored.file, stored.start].append((stored, block, _cast(part, result, dtype, stored, casts)))
        for blocks in made.values():
            _write(blocks, write)
    return read


def _operands(part: Computed, source: Source | InMemory, space: Workspace, held: Held) -> tuple[int, tuple[Array, ...]]:
    """Bytes read, and the operands of one part; one that is held from the part before is not read again."""
    read, out = 0, []
    for number, box in enumerate(part.operands):
        at = part.key, part.takers[0].stored.id, number
        if at not in held or held[at][0] != box:
            size, array = _gathered(part.gathering(number), box, source, space)
            read += size
            held[at] = box, array
        out.append(held[at][1])
    return read, tuple(out)


def _gathered(copies: list[Copy], box: Box, source: Source | InMemory, space: Workspace) -> tuple[int, Array]:
    """Bytes read, and the numbers of an operand's box."""
    from reshard.executor.run import run_tile

    into = copies[0].dst
    words = np.empty(into.shape, words_of(DTYPE_SIZE[into.dtype]))
    raw = words.reshape(-1).view(np.uint8).data

    def write(stored: Stored, element: int, content: memoryview) -> None:
        at = element * DTYPE_SIZE[stored.dtype]
        raw[at : at + len(content)] = content

    read = run_tile(Tile({copies[0].key: box}, copies, []), source, write, space)
    return read, numbers(words, into.dtype)


def _cast(part: Computed, result: Array, dtype: str, stored: Stored, casts: Casts) -> Array:
    """The result as words of what `stored` holds."""
    words = result.view(words_of(DTYPE_SIZE[dtype]))
    steps = row_major(result.shape)
    as_if = Copy(part.key, stored._replace(dtype=dtype), stored, Move(part.box, result.size, 0, steps, 0, steps))
    return casts.cast(as_if, words, set())


def _write(blocks: list[tuple[Stored, Block, Array]], write: Write) -> None:
    """Write what one stored tensor holds of a tile: together where it leaves no hole, else run by run."""
    from reshard.executor.rearrange import scatter

    stored = blocks[0][0]
    low = min(block.offset for _, block, _ in blocks)
    high = max(end(block.offset, block.shape, block.strides) for _, block, _ in blocks)
    if sum(block.size for _, block, _ in blocks) < high - low:
        for _, block, words in blocks:
            scatter(words, block.offset, block.strides, stored, write)
        return
    buffer = np.empty(high - low, words_of(DTYPE_SIZE[stored.dtype]))
    for _, block, words in blocks:
        place = np.lib.stride_tricks.as_strided(buffer[block.offset - low :], words.shape, [s * words.itemsize for s in block.strides])
        np.copyto(place, words)
    write(stored, low, buffer.view(np.uint8).data)
