"""Constants that an engine keeps beside the weights. A conversion writes them anew, so those of a source must be the same numbers."""

from collections.abc import Mapping, Sequence
from math import prod

from reshard.dtypes import numbers_of
from reshard.errors import FormatError
from reshard.foreign import quote
from reshard.formats.engine import constant_bytes
from reshard.layout import Placement
from reshard.layout.model import Constant
from reshard.stores import TensorInfo
from reshard.stores.files import AnyPath, open_file

_WINDOW = 1 << 20  # bytes: constants that lie this near to each other are read at once
_SHOWN = 8


def check_constants(folder: AnyPath, placement: Placement, tensors: Sequence[Mapping[str, tuple[str, TensorInfo]]]) -> None:
    """Raises FormatError where a file of `folder` holds another value than the layout declares: no conversion carries it.

    `tensors` are each rank's, by name: file and place.
    """
    by_file: dict[str, list[tuple[int, str, Constant, TensorInfo]]] = {}
    wrong: list[str] = []
    for rank in placement.ranks[: len(tensors)]:
        for name, constant in placement.constants(rank):
            file, info = tensors[rank.number].get(name, ("", None))
            if info is None:
                continue
            if prod(info.shape) != prod(constant.shape):
                wrong.append(f"{name} ({file}) has shape {list(info.shape)}, expected {list(constant.shape)}")
            else:
                by_file.setdefault(file, []).append((info.offset, name, constant, info))
    for file, held in by_file.items():
        for (_, name, constant, info), raw in zip(held, _contents(folder / file, [info for *_, info in held])):
            if info.dtype == constant.dtype and raw == constant_bytes(constant.value, constant.dtype) * prod(constant.shape):
                continue
            import numpy as np

            values = np.frombuffer(raw, numbers_of(info.dtype))
            other = [value for value in values.tolist() if value != constant.value]
            if other:
                wrong.append(f"{name} ({file}) is {quote(other[0])}, expected {constant.value:g}")
    if wrong:
        lines = wrong[:_SHOWN] + [f"… and {len(wrong) - _SHOWN} more"] * (len(wrong) > _SHOWN)
        text = f"{folder} holds constants that are not those of layout {placement.layout.name}, and no conversion carries them:\n  "
        raise FormatError(
            text + "\n  ".join(lines), "convert the checkpoint that these shards were made from, before its scales were measured"
        )


def _contents(path: AnyPath, infos: Sequence[TensorInfo]) -> list[bytes]:
    """The bytes of each of `infos`, in few reads."""
    order = sorted(range(len(infos)), key=lambda i: infos[i].offset)
    out = [b""] * len(infos)
    with open_file(path) as file:
        start, held = 0, b""
        for at, i in enumerate(order):
            begin, stop = infos[i].offset, infos[i].offset + infos[i].nbytes
            if stop > start + len(held) or begin < start:
                ends = [end for j in order[at:] if (end := infos[j].offset + infos[j].nbytes) <= begin + _WINDOW]
                start = begin
                file.seek(begin)
                held = file.read(max([stop, *ends]) - begin)
            out[i] = held[begin - start : stop - start]
    return out
