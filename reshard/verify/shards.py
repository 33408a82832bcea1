"""The stored tensors of every rank, under the names of transformers' modules; read as the files have them, by no descriptor."""

import mmap
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch

from reshard import formats
from reshard.dtypes import torch_dtypes
from reshard.errors import FormatError
from reshard.foreign import quote
from reshard.layout import Mesh, Rank
from reshard.stores import TensorInfo
from reshard.verify.names import FORMATS, module_name, no_weight

_FLOATS = ("BF16", "F16", "F32", "F64")
_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Held:
    """A tensor of a rank: its name in the file, the file, and where it lies there."""

    name: str
    file: str
    info: TensorInfo


@dataclass(frozen=True)
class Shards:
    """A checkpoint as its ranks hold it: `tables[rank.number]` maps module names to stored tensors; `extra[rank.number]` are those that
    no forward uses; `settings` is what each file says of the model (Megatron's args)."""

    folder: Path
    format: str
    mesh: Mesh
    ranks: list[Rank]
    tables: list[dict[str, Held]]
    extra: list[list[Held]] = field(default_factory=list)
    settings: Mapping[str, Mapping] = field(default_factory=dict)

    def layers(self, rank: Rank) -> set[int]:
        """Numbers of the layers that `rank` holds tensors of."""
        return {int(match[1]) for name in self.tables[rank.number] if (match := _LAYER.search(name))}

    def bytes(self, rank: Rank) -> int:
        return sum(held.info.nbytes for held in self.tables[rank.number].values())

    def elements(self, rank: Rank) -> int:
        return sum(prod(held.info.shape) for held in self.tables[rank.number].values())

    def read(self, held: Held) -> torch.Tensor:
        """The tensor, mapped from its file: no byte is read before it is used."""
        dtype = torch_dtypes()[held.info.dtype]
        if not held.info.nbytes:
            return torch.empty(held.info.shape, dtype=dtype)
        path = formats.safe_join(self.folder, held.file)
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        if held.info.strides is None:
            count = held.info.nbytes // dtype.itemsize
            return torch.frombuffer(mapped, dtype=dtype, count=count, offset=held.info.offset).view(held.info.shape)
        span = 1 + sum((size - 1) * step for size, step in zip(held.info.shape, held.info.strides))
        return torch.frombuffer(mapped, dtype=dtype, count=span, offset=held.info.offset).as_strided(held.info.shape, held.info.strides)


def open_shards(folder: Path, format: str | None = None) -> Shards:
    """Read the headers of the checkpoint in `folder`. Raises FormatError."""
    kind = formats.recognise(folder) if format is None else formats.get(format)
    if kind.name not in FORMATS:
        raise FormatError(f"{folder} is of format {kind.name}, of which verify does not know how its engine computes",
                          "try --method permute, or convert it to one of " + ", ".join(FORMATS))  # fmt: skip
    contents = kind.read(folder)
    if contents.boxes is not None:
        raise FormatError(f"{folder} holds pieces of whole tensors, not the ranks of an engine", "convert it first: reshard convert … --to tp --tp N")
    quantised = next(((name, info) for table in contents.tensors for name, (_, info) in table.items() if info.dtype not in _FLOATS and not no_weight(name)), None)
    if quantised:
        name, info = quantised
        raise FormatError(f"{folder}: {quote(name)} is {info.dtype}: verify does not compute with quantised weights")
    ranks = kind.rules.ranks(contents.mesh)
    stages = contents.stages
    tables, extra = [], []
    for rank, stored in zip(ranks, contents.tensors, strict=True):
        first = stages[rank.pp][0] if stages and kind.rules.local and stages[rank.pp] else 0
        table: dict[str, Held] = {}
        unused: list[Held] = []
        for name, (file, info) in stored.items():
            module = module_name(name, kind.name, first)
            if module is None:
                unused.append(Held(name, file, info))
                continue
            if module in table:
                raise FormatError(f"{folder}: {quote(name)} and {quote(table[module].name)} are the same tensor ({module}) on rank {rank.number}")
            table[module] = Held(name, file, info)
        tables.append(table)
        extra.append(unused)
    return Shards(folder, kind.name, contents.mesh, ranks, tables, extra, contents.settings)
