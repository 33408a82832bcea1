"""``transformers``: its distributed checkpoints (``save_pretrained(distributed_checkpoint=True)``), and torch's own of the same files.

A tensor is cut into boxes, and each rank's file holds some of them. Names are those that a model has in memory: experts stacked and
fused, a tied head too. Files do not say how large a tensor is; its layout does. Sources: transformers 5.23, torch 2.13 ``hf_storage.py``.
"""

from pathlib import Path

from reshard.dtypes import DTYPE_SIZE
from reshard.errors import FormatError
from reshard.formats import Contents, Folder, Format, OutFile, Target, parts
from reshard.formats.manifest import read_manifest
from reshard.formats.pieces import Piece, dealt
from reshard.formats.shards import NOTE, metadata_of, name_of, noted, read_shards
from reshard.geometry.block import Stored
from reshard.geometry.regions import Chunk
from reshard.layout import Mesh, Rules
from reshard.layout.mesh import even_stages, rows
from reshard.stores import safetensors


def _recognise(folder: Path, names: set[str]) -> bool:
    return noted(folder, names) is False


def _read(folder: Path) -> Contents:
    pieces = []
    for shard in read_shards(folder):
        if NOTE in shard.metadata:
            raise FormatError(f"{folder}: {shard.file} is of format tp, others are not", "files of several checkpoints were mixed")
        for name, at in shard.tensors.items():
            begin = shard.offsets.get(name, (0,) * len(at.shape))
            pieces.append(Piece(shard.file, at.offset, at.dtype, at.shape, name, 0, Chunk(begin), holder=shard.rank))
    manifest = read_manifest(folder)
    writer = "reshard" if manifest else "transformers, or torch's HuggingFaceStorageWriter"
    return Contents(Mesh(), pieces, manifest and manifest.get("layout"), writer=writer)


def _write(target: Target, stored: list[Stored]) -> Folder:
    files, pieces = [], []
    by_name = {s.name: s for s in stored}
    for rank in target.ranks:
        own = {s.name: part for s in stored if (part := dealt(s.shape, target.mesh.tp, rank.number))}
        names = parts([(name, by_name[name].size * DTYPE_SIZE[by_name[name].dtype]) for name in own], target.max_file)
        for i, chosen in enumerate(names, 1):
            path = name_of(rank.number, i, len(names))
            offsets = {name: own[name][0] for name in chosen}
            image = safetensors.compose([(name, by_name[name].dtype, own[name][1]) for name in chosen], metadata_of(offsets))
            files.append(OutFile(path, image, rank.number))
            for name in chosen:
                at = image.tensors[name]
                pieces.append(
                    Piece(path, at.offset, at.dtype, at.shape, name, 0, Chunk(offsets[name]), None, rank.number, by_name[name].shape)
                )
    return Folder(files, pieces, {})


FORMAT = Format(
    "transformers",
    "hf",
    Rules(rows, even_stages, even=False),
    _recognise,
    _read,
    _write,
    whole=True,
    forms=("memory", "stacked", "twice"),
    usage="from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained({repo})",
)
