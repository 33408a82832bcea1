"""Pieces: what a folder's files hold, each with the part of a stored tensor that it is; and the stored tensors that they make up.

Every format reads into a list of pieces and writes one: a rank's tensor as it is, a DCP chunk, a flat partition. ``placed`` is
the only way from pieces to stored tensors, in both directions.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from reshard.dtypes import DTYPE_SIZE
from reshard.foreign import quote
from reshard.geometry.block import Stored, chunk, restride, singles
from reshard.geometry.regions import FlatRange, Region, boxes_of, outside, parts_in, shared, unsound
from reshard.planner.values import formed
from reshard.stores import TensorInfo
from reshard.text import some

SCALED = "scaled"  # the form of a tensor that files hold times a number


class Piece(NamedTuple):
    """Elements in a file, and what they are: `region` of the stored tensor `name`, as rank `rank` of the folder's mesh has it.

    `file` is a path within the folder, `offset` the byte of it at which the first element lies; `dtype` is safetensors' word;
    `strides` count elements (None: row-major). `holder` is the rank whose file it is, where that is another than `rank`:
    formats that cut whole tensors into boxes have one rank by whose placement they are laid out, and many holders.
    `whole` is the shape of the stored tensor, where the file tells it of a region. `scale`: what the file holds is the tensor's
    elements times it.
    """

    file: str
    offset: int
    dtype: str
    shape: tuple[int, ...]
    name: str
    rank: int = 0
    region: Region = None
    strides: tuple[int, ...] | None = None
    holder: int | None = None
    whole: tuple[int, ...] | None = None
    scale: float = 1.0

    @property
    def held_by(self) -> int:
        return self.rank if self.holder is None else self.holder

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_SIZE[self.dtype]

    @property
    def extent(self) -> tuple[int, ...] | None:
        """The shape of the stored tensor, where the file tells it."""
        return self.shape if self.region is None else self.whole

    @property
    def described(self) -> str:
        """Which elements of the stored tensor it holds, for people."""
        if isinstance(self.region, FlatRange):
            return f"elements {self.region.first} to {self.region.first + prod(self.shape)}"
        offsets = self.region.offsets if self.region else (0,) * len(self.shape)
        if len(offsets) != len(self.shape):
            return f"a box of shape {list(self.shape)} at offsets {list(offsets)}"
        return f"elements {_printed((begin, begin + size) for begin, size in zip(offsets, self.shape))}"

    def __str__(self) -> str:
        """Where it lies, for people."""
        return f"{quote(self.name)} ({self.file}{'' if self.holder is None else f', rank {self.holder}'})"


_WHOLE = (None, None, None, None, 1.0)  # region, strides, holder, extent and scale of a tensor that lies in a file as its rank has it


def pieces_of(file: str, held: Mapping[str, TensorInfo], rank: int = 0) -> list[Piece]:
    """The tensors of a file, each of them whole on `rank`."""
    return [Piece(file, at.offset, at.dtype, at.shape, name, rank, None, at.strides) for name, at in held.items()]


def dealt(shape: tuple[int, ...], count: int, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Offsets and size of what `rank` of `count` has of a whole tensor, as FSDP2 deals out rows; None where it has nothing of it."""
    if not shape:
        return None if rank else ((), ())
    low, high = chunk(shape[0], count, rank)
    return ((low, *(0 for _ in shape[1:])), (high - low, *shape[1:])) if low < high else None


@dataclass(frozen=True)
class Placed:
    """Stored tensors with their places in files; those of which there is no piece; the pieces of no stored tensor; what is wrong."""

    stored: list[Stored]
    missing: list[Stored]
    rest: list[Piece]
    problems: list[str]


class Filed(NamedTuple):
    """Pieces by rank and name: the first of each, and all of those that are several."""

    first: dict[int, dict[str, Piece]]
    several: dict[tuple[int, str], list[Piece]]

    @classmethod
    def of(cls, pieces: Iterable[Piece]) -> "Filed":
        first: dict[int, dict[str, Piece]] = defaultdict(dict)
        several: dict[tuple[int, str], list[Piece]] = {}
        for piece in pieces:
            other = first[piece.rank].setdefault(piece.name, piece)
            if other is not piece:
                several.setdefault((piece.rank, piece.name), [other]).append(piece)
        return cls(first, several)


def placed(stored: Iterable[Stored], pieces: "Iterable[Piece] | Filed", by: str = "", complete: bool = True) -> Placed:
    """`stored`, whole as a layout places them, cut to the regions of `pieces`: a stored tensor of its own for each piece.

    `by` ends the sentence that tells which shape is expected. Every element must be in a piece (if `complete`), and no two
    pieces may share some of their elements: they are equal, and replicas, or they are disjoint. Takes from `pieces`, where
    they are filed already.
    """
    first, several = pieces if isinstance(pieces, Filed) else Filed.of(pieces)
    out: list[Stored] = []
    missing, problems = [], []
    for s in stored:
        piece = first[s.rank].pop(s.name, None) if s.rank in first else None
        if piece is None:
            missing.append(s)
            continue
        if piece[6:] == _WHOLE and piece.shape == s.shape and (not several or s[:2] not in several):  # nearly always: tens of thousands
            out.append(Stored(s.rank, s.name, piece.dtype, s.shape, s.parts, s.entry, piece.file, piece.offset, s.pad))
            continue
        at = s.rank, s.name
        own = several.pop(at, [piece])
        found = _faults(s, own, by, complete)
        problems += found
        out += [_cut(s, piece) for piece in own if not found and prod(piece.shape)]
    left = [piece for own in first.values() for one in own.values() for piece in several.get((one.rank, one.name), [one])]
    return Placed(out, missing, left, problems)


def _cut(s: Stored, piece: Piece) -> Stored:
    parts, pad = s.parts, s.pad
    if piece.region is not None:
        parts = parts_in(s.shape, parts, piece.region, piece.shape)
        pad = pad and prod(piece.shape) - sum(part.block.size * part.count for part in parts)
    strides = piece.strides
    if strides is not None:
        parts = singles((key, restride(block, piece.shape, strides)) for part in parts for key, block in part.each())
    if piece.scale != 1:
        parts = tuple([part._replace(first=(formed(part.first[0], SCALED), *part.first[1:])) for part in parts])
    rank = piece.rank if piece.holder is None else piece.holder
    return Stored(rank, s.name, piece.dtype, piece.shape, parts, s.entry, piece.file, piece.offset, pad)


def _faults(s: Stored, pieces: list[Piece], by: str, complete: bool) -> list[str]:
    """What is wrong with the pieces of one stored tensor."""
    sized = [(piece, piece.extent) for piece in pieces]
    problems = [f"{piece}: shape {list(size)}, expected {list(s.shape)}{by}" for piece, size in sized if size not in (None, s.shape)]
    if problems:
        return problems
    problems = [
        f"{piece}: {piece.described} do not lie in its shape, {list(s.shape)}{by}"
        for piece in pieces
        if outside(s.shape, piece.region, piece.shape)
    ]
    once: dict[tuple, Piece] = {}
    for piece in pieces:
        other = once.setdefault((piece.held_by, piece.region, piece.shape), piece)
        if other is not piece:
            problems.append(f"{quote(s.name)}: both {other.file} and {piece.file} hold {piece.described} for rank {piece.held_by}")
    if problems:
        return problems
    both, count, hole = unsound(s.shape, tuple([(piece.region, piece.shape) for piece in pieces]))
    if both:
        one, other = (pieces[i] for i in both)
        size = shared(*(boxes_of(s.shape, piece.region, piece.shape) for piece in (one, other)))
        problems.append(
            f"{quote(s.name)}: {one.file} (rank {one.held_by}) holds {one.described}, "
            f"{other.file} (rank {other.held_by}) holds {other.described}: they overlap in {size} elements"
        )
    if hole is not None and complete:
        holders = sorted({piece.held_by for piece in pieces})
        ranks = some([str(rank) for rank in holders])
        problems.append(f"{quote(s.name)}: files of rank {ranks} hold {count} of {s.size} elements, {_printed(hole)} are in no source file")
    return problems


def _printed(box: Iterable[tuple[int, int]]) -> str:
    return f"[{', '.join(f'{start}:{stop}' for start, stop in box)}]"
