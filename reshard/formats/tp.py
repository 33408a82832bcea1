"""``tp``, reshard's own: one safetensors file set per rank, Hugging Face names, self-describing.

Files are named and annotated as torch's HuggingFaceStorageWriter and transformers 5 do (``shard-0000R-model-…``,
``DCP_SHARDING_INFO`` with the offsets of each piece), so that ``from_pretrained`` and DCP open them where every piece is
one box of the whole tensor. Where it is not (a fused tensor whose parts are each cut), no offset can say so: such
tensors are listed under ``reshard`` in the metadata, with the mesh, and other readers refuse them. ``from_pretrained``
asks for the names that a model has in memory, tied head included: it opens models where those are the Hub's. Sources: torch 2.13 ``hf_storage.py``, transformers 5.23.
"""

import json
from collections.abc import Callable

from reshard.dtypes import DTYPE_SIZE
from reshard.errors import FormatError
from reshard.foreign import parse
from reshard.formats import Contents, Folder, Format, OutFile, Target, parts
from reshard.formats.manifest import mesh_of, read_manifest
from reshard.formats.pieces import Piece, pieces_of
from reshard.formats.shards import NOTE, metadata_of, name_of, noted, read_shards
from reshard.geometry.block import Stored, row_major
from reshard.layout import Mesh, Rules
from reshard.layout.mesh import even_stages, grid
from reshard.stores import safetensors
from reshard.stores.files import AnyPath


def _recognise(folder: AnyPath, names: set[str]) -> bool:
    return bool(noted(folder, names))


def _read(folder: AnyPath) -> Contents:
    pieces: list[Piece] = []
    notes, ranks = set(), set()
    for shard in read_shards(folder):
        notes.add(_mesh_note(folder / shard.file, shard.metadata.get(NOTE)))
        ranks.add(shard.rank)
        pieces += pieces_of(shard.file, shard.tensors, shard.rank)
    return _ours(folder, pieces, len(ranks), notes)


def _mesh_note(path: AnyPath, note: str | None) -> tuple[str, Mesh] | None:
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


def _ours(folder: AnyPath, pieces: list[Piece], ranks: int, notes: set) -> Contents:
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
            metadata = metadata_of({name: at for name, at in offsets.items() if at is not None}, **{NOTE: json.dumps(note)})
            image = safetensors.compose([(s.name, s.dtype, s.shape) for s in tensors.values()], metadata)
            path = name_of(rank.number, i, len(names))
            files.append(OutFile(path, image, rank.number))
            pieces += pieces_of(path, image.tensors, rank.number)
    return Folder(files, pieces, {})


def _offsets(target: Target) -> Callable[[Stored], tuple[int, ...] | None]:
    """``whole_offsets`` for the tensors of `target`, worked out once for all layers and experts, whose blocks they share."""
    single = target.placement.trial(mesh=Mesh())
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


FORMAT = Format(
    "tp",
    "hf",
    Rules(grid, even_stages, even=False),
    _recognise,
    _read,
    _write,
    holds=("model", "adapter"),
    usage='import reshard\n\nstate = reshard.load("hf://{id}", format="tp", tp={tp}, rank=0)',
)
