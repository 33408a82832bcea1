"""What a tensor-parallel rank's tensor has of the whole one, as DeepSpeed's affine maps say it: strided blocks on both sides.

Source: deepspeed 0.19 ``checkpoint/affine.py``, whose numbers are arguments of ``torch.as_strided``.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

from reshard.dtypes import DTYPE_SIZE
from reshard.errors import FormatError
from reshard.foreign import quote
from reshard.formats.pieces import Piece
from reshard.geometry.block import Block, cut, end, row_major
from reshard.geometry.regions import Chunk, FlatRange

Shape = tuple[int, ...]
_VERSION = 1
#: pieces of one tensor on one rank: an as_strided block that is no box of the whole comes apart into runs
_MOST = 1 << 16
_UNIVERSAL = "make a universal checkpoint of it with `python -m deepspeed.checkpoint.ds_to_universal`, and name that folder"


class View(NamedTuple):
    """A block of elements: its shape, and where it begins and how it steps in the whole tensor and in the rank's own."""

    shape: Shape
    whole: tuple[int, Shape]
    own: tuple[int, Shape]
    scale: float = 1.0  # of what the rank holds


@dataclass(frozen=True)
class Share:
    """What a rank's tensor of `shape` has of one of shape `whole`; without views it is the whole."""

    whole: Shape
    shape: Shape
    views: tuple[View, ...] = ()

    def pieces(self, file: str, offset: int, dtype: str, low: int, high: int, name: str, holder: int) -> Iterator[Piece]:
        """Elements `low` to `high` of the rank's tensor, which lie one after another from byte `offset` of `file`."""
        if not self.views:
            region, shape = (None, self.shape) if (low, high) == (0, prod(self.shape)) else (FlatRange(low), (high - low,))
            yield Piece(file, offset, dtype, shape, name, 0, region, None, holder, None if region is None else self.whole)
            return
        for view in self.views:
            block = Block(tuple((0, size) for size in view.shape), *view.own)
            axes = tuple(sorted((i for i, size in enumerate(view.shape) if size > 1), key=lambda i: -view.own[1][i]))
            for part in cut(block, axes, low - block.offset, high - block.offset):
                at = view.whole[0] + sum(start * step for (start, _), step in zip(part.box, view.whole[1]))
                for skipped, size, strides, region in _regions(self.whole, part.shape, at, view.whole[1], part.strides):
                    byte = offset + (part.offset + skipped - low) * DTYPE_SIZE[dtype]
                    yield Piece(file, byte, dtype, size, name, 0, region, strides, holder, self.whole, view.scale)


def _regions(whole: Shape, shape: Shape, at: int, steps: Shape, own: Shape) -> Iterator[tuple[int, Shape, Shape, Chunk | FlatRange]]:
    """A strided block of a row-major tensor as boxes and flat ranges of it: (elements skipped in the rank's own, size, own strides, region)."""
    long = sorted((i for i, size in enumerate(shape) if size > 1), key=lambda i: -steps[i])
    shape, steps, own = (tuple(each[i] for i in long) for each in (shape, steps, own))
    rows = row_major(whole)
    offsets = tuple((at // row) % size for row, size in zip(rows, whole))
    dims = [rows.index(step) if step in rows else None for step in steps]
    if None not in dims and len(set(dims)) == len(dims) and all(offsets[dim] + size <= whole[dim] for dim, size in zip(dims, shape)):
        sizes, strides = [1] * len(whole), [1] * len(whole)
        for dim, size, stride in zip(dims, shape, own):
            sizes[dim], strides[dim] = size, stride
        yield 0, tuple(sizes), tuple(strides), Chunk(offsets)
    elif steps == row_major(shape):
        yield 0, shape, own, FlatRange(at)
    else:
        if shape[0] > _MOST:
            raise FormatError("an affine map is of single elements")
        for i in range(shape[0]):
            for skipped, *rest in _regions(whole, shape[1:], at + i * steps[0], steps[1:], own[1:]):
                yield i * own[0] + skipped, *rest


def shares(path: object, table: Any) -> dict[tuple[str, int], Share]:
    """(name, tensor-parallel rank) → share, by the map in a file's ``universal_checkpoint_info``. Raises FormatError."""
    try:
        if table["version"] != _VERSION:
            raise FormatError(f"{path}: its affine map is of version {quote(table['version'])}, {_VERSION} is known", _UNIVERSAL)
        return {
            (_plain(pattern), rank): _share(path, pattern, entry["logical_shape"], held)
            for pattern, entry in table["params"].items()
            for rank, held in entry["ranks"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(
            f"{path}: its affine map is not as DeepSpeed writes one ({type(error).__name__}: {quote(error)})", _UNIVERSAL
        ) from None


def _plain(pattern: str) -> str:
    """The one name that a pattern is for: it is escaped, between ^ and $. A pattern of any other kind is no name's."""
    return re.sub(r"\\(.)", r"\1", pattern.removeprefix("^").removesuffix("$"))


def _share(path: object, pattern: str, whole: list[int], held: Mapping[str, Any]) -> Share:
    whole, shape = _sizes(whole), _sizes(held["shard_shape"])
    views = []
    for piece in held["pieces"]:
        view = View(_sizes(piece["shape"]), *((_sizes([piece[side][0]])[0], _sizes(piece[side][1])) for side in ("source", "dest")))
        scale = piece.get("scale", 1.0)
        if not isinstance(scale, (int, float)) or not 0 < abs(scale) < 1e6:
            raise ValueError(f"{pattern} is held times {scale}")
        view = view._replace(scale=float(scale))  # a bias that every rank adds
        if not prod(view.shape):
            continue
        for (offset, steps), size in ((view.whole, whole), (view.own, shape)):
            if len(steps) != len(view.shape) or end(offset, view.shape, steps) > prod(size):
                raise ValueError(f"a piece of {pattern} leaves its tensor")
        views.append(view)
    if sum(prod(view.shape) for view in views) != prod(shape):
        raise ValueError(f"the pieces of {pattern} do not fill its shard")
    if views == [View(whole, (0, row_major(whole)), (0, row_major(whole)))]:
        views = []
    return Share(whole, shape, tuple(views))


def _sizes(numbers: object) -> Shape:
    if not isinstance(numbers, (list, tuple)) or not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers):
        raise ValueError(f"{numbers} where sizes are due")
    return tuple(numbers)
