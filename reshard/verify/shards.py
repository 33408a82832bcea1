"""The stored tensors of every rank, under the names of transformers' modules; read as the files have them, by no descriptor."""

import mmap
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

import torch

from reshard import formats
from reshard.dtypes import torch_dtypes
from reshard.errors import FormatError
from reshard.foreign import quote
from reshard.formats.manifest import read_manifest
from reshard.formats.pieces import Piece
from reshard.layout import Mesh, Rank
from reshard.stores.files import safe_join
from reshard.verify.quantised import block_of, paired, weight
from reshard.verify.tables import Engine, Row, Table, engine_of

_FLOATS = ("BF16", "F16", "F32", "F64")


@dataclass(frozen=True)
class Held:
    """A tensor of a rank as its file holds it; what the engine's table says of it (None: nothing), and the number of its expert."""

    info: Piece
    row: Row | None = None
    expert: int | None = None
    codes: Piece | None = None  # of a quantised one, with its scales: `info` is then what the weight would be
    scales: Piece | None = None

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def file(self) -> str:
        return self.info.file


@dataclass(frozen=True)
class Shards:
    """A checkpoint as its ranks hold it: `tables[rank.number]` maps names to stored tensors, those of the files, or once they are
    ``named`` those of transformers' modules; `extra[rank.number]` are what no forward uses; `first[rank.number]` is the number of a
    rank's first layer where names count them within a stage; `settings` is what each file says of the model (Megatron's args)."""

    folder: Path
    format: str
    engine: Engine
    mesh: Mesh
    ranks: list[Rank]
    tables: list[dict[str, Held]]
    extra: list[list[Held]] = field(default_factory=list)
    first: list[int] = field(default_factory=list)
    settings: Mapping[str, Mapping] = field(default_factory=dict)
    rows: Table | None = None
    block: int = 128  # rows of a block of scales

    def named(self, rows: Table) -> "Shards":
        """These shards under the names of transformers' modules; a name that has no row stays as it is. Raises FormatError."""
        tables = []
        for rank, stored in zip(self.ranks, self.tables, strict=True):
            table: dict[str, Held] = {}
            for name, held in stored.items():
                if found := rows.find(name):
                    row, layer, expert = found
                    held = replace(held, info=_turned(held.info, row), row=row, expert=expert)
                    layer = None if layer is None else layer + self.first[rank.number]
                    name = f"{row.path}.{row.kind}".format(layer=layer, expert=expert)
                if name in table:
                    raise FormatError(
                        f"{self.folder}: {quote(held.name)} and {quote(table[name].name)} are the same tensor ({name}) on rank {rank.number}"
                    )
                table[name] = held
            tables.append(table)
        return replace(self, tables=tables, rows=rows)

    @property
    def quantised(self) -> bool:
        """Whether any rank holds codes."""
        return any(held.codes is not None for table in self.tables for held in table.values())

    def bytes(self, rank: Rank) -> int:
        return sum(held.info.nbytes for held in self.tables[rank.number].values())

    def elements(self, rank: Rank) -> int:
        return sum(prod(held.info.shape) for held in self.tables[rank.number].values())

    def read(self, held: Held) -> torch.Tensor:
        """The tensor, mapped from its file: no byte is read before it is used. A quantised one is computed."""
        if held.codes is not None and held.scales is not None:
            return weight(self._mapped(held.codes), self._mapped(held.scales), self.block, held.name)
        return self._mapped(held.info)

    def _mapped(self, info: Piece) -> torch.Tensor:
        dtype = torch_dtypes()[info.dtype]
        if not info.nbytes:
            return torch.empty(info.shape, dtype=dtype)
        path = safe_join(self.folder, info.file)
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        if info.strides is None:
            count = info.nbytes // dtype.itemsize
            return torch.frombuffer(mapped, dtype=dtype, count=count, offset=info.offset).view(info.shape)
        span = 1 + sum((size - 1) * step for size, step in zip(info.shape, info.strides))
        return torch.frombuffer(mapped, dtype=dtype, count=span, offset=info.offset).as_strided(info.shape, info.strides)


def _turned(info: Piece, row: Row) -> Piece:
    """A projection that is stored with its inputs first, as one whose outputs are first: the same bytes, with steps."""
    if row.transposed != "always" or row.cut == "experts" or len(info.shape) != 2 or info.strides is not None:
        return info
    return info._replace(shape=info.shape[::-1], strides=(1, info.shape[1]))


def open_shards(folder: Path, format: str | None = None) -> Shards:
    """Read the headers of the checkpoint in `folder`. Raises FormatError."""
    kind = formats.recognise(folder, read_manifest(folder)) if format is None else formats.get(format)
    engine = engine_of().get(kind.name)
    if engine is None:
        raise FormatError(f"{folder} is of format {kind.name}, of which verify does not know how its engine computes",
                          "try --method permute, or convert it to one of " + ", ".join(engine_of()))  # fmt: skip
    contents = kind.read(folder)
    if any(piece.region is not None for piece in contents.pieces):
        raise FormatError(
            f"{folder} holds pieces of whole tensors, not the ranks of an engine", "convert it first: reshard convert … --to tp --tp N"
        )
    ranks = kind.rules.ranks(contents.mesh)
    stages = contents.stages
    first = [stages[rank.pp][0] if stages and kind.rules.local and stages[rank.pp] else 0 for rank in ranks]
    tables: list[dict[str, Held]] = [{} for _ in ranks]
    extra: list[list[Held]] = [[] for _ in ranks]
    by_rank: list[list[Piece]] = [[] for _ in ranks]
    for piece in contents.pieces:
        if engine.kind_beside(piece.name):
            extra[piece.rank].append(Held(piece))
        else:
            by_rank[piece.rank].append(piece)
    for table, pieces in zip(tables, by_rank):
        for info, codes, scales in paired(pieces):
            if info.dtype not in _FLOATS:
                raise FormatError(
                    f"{folder}: {quote(info.name)} is {info.dtype}: verify does not compute with weights quantised so",
                    "dequantise: reshard convert … --dequantise",
                )
            table[info.name] = Held(info, codes=codes, scales=scales)
    return Shards(folder, kind.name, engine, contents.mesh, ranks, tables, extra, first, contents.settings, block=block_of(folder))
