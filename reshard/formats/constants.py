"""Constants that an engine keeps beside the weights. A conversion writes them anew, so those of a source must be the same numbers."""

from collections.abc import Mapping, Sequence
from math import prod

from reshard.dtypes import numbers_of
from reshard.errors import FormatError
from reshard.foreign import quote
from reshard.formats.engine import constant_bytes
from reshard.formats.pieces import Piece
from reshard.layout import Placement
from reshard.layout.model import Constant
from reshard.stores.files import AnyPath, open_file

_WINDOW = 1 << 20  # bytes: constants that lie this near to each other are read at once
_SHOWN = 8


def check_constants(folder: AnyPath, placement: Placement, held: Mapping[int, Mapping[str, Piece]]) -> None:
    """Raises FormatError where a file of `folder` holds another value than the layout declares: no conversion carries it.

    `held` are each rank's pieces, by name.
    """
    by_file: dict[str, list[tuple[Constant, Piece]]] = {}
    wrong: list[str] = []
    for rank in placement.ranks:
        for name, constant in placement.constants(rank):
            piece = held.get(rank.number, {}).get(name)
            if piece is None:
                continue
            if prod(piece.shape) != prod(constant.shape):
                wrong.append(f"{piece} has shape {list(piece.shape)}, expected {list(constant.shape)}")
            else:
                by_file.setdefault(piece.file, []).append((constant, piece))
    for file, own in by_file.items():
        for (constant, piece), raw in zip(own, _contents(folder / file, [piece for _, piece in own])):
            if piece.dtype == constant.dtype and raw == constant_bytes(constant.value, constant.dtype) * prod(constant.shape):
                continue
            import numpy as np

            values = np.frombuffer(raw, numbers_of(piece.dtype))
            other = [value for value in values.tolist() if value != constant.value]
            if other:
                wrong.append(f"{piece} is {quote(other[0])}, expected {constant.value:g}")
    if wrong:
        lines = wrong[:_SHOWN] + [f"… and {len(wrong) - _SHOWN} more"] * (len(wrong) > _SHOWN)
        text = f"{folder} holds constants that are not those of layout {placement.layout.name}, and no conversion carries them:\n  "
        raise FormatError(
            text + "\n  ".join(lines), "convert the checkpoint that these shards were made from, before its scales were measured"
        )


def _contents(path: AnyPath, pieces: Sequence[Piece]) -> list[bytes]:
    """The bytes of each of `pieces`, in few reads."""
    order = sorted(range(len(pieces)), key=lambda i: pieces[i].offset)
    out = [b""] * len(pieces)
    with open_file(path) as file:
        start, held = 0, b""
        for at, i in enumerate(order):
            begin, stop = pieces[i].offset, pieces[i].offset + pieces[i].nbytes
            if stop > start + len(held) or begin < start:
                ends = [end for j in order[at:] if (end := pieces[j].offset + pieces[j].nbytes) <= begin + _WINDOW]
                start = begin
                file.seek(begin)
                held = file.read(max([stop, *ends]) - begin)
            out[i] = held[begin - start : stop - start]
    return out
