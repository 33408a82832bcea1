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
from reshard.formats import Contents, Folder, Format, OutFile, Target, parts
from reshard.formats.manifest import read_manifest
from reshard.formats.pieces import Piece, dealt
from reshard.geometry.block import Stored
from reshard.geometry.regions import Chunk
from reshard.layout import Mesh, Rules
from reshard.layout.mesh import even_stages, rows
from reshard.stores import dcp
from reshard.stores.files import safe_join
from reshard.text import some

_FILE = re.compile(r"__([0-9]{1,6})_([0-9]{1,6})\.distcp")
_OF_RANK = re.compile(r"__([0-9]{1,6})\.metadata")  # of a save without collectives
METADATA = ".metadata"
#: where Accelerate, the HF Trainer and Axolotl put the model inside of a checkpoint's folder
_INSIDE = "pytorch_model_fsdp_0"
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
    manifest = read_manifest(folder)
    writer = "reshard" if manifest else "Accelerate (HF Trainer, Axolotl)" if inside else "torch.distributed.checkpoint"
    held = metadata_of(root)
    if MEGATRONS in held.others:
        raise FormatError(f"{root} holds no metadata.json, which Megatron writes last: the save was not finished, or not copied whole",
                          "copy the folder again, or take the checkpoint before it")  # fmt: skip
    pieces = pieces_in(root, inside, held.tensors)
    return Contents(Mesh(), pieces, manifest and manifest.get("layout"), nested=True, writer=writer)


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
            pieces.append(
                Piece(
                    inside + file,
                    info.offset,
                    info.dtype,
                    info.shape,
                    _unwrapped(name),
                    0,
                    Chunk(item.offsets),
                    info.strides,
                    holder,
                    stored.size,
                )
            )
    return pieces


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
    out: dict[str, dcp.Stored] = {}
    for _, path in own:
        for name, stored in dcp.read_metadata(path).tensors.items():
            first = out.setdefault(name, stored)
            if (first.dtype, first.size) != (stored.dtype, stored.size):
                raise FormatError(
                    f"{path}: {quote(name)} is {stored.dtype} {list(stored.size)}, another rank says {first.dtype} {list(first.size)}",
                    _COPY,
                )
            if first is not stored:
                first.items.extend(stored.items)
    return dcp.Metadata(out)


def _unwrapped(name: str) -> str:
    return name if "_" not in name else ".".join(word for word in name.split(".") if word not in _WRAPPERS)


def _write(target: Target, stored: list[Stored]) -> Folder:
    """Each tensor cut along its first dimension over the ranks, as FSDP2 cuts its parameters."""
    count = target.mesh.tp
    mine = {rank.number for rank in target.ranks}
    metadata = dcp.Metadata({s.name: dcp.Stored(s.dtype, s.shape, []) for s in stored})
    files, pieces = [], []
    for holder in range(count):
        own = [(s, *part) for s in stored if (part := dealt(s.shape, count, holder))]
        sizes = [(s.name, dcp.nbytes(s.dtype, size)) for s, _, size in own]
        by_name = {each[0].name: each for each in own}
        for i, names in enumerate(parts(sizes, target.max_file) if own else []):
            path, chosen = f"__{holder}_{i}.distcp", [by_name[name] for name in names]
            image, places = dcp.compose_items([(s.dtype, size) for s, _, size in chosen])
            for (s, offsets, size), (start, length, offset) in zip(chosen, places):
                metadata.tensors[s.name].items.append(dcp.Item(path, start, length, offsets, size))
                if holder in mine:
                    pieces.append(Piece(path, offset, s.dtype, size, s.name, 0, Chunk(offsets), None, holder, s.shape))
            if holder in mine:
                files.append(OutFile(path, image, holder))
    return Folder(files, pieces, {METADATA: dcp.compose_metadata(metadata)})


FORMAT = Format(
    "dcp",
    "hf",
    Rules(rows, even_stages, even=False),
    _recognise,
    _read,
    _write,
    others=("meta",),
    whole=True,
    forms=("memory", "stacked"),
    small=(METADATA,),
    usage='import torch.distributed.checkpoint as dcp\n\nstate = model.state_dict()\ndcp.load(state, checkpoint_id="{folder}")',
)
