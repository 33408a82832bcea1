"""``tp``, reshard's own: one safetensors file set per rank, Hugging Face names, self-describing.

Files are named and annotated as torch's HuggingFaceStorageWriter and transformers 5 do (``shard-0000R-model-…``,
``DCP_SHARDING_INFO`` with the offsets of each piece), so that ``from_pretrained`` and DCP open them where every piece is
one box of the whole tensor. Where it is not (a fused tensor whose parts are each cut), no offset can say so: such
tensors are listed under ``reshard`` in the metadata, with the mesh, and other readers refuse them. ``from_pretrained``
asks for the names that a model has in memory, tied head included: it opens models where those are the Hub's. Sources: torch 2.13 ``hf_storage.py``, transformers 5.23.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from reshard.dtypes import DTYPE_SIZE
from reshard.errors import FormatError
from reshard.foreign import parse
from reshard.formats import Contents, Folder, Format, OutFile, Target, parts
from reshard.formats.manifest import mesh_of, read_manifest
from reshard.formats.pieces import Piece, pieces_of
from reshard.geometry.block import Stored, row_major
from reshard.geometry.regions import Chunk
from reshard.layout import Mesh, Placement, Rules
from reshard.layout.mesh import even_stages, grid
from reshard.stores import safetensors

_FILE = re.compile(r"shard-([0-9]{5})-model-([0-9]{5})-of-([0-9]{5})\.safetensors")


def _recognise(folder: Path, names: set[str]) -> bool:
    return any(_FILE.fullmatch(name) for name in names)


def _read(folder: Path) -> Contents:
    found: dict[int, dict[int, str]] = defaultdict(dict)
    counts: dict[int, set[int]] = defaultdict(set)
    for path in sorted(folder.iterdir()):
        if match := _FILE.fullmatch(path.name):
            rank, part, count = map(int, match.groups())
            found[rank - 1][part] = path.name
            counts[rank - 1].add(count)
    if not found:
        raise FormatError(f"{folder} holds no shard-…-model-….safetensors")
    for rank in range(max(found) + 1):
        held = sorted(found[rank])
        if len(counts[rank]) != 1 or held != list(range(1, next(iter(counts[rank]), 0) + 1)):
            raise FormatError(
                f"{folder}: rank {rank} has parts {held}, its files say there are {sorted(counts[rank])}", "copy the folder again, whole"
            )
    pieces: list[Piece] = []
    offsets: dict[str, tuple[int, ...]] = {}  # of the pieces of a file
    notes = set()
    for rank in sorted(found):
        for file in found[rank].values():
            held, metadata = safetensors.read(folder / file)
            try:
                info = parse(metadata.get("DCP_SHARDING_INFO", "{}").encode())
                offsets = {name: _offset(value["saved_offsets"]) for name, value in info.items()}
            except (ValueError, KeyError, TypeError, AttributeError):
                raise FormatError(f"{folder / file}: DCP_SHARDING_INFO is not the JSON that torch writes") from None
            note = _mesh_note(folder / file, metadata.get("reshard"))
            notes.add(note)
            if note is None:  # written by transformers or torch: boxes of whole tensors, on a mesh that only the boxes tell
                pieces += [
                    Piece(file, at.offset, at.dtype, at.shape, name, 0, Chunk(offsets.get(name, (0,) * len(at.shape))), holder=rank)
                    for name, at in held.items()
                ]
            else:
                pieces += pieces_of(file, held, rank)
    return Contents(Mesh(), pieces) if notes == {None} else _ours(folder, pieces, len(found), notes)


def _offset(numbers: object) -> tuple[int, ...]:
    """Raises ValueError for what is no list of sizes."""
    if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers):
        raise ValueError
    return tuple(numbers)


def _mesh_note(path: Path, note: str | None) -> tuple[str, Mesh] | None:
    """What a file's own metadata says of layout and mesh; None in a file that reshard did not write."""
    if note is None:
        return None
    try:
        table = parse(note.encode())
        mesh = Mesh(*(table[name] for name in ("tp", "pp", "ep")))
        if not all(type(size) is int and 0 < size <= 65536 for size in (mesh.tp, mesh.pp, mesh.ep)):
            raise ValueError
        return str(table["layout"]), mesh
    except (ValueError, KeyError, TypeError):
        raise FormatError(f"{path}: its metadata under 'reshard' names no mesh") from None


def _ours(folder: Path, pieces: list[Piece], ranks: int, notes: set) -> Contents:
    manifest = read_manifest(folder)
    said = {f"{note[1]}" if note else "nothing" for note in notes} | ({str(mesh_of(manifest))} if manifest else set())
    if len(said) != 1 or len(notes) != 1:
        raise FormatError(
            f"{folder}: its files and manifest disagree on the mesh: {', '.join(sorted(said))}", "files of several checkpoints were mixed"
        )
    layout, mesh = next(iter(notes))
    if ranks != mesh.tp * mesh.pp:
        raise FormatError(
            f"{folder} has files of {ranks} ranks, its metadata says {mesh.tp * mesh.pp} ({mesh})", "copy the folder again, whole"
        )
    return Contents(mesh, pieces, layout)


def _write(target: Target, stored: list[Stored]) -> Folder:
    files, pieces = [], []
    mesh = target.mesh
    offset_of = _offsets(target)
    for rank, own in target.by_rank(stored):
        names = parts([(s.name, s.size * DTYPE_SIZE[s.dtype]) for s in own.values()], target.max_file)
        for i, part in enumerate(names, 1):
            tensors = {name: own[name] for name in part}
            offsets = {s.name: offset_of(s) for s in tensors.values()}
            note = {"format": "tp", "layout": target.placement.layout.name, "tp": mesh.tp, "pp": mesh.pp, "ep": mesh.ep,
                    "rank": rank.number, "parts_cut": sorted(n for n, o in offsets.items() if o is None)}  # fmt: skip
            boxes = {name: {"saved_offsets": list(o)} for name, o in offsets.items() if o is not None}
            metadata = {"DCP_SHARDING_INFO": json.dumps(boxes), "DCP_VERSION": "1.0", "format": "pt", "reshard": json.dumps(note)}
            image = safetensors.compose([(s.name, s.dtype, s.shape) for s in tensors.values()], metadata)
            path = f"shard-{rank.number + 1:05d}-model-{i:05d}-of-{len(names):05d}.safetensors"
            files.append(OutFile(path, image, rank.number))
            pieces += pieces_of(path, image.tensors, rank.number)
    return Folder(files, pieces, {})


def _offsets(target: Target) -> Callable[[Stored], tuple[int, ...] | None]:
    """``whole_offsets`` for the tensors of `target`, worked out once for all layers and experts, whose blocks they share."""
    single = Placement(target.placement.layout, target.placement.section, target.placement.rules, Mesh())
    wholes = {s.name: s for s in single.stored()}
    known: dict[tuple, tuple[int, ...] | None] = {}

    def offset_of(stored: Stored) -> tuple[int, ...] | None:
        whole = wholes.get(stored.name)
        if whole is None:
            return None
        shared = tuple([(side.shape, *[(part.first[0], part.block, part.count) for part in side.parts]) for side in (stored, whole)])
        if shared not in known:
            known[shared] = whole_offsets(stored, whole)
        return known[shared]

    return offset_of


def whole_offsets(stored: Stored, whole: Stored) -> tuple[int, ...] | None:
    """Where the piece begins in the whole tensor (as a single rank would hold it), per dimension; None where the piece
    is not one box of it: a box it is when every block keeps its place relative to the others."""
    if not stored.blocks:
        return (0,) * len(stored.shape)  # an empty piece may be anywhere
    blocks = dict(whole.blocks)
    steps, own = row_major(whole.shape), row_major(stored.shape)
    first = None
    for key, block in stored.blocks:
        at = blocks[key].clip(block.box)
        begin, here = _digits(at.offset, steps, whole.shape), _digits(block.offset, own, stored.shape)
        offset = tuple(b - h for b, h in zip(begin, here))
        long = [i for i, (start, stop) in enumerate(block.box) if stop - start > 1]  # the others' strides say nothing
        if [_per_dim(at.strides[i], steps) for i in long] != [_per_dim(block.strides[i], own) for i in long] or (
            first is not None and offset != first
        ):
            return None
        first = offset
    return first


def _digits(flat: int, steps: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple((flat // step) % size if step and size else 0 for step, size in zip(steps, shape))


def _per_dim(stride: int, steps: tuple[int, ...]) -> tuple[int, int]:
    """A stride as (dimension, positions in it): comparable between tensors of different shapes."""
    dim = next((d for d, step in enumerate(steps) if stride >= step), len(steps) - 1)
    return dim, stride // steps[dim]


FORMAT = Format("tp", "hf", Rules(grid, even_stages, even=False), _recognise, _read, _write)
