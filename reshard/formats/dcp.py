"""``dcp``: torch.distributed.checkpoint, as FSDP2, Accelerate, Axolotl and torchtitan write it: ``.metadata`` and ``__R_I.distcp``.

A folder says of each tensor which boxes of it lie where, and nothing of who had them: pieces of whole tensors, assembled by their
offsets. Names may stand below keys of the state that was saved (``model.``, ``state.model.``), beside an optimizer's.
Sources: torch 2.13 ``filesystem.py``; accelerate 1.15 ``fsdp_utils.py``; torchtitan ``checkpoint.py``.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from reshard.errors import FormatError
from reshard.foreign import quote
from reshard.formats import Contents, Folder, Format, OutFile, States, Target, parts
from reshard.formats.manifest import read_manifest
from reshard.formats.pieces import Piece, dealt
from reshard.geometry.block import Stored
from reshard.geometry.regions import Chunk
from reshard.layout import Mesh, Rules
from reshard.layout.mesh import even_stages, rows
from reshard.stores import FileImage, dcp
from reshard.stores.files import reading, safe_join
from reshard.text import some

_FILE = re.compile(r"__([0-9]{1,6})_([0-9]{1,6})\.distcp")
_OF_RANK = re.compile(r"__([0-9]{1,6})\.metadata")  # of a save without collectives
METADATA = ".metadata"
#: where Accelerate, the HF Trainer and Axolotl put the model inside of a checkpoint's folder
_INSIDE = "pytorch_model_fsdp_0"
_OPTIMIZER = "optimizer_0"
_MOST_BLOBS = 64 << 20  # bytes: numbers and names, of a trainer that saved no arrays as such
#: modules that wrap others in memory: their names stand in the middle of a parameter's
_WRAPPERS = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
#: what all ranks of Megatron share, in folders that are its own (torch_dist)
MEGATRONS = "common_state/shard_0_1"
_COPY = "copy the folder again, whole"


def _recognise(folder: Path, names: set[str]) -> bool:
    if names & {"metadata.json", "common.pt"}:  # Megatron's torch_dist
        return False
    return METADATA in names or any(_FILE.fullmatch(name) or _OF_RANK.fullmatch(name) for name in names) or (folder / _INSIDE).is_dir()


def _read(folder: Path) -> Contents:
    inside = "" if not (folder / _INSIDE).is_dir() or (folder / METADATA).is_file() else f"{_INSIDE}/"
    root = folder / _INSIDE if inside else folder
    metadata = metadata_of(root)
    if MEGATRONS in metadata.others:
        raise FormatError(f"{folder} holds no metadata.json, which Megatron writes last: the save was not finished, or not copied whole",
                          "copy the folder again, or take the checkpoint before it")  # fmt: skip
    pieces = pieces_in(root, inside, metadata.tensors)

    def states() -> States:
        """Of Accelerate's folders an optimizer's stands beside the model's; elsewhere they share one."""
        beside = folder / _OPTIMIZER
        if not (inside and beside.is_dir()):
            return States(pieces, _blobs(root, metadata.others), metadata.paths)
        told = metadata_of(beside)
        return States(pieces_in(beside, f"{_OPTIMIZER}/", told.tensors), _blobs(beside, told.others), told.paths)

    manifest = read_manifest(folder)
    writer = "reshard" if manifest else "Accelerate (HF Trainer, Axolotl)" if inside else "torch.distributed.checkpoint"
    return Contents(Mesh(), pieces, manifest and manifest.get("layout"), nested=True, writer=writer, states=states)


def pieces_in(root: Path, inside: str, tensors: Mapping[str, dcp.Stored]) -> list[Piece]:
    """The chunks of `tensors` in the files of `root`, which is the folder `inside` ("" or "name/") of the checkpoint's."""
    by_file: dict[str, list[tuple[str, dcp.Stored, dcp.Item]]] = defaultdict(list)
    for name, stored in tensors.items():
        for item in stored.items:
            by_file[item.file].append((name, stored, item))
    at = {file: safe_join(root, file) for file in sorted(by_file)}
    missing = [_named(file) for file, path in at.items() if not path.is_file()]
    if missing:
        raise FormatError(f"{root}: .metadata names {len(at)} files, {len(missing)} of them are missing: {some(missing)}", _COPY)
    pieces = []
    for number, (file, path) in enumerate(at.items()):
        match = _FILE.fullmatch(file)
        holder = int(match[1]) if match else number
        found = dcp.locate(path, [(name, item) for name, _, item in by_file[file]])
        for (name, stored, item), info in zip(by_file[file], found):
            if info.dtype != stored.dtype:
                raise FormatError(f"{path}: {quote(name)} is {info.dtype}, .metadata says {stored.dtype}", _COPY)
            region = Chunk(item.offsets)
            pieces.append(
                Piece(inside + file, info.offset, info.dtype, info.shape, _unwrapped(name), 0, region, info.strides, holder, stored.size)
            )
    return pieces


def _blobs(root: Path, others: Mapping[str, dcp.Item]) -> dict[str, bytes]:
    """What is no tensor, as torch pickled it: never unpickled here."""
    if sum(blob.length for blob in others.values()) > _MOST_BLOBS:
        raise FormatError(f"{root} holds more than {_MOST_BLOBS >> 20} MiB of what is no tensor", "leave out --optimizer")
    out = {}
    for name, blob in others.items():
        path = safe_join(root, blob.file)
        with reading(path), path.open("rb") as file:
            file.seek(blob.start)
            out[name] = file.read(blob.length)
        if len(out[name]) < blob.length:
            raise FormatError(f"{path} ends inside {quote(name)}", _COPY)
    return out


def _named(file: str) -> str:
    """A file with the rank that wrote it."""
    match = _FILE.fullmatch(file)
    return f"{file} (rank {int(match[1])})" if match else file


def metadata_of(root: Path) -> dcp.Metadata:
    """What lies in a folder, by its ``.metadata`` or those of all its ranks."""
    if (root / METADATA).is_file():
        return dcp.read_metadata(root / METADATA)
    own = sorted((int(match[1]), path) for path in root.iterdir() if (match := _OF_RANK.fullmatch(path.name)))
    if not own:
        raise FormatError(f"{root} holds .distcp files and no .metadata, which is written last: the save was not finished, or not copied whole",
                          "copy the folder again, or take the checkpoint before it")  # fmt: skip
    lacking = sorted(set(range(own[-1][0] + 1)) - {rank for rank, _ in own})
    if lacking:
        raise FormatError(f"{root} holds the metadata of {len(own)} ranks; missing: __{lacking[0]}.metadata (rank {lacking[0]})", _COPY)
    out = dcp.Metadata({})
    for _, path in own:
        one = dcp.read_metadata(path)
        out.others.update(one.others)
        out.paths.update(one.paths)
        for name, stored in one.tensors.items():
            first = out.tensors.setdefault(name, stored)
            if (first.dtype, first.size) != (stored.dtype, stored.size):
                raise FormatError(
                    f"{path}: {quote(name)} is {stored.dtype} {list(stored.size)}, another rank says {first.dtype} {list(first.size)}",
                    _COPY,
                )
            if first is not stored:
                first.items.extend(stored.items)
    return out


def _unwrapped(name: str) -> str:
    return name if "_" not in name else ".".join(word for word in name.split(".") if word not in _WRAPPERS)


def _write(target: Target, stored: list[Stored]) -> Folder:
    """Each tensor cut along its first dimension over the ranks, as FSDP2 cuts its parameters. What is no tensor is rank 0's."""
    count, beside = target.mesh.tp, target.beside or States([])
    mine = {rank.number for rank in target.ranks}
    metadata = dcp.Metadata({s.name: dcp.Stored(s.dtype, s.shape, []) for s in stored}, paths=dict(beside.paths))
    files, pieces = [], []
    for holder in range(count):
        own = [(s, *part) for s in stored if (part := dealt(s.shape, count, holder))]
        sizes = [(s.name, dcp.nbytes(s.dtype, size)) for s, _, size in own]
        by_name = {each[0].name: each for each in own}
        groups = parts(sizes, target.max_file) if own else []
        for i, names in enumerate(groups):
            path, chosen = f"__{holder}_{i}.distcp", [by_name[name] for name in names]
            image, places = dcp.compose_items([(s.dtype, size) for s, _, size in chosen])
            for (s, offsets, size), (start, length, offset) in zip(chosen, places):
                metadata.tensors[s.name].items.append(dcp.Item(path, start, length, offsets, size))
                if holder in mine:
                    pieces.append(Piece(path, offset, s.dtype, size, s.name, 0, Chunk(offsets), None, holder, s.shape))
            if holder in mine:
                files.append(OutFile(path, image, holder))
        if not holder and beside.others:
            path = f"__0_{len(groups)}.distcp"
            image, starts = dcp.one_after_another([FileImage(len(each), ((0, each),), {}) for each in beside.others.values()])
            metadata.others.update({n: dcp.Item(path, at, len(each), (), ()) for at, (n, each) in zip(starts, beside.others.items())})
            files += [OutFile(path, image, 0)] if 0 in mine else []
    return Folder(files, pieces, {METADATA: dcp.compose_metadata(metadata)})


FORMAT = Format(
    "dcp",
    "hf",
    Rules(rows, even_stages, even=False),
    _recognise,
    _read,
    _write,
    others=("meta", "megatron"),
    holds=("model", "adapter"),
    whole=True,
    states=True,
    forms=("memory", "stacked", "twice"),
    small=(METADATA,),
    usage='import torch.distributed.checkpoint as dcp\n\nstate = model.state_dict()\ndcp.load(state, checkpoint_id="{folder}")',
)
