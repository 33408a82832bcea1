"""``fsdp``: one pickle of DTensors (FSDP1: ShardedTensors, or flat parts) per rank, as verl writes its actors and Accelerate its models without DCP. Read, not written.

``model_world_size_W_rank_R.pt`` (verl, config.json in ``huggingface/``) or ``pytorch_model_fsdp_0_rankR.bin``. A DTensor tells its whole
size, its rank's place in the device mesh and how that cuts it, a ShardedTensor its boxes. A plain tensor is whole on every rank; but where
no rank has one of the others, each has a flat part, the lower rank the earlier one (FSDP1's local state with original parameters). Sources: verl 0.9
``fsdp_checkpoint_manager.py``, accelerate 1.15 ``fsdp_utils.py``, torch 2.13 ``DTensor``.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from itertools import product
from math import prod
from pathlib import Path

from reshard.dtypes import DTYPE_SIZE
from reshard.errors import FormatError
from reshard.foreign import quote
from reshard.formats import Contents, Format
from reshard.formats.hf import torch_tree
from reshard.formats.pieces import Piece
from reshard.geometry.block import row_major
from reshard.geometry.regions import Chunk, FlatRange, intervals
from reshard.layout import Mesh, Rules
from reshard.layout.mesh import even_stages, grid
from reshard.stores import TensorInfo
from reshard.stores.torch_names import Sharded, Shards
from reshard.text import some

_VERL = re.compile(r"model_world_size_([0-9]{1,6})_rank_([0-9]{1,6})\.pt")
_ACCELERATE = re.compile(r"pytorch_model_fsdp_0_rank([0-9]{1,6})\.bin")
#: what FSDP1 calls all parameters of a module in one
_FLAT = ("_flat_param", "flat_param")
_COPY = "copy the folder again, whole"


def _recognise(folder: Path, names: set[str]) -> bool:
    return any(_VERL.fullmatch(name) or _ACCELERATE.fullmatch(name) for name in names)


def _read(folder: Path) -> Contents:
    names = [path.name for path in folder.iterdir()]
    verl = {int(match[2]): (name, int(match[1])) for name in names if (match := _VERL.fullmatch(name))}
    files = {rank: name for rank, (name, _) in verl.items()} or {
        int(match[1]): name for name in names if (match := _ACCELERATE.fullmatch(name))
    }
    if not files:
        raise FormatError(f"{folder} holds no model_world_size_…_rank_….pt and no pytorch_model_fsdp_0_rank….bin")
    sizes = sorted({size for _, size in verl.values()})
    if len(sizes) > 1 or len(verl) < sum(1 for name in names if _VERL.fullmatch(name)):
        raise FormatError(f"{folder} holds files of world sizes {', '.join(map(str, sizes))}", "files of several checkpoints were mixed")
    world = sizes[0] if sizes else max(files) + 1
    missing = [str(rank) for rank in range(world) if rank not in files]
    if missing or len(files) > world:
        raise FormatError(f"{folder} holds {len(files)} of the files of {world} ranks; missing: rank {some(missing)}", _COPY)
    trees = {}
    for rank, name in sorted(files.items()):
        tree = trees[rank] = torch_tree(folder / name)
        if not isinstance(tree, dict):
            raise FormatError(f"{folder / name} holds no state dict but a {type(tree).__name__}")
        odd = next(
            (key for key, value in tree.items() if isinstance(value, (dict, list, tuple)) and not isinstance(value, TensorInfo)), None
        )
        if odd is not None:
            raise FormatError(f"{folder / name} holds a {type(tree[odd]).__name__} under {quote(repr(odd))}, expected tensors by name")
        flat = [key for key in tree if isinstance(key, str) and key.rpartition(".")[2] in _FLAT]
        if len(flat) == len(tree):
            raise FormatError(f"{folder / name} holds {quote(flat[0])}, all parameters of a module one after another, and not in which order",
                              "load it as it was saved, and save it with StateDictType.SHARDED_STATE_DICT")  # fmt: skip
        for key in flat:  # the same elements once more, beside each parameter's own
            del tree[key]
    pieces: list[Piece] = []
    flat_parts = world > 1 and not any(isinstance(value, (Sharded, Shards)) for tree in trees.values() for value in tree.values())
    begins: dict[str, int] = defaultdict(int)
    for rank, tree in trees.items():
        for key, value in tree.items():
            if not isinstance(key, str):
                continue
            if isinstance(value, Shards):
                boxes = [(at, Chunk(offsets), value.size) for at, offsets in value.local]
            elif isinstance(value, Sharded):
                pieces += _pieces(folder / files[rank], key, value, rank, world)
                continue
            elif isinstance(value, TensorInfo):
                boxes = [(value, FlatRange(begins[key]) if flat_parts and len(value.shape) == 1 else None, None)]
                begins[key] += prod(value.shape)
            else:
                continue
            pieces += [
                Piece(files[rank], at.offset, at.dtype, at.shape, key, 0, region, at.strides, rank, size) for at, region, size in boxes
            ]
    return Contents(Mesh(), pieces, nested=True, writer="verl" if verl else "Accelerate (HF Trainer, Axolotl)")


def _pieces(path: Path, name: str, tensor: Sharded, rank: int, world: int) -> Iterator[Piece]:
    """A piece for each box of the whole tensor that this rank has: one, but for strided shards of packed tensors."""
    if world % prod(tensor.mesh):
        raise FormatError(
            f"{path}: {quote(name)} lies on a mesh of {prod(tensor.mesh)} ranks, the folder is of {world}",
            "files of several checkpoints were mixed",
        )
    held = []
    for dim, size in enumerate(tensor.size):
        cuts = [(n, i, factor) for n, i, (on, factor) in zip(tensor.mesh, tensor.coordinate, tensor.cuts) if on == dim]
        held.append(intervals(size, cuts))
    local = tensor.local
    expected = tuple(sum(high - low for low, high in ranges) for ranges in held)
    if local.shape != expected:
        raise FormatError(f"{path}: rank {rank} has {list(local.shape)} of {quote(name)}, by its placements {list(expected)}", _COPY)
    strides = local.strides or row_major(local.shape)
    begins = [[sum(high - low for low, high in ranges[:i]) for i in range(len(ranges))] for ranges in held]
    for box, at in zip(product(*held), product(*begins)):
        offset = local.offset + sum(i * stride for i, stride in zip(at, strides)) * DTYPE_SIZE[local.dtype]
        shape = tuple(high - low for low, high in box)
        yield Piece(path.name, offset, local.dtype, shape, name, 0, Chunk(tuple(low for low, _ in box)),
                    strides if strides != row_major(shape) else None, rank, tensor.size)  # fmt: skip


FORMAT = Format("fsdp", "hf", Rules(grid, even_stages, even=False), _recognise, _read, None)
