"""``rank-pt``: plain ``rank_XX.pt`` per tensor-parallel rank, each a flat dict of HF names to that rank's tensors."""

import re

from reshard.errors import FormatError
from reshard.foreign import quote
from reshard.formats import Contents, Folder, Format, OutFile, Target
from reshard.formats.hf import state_dict
from reshard.formats.manifest import mesh_of, read_manifest
from reshard.formats.pieces import pieces_of
from reshard.geometry.block import Stored
from reshard.layout import Mesh, Rules
from reshard.layout.mesh import even_stages, grid
from reshard.stores.files import AnyPath

_FILE = re.compile(r"rank_([0-9]{1,5})\.pt")


def _recognise(folder: AnyPath, names: set[str]) -> bool:
    return any(_FILE.fullmatch(name) for name in names)


def _read(folder: AnyPath) -> Contents:
    found = sorted((int(match[1]), path.name) for path in folder.iterdir() if (match := _FILE.fullmatch(path.name)))
    if not found:
        raise FormatError(f"{folder} holds no rank_XX.pt")
    manifest = read_manifest(folder)
    told = mesh_of(manifest) if manifest else None
    count = told.tp * told.pp if told else found[-1][0] + 1
    if len(found) != count or any(rank != i for i, (rank, _) in enumerate(found)):
        ranks = quote(", ".join(str(rank) for rank, _ in found))
        raise FormatError(
            f"{folder} holds {len(found)} rank_XX.pt, of ranks {ranks}; expected {count}, of ranks 0 to {count - 1}",
            "copy the folder again, whole",
        )
    mesh = told or Mesh(count)
    return Contents(mesh, [piece for rank, name in found for piece in pieces_of(name, state_dict(folder / name), rank)])


def _write(target: Target, stored: list[Stored]) -> Folder:
    from reshard.stores import torchzip

    files, pieces = [], []
    for rank, own in target.by_rank(stored):
        image = torchzip.compose({s.name: torchzip.TensorSpec(s.name, s.dtype, s.shape) for s in own.values()})
        files.append(OutFile(f"rank_{rank.number:02d}.pt", image, rank.number))
        pieces += pieces_of(files[-1].path, image.tensors, rank.number)
    return Folder(files, pieces, {})


FORMAT = Format(
    "rank-pt",
    "hf",
    Rules(grid, even_stages, even=False),
    _recognise,
    _read,
    _write,
    usage='import torch\n\nstate = torch.load("{folder}/rank_00.pt", weights_only=True, mmap=True)',
)
