"""``megatron-dist``: Megatron-Core's ``torch_dist``, Megatron-LM's default: a DCP folder of whole tensors under Megatron's names.

No trace of a mesh: layers and experts have their numbers in the whole model, or lie one after another in one tensor (``decoder.layers.mlp…``
for all layers, ``experts.experts…`` for all experts). Beside tensors stand bytes: what modules of TransformerEngine keep of FP8
(``…._extra_state/shard_I_N``, asked for whether there is any or not) and what all ranks share: ``common.pt`` up to core 0.16,
``common_state/shard_0_1`` since. Megatron-FSDP's ``fsdp_dtensor`` is read too: a plain DCP folder below Megatron's tracker, each layer and
each expert by itself, gate and up apart, under ``model.module.``. Sources: megatron-core 0.19.2 and 0.16.1, ``dist_checkpointing``, ``TransformerBlock.sharded_state_dict``.
"""

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import product
from pathlib import Path

from reshard.errors import FormatError
from reshard.foreign import quote
from reshard.formats import Contents, Folder, Format, OutFile, States, Target, parts
from reshard.formats.dcp import MEGATRONS, METADATA, metadata_of, pieces_in
from reshard.formats.hf import torch_tree
from reshard.formats.manifest import read_manifest
from reshard.formats.megatron import TRACKER, disagreements, tracked
from reshard.formats.megatron_args import megatron_args
from reshard.formats.megatron_compare import fields
from reshard.formats.megatron_ranks import mp_ranks
from reshard.formats.megatron_shards import Box, Shards
from reshard.formats.pieces import Piece
from reshard.geometry.block import Stored
from reshard.geometry.regions import Chunk
from reshard.layout import Mesh, Rules
from reshard.layout.mesh import even_stages
from reshard.stores import dcp, torchzip
from reshard.stores.files import read_json, safe_join

CONFIG, COMMON = "metadata.json", "common.pt"
_RELEASE = "release"
#: an optimizer's state of a parameter, of one that is chained too: its word comes before the parameter's name
_STATE = re.compile(r"(?:chained_[0-9]+\.)?optimizer\.(?:[0-9]+\.)?state\.(\w+)\.(.+)")
#: what core 0.16 wants to be told; 0.19 asks for the first two
_CONFIG = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}
#: parameters by which a module is known, and modules that are none of TransformerEngine's
_WEIGHTS = frozenset(("weight", "layer_norm_weight"))
_WITHOUT_STATE = frozenset(("word_embeddings", "position_embeddings", "output_layer", "router", "conv1d"))
#: what several optimizers of one model are told apart by, in folders before ``chained_optim_avoid_prefix``
_TRAINED = re.compile(r"^chained_(?=[0-9]+\.)")
_COPY = "copy the folder again, whole"


def _recognise(folder: Path, names: set[str]) -> bool:
    if names & {CONFIG, COMMON} and _chunks(names):
        return True
    return (root := tracked(folder)) is not None and root.is_dir() and _chunks({path.name for path in root.iterdir()})


def _chunks(names: set[str]) -> bool:
    return any(name == METADATA or name.endswith(".distcp") for name in names)


def _root(folder: Path) -> Path:
    """The folder that holds the files: `folder`, or the one that its tracker names."""
    root = folder if _chunks({path.name for path in folder.iterdir()}) else tracked(folder)
    if root is None or not root.is_dir():
        raise FormatError(f"{root or folder} holds no Megatron torch_dist checkpoint", f"one has {CONFIG}, {METADATA} and .distcp files")
    return root


def _read(folder: Path) -> Contents:
    root = _root(folder)
    inside = "" if root == folder else f"{root.name}/"
    held = metadata_of(root)
    pieces = pieces_in(root, inside, {_TRAINED.sub("optimizer.", name): stored for name, stored in held.tensors.items()})
    manifest = read_manifest(folder)
    file, common = _common(root, held)
    if (root / CONFIG).is_file():
        told = read_json(root / CONFIG)
        backend = told.get("sharded_backend") if isinstance(told, Mapping) else None
        if backend != "torch_dist":
            raise FormatError(f"{root / CONFIG}: sharded_backend is {quote(repr(backend))}, expected torch_dist",
                              "load and save it once with a Megatron-LM that knows it (--ckpt-format torch_dist)")  # fmt: skip
    elif common:
        raise FormatError(f"{root} holds no {CONFIG}, which is written last: the save was not finished, or not copied whole",
                          "copy the folder again, or take the checkpoint before it")  # fmt: skip
    writer = "reshard" if manifest else "Megatron-Core" if common else "Megatron-FSDP"
    settings = {inside + file: fields(common.get("args"))}
    layout = manifest and manifest.get("layout")
    states = partial(_optimizer, pieces, inside + file)
    return Contents(Mesh(), pieces, layout, settings=settings, nested=True, writer=writer, states=states)


def _optimizer(pieces: list[Piece], common: str) -> States:
    """The optimizer's tensors, which have their parameters' shapes and dtypes of their own, under torch's names for such."""
    found = [piece._replace(name=f"optim.state.{match[2]}.{match[1]}") for piece in pieces if (match := _STATE.fullmatch(piece.name))]
    paths = {}
    for piece in found:
        name, _, word = piece.name.removeprefix("optim.state.").rpartition(".")
        paths[piece.name] = ("optim", "state", name, word)
    return States(found, {}, paths, "model.", f"what {common} says of the optimizer (step counts, settings of its groups)")


def _common(root: Path, held: dcp.Metadata) -> tuple[str, Mapping]:
    """What all ranks share, and the file that holds it; empty where nothing does."""
    item = held.others.get(MEGATRONS)
    if (root / COMMON).is_file():
        file, common = COMMON, torch_tree(root / COMMON)
    elif item is not None:
        path = safe_join(root, item.file)
        if not path.is_file():
            raise FormatError(f"{root}: {METADATA} names {item.file}, which is missing", _COPY)
        file, common = item.file, torchzip.read(path, item.start, item.length)
        common = common[0] if isinstance(common, list) and common else common
    else:
        return CONFIG, {}
    if not isinstance(common, Mapping):
        raise FormatError(f"{root / file} holds no settings but a {type(common).__name__}", _COPY)
    return file, common


def _write(target: Target, stored: list[Stored]) -> Folder:
    """Each rank's file holds what that rank of Megatron-Core would save, in boxes that ranks of the same mesh read whole."""
    shards, mine = Shards(target), {rank.number for rank in target.ranks}
    metadata = dcp.Metadata({s.name: dcp.Stored(s.dtype, s.shape, []) for s in stored})
    held: dict[int, list[tuple[Stored, Box]]] = defaultdict(list)
    for s in stored:
        for box in shards.boxes(s):
            held[box.rank].append((s, box))
    files, pieces = [], []
    for number, own in sorted(held.items()):
        sizes = [(i, dcp.nbytes(s.dtype, box.size)) for i, (s, box) in enumerate(own)]
        for n, chosen in enumerate(parts(sizes, target.max_file)):
            path = f"__{number}_{n}.distcp"
            image, places = dcp.compose_items([(own[i][0].dtype, own[i][1].size) for i in chosen])
            for i, (start, length, offset) in zip(chosen, places):
                s, box = own[i]
                metadata.tensors[s.name].items.append(dcp.Item(path, start, length, box.offsets, box.size))
                if number in mine:
                    pieces.append(
                        Piece(f"{_RELEASE}/{path}", offset, s.dtype, box.size, s.name, 0, Chunk(box.offsets), None, number, s.shape)
                    )
            if number in mine:
                files.append(OutFile(f"{_RELEASE}/{path}", image, number))
    args = megatron_args(target, stored) | {"ckpt_format": "torch_dist"}
    layers = any("layer" in s.entry.numbered for s in stored)
    content = {"singleton_local_shards": False, "non_homogeneous_layers": layers, "chained_optim_avoid_prefix": True}
    common = {"args": argparse.Namespace(**args), "checkpoint_version": 3.0, "iteration": 0, "content_metadata": content,
              "num_floating_point_operations_so_far": 0}  # fmt: skip
    bytes_, starts = dcp.one_after_another(
        images := [torchzip.compose([common]), *[torchzip.compose([None])] * len(states := _states(shards, stored))]
    )
    path = "__0_states.distcp"
    for name, start, image in zip([MEGATRONS, *states], starts, images):
        metadata.others[name] = dcp.Item(path, start, image.size, (), ())
    small = {
        TRACKER: b"release",
        f"{_RELEASE}/{path}": bytes_.content,
        f"{_RELEASE}/{COMMON}": torchzip.compose(common).content,
        f"{_RELEASE}/{METADATA}": dcp.compose_metadata(metadata),
        f"{_RELEASE}/{CONFIG}": json.dumps(_CONFIG).encode(),
    }
    return Folder(files, pieces, small)


def _states(shards: Shards, stored: Iterable[Stored]) -> list[str]:
    """The keys of what modules of TransformerEngine keep of FP8: one of each layer and expert. Nothing is in them."""
    out: dict[str, None] = {}
    for s in stored:
        module, _, last = s.name.rpartition(".")
        if last not in _WEIGHTS or module.rpartition(".")[2] in _WITHOUT_STATE:
            continue
        shape = s.shape[: len(shards.stacked(s))] or (1,)
        modules = [module, module.removesuffix("linear_proj") + "core_attention"] if module.endswith(".linear_proj") else [module]
        for each in modules:
            for lead in product(*map(range, shape)):
                out[f"{each}._extra_state/shard_{'.'.join(map(str, lead))}_{'.'.join(map(str, shape))}"] = None
    return list(out)


FORMAT = Format(
    "megatron-dist",
    "megatron",
    Rules(mp_ranks, even_stages),
    _recognise,
    _read,
    _write,
    disagreements=disagreements,
    whole=True,
    forms=("dist",),
    stacks=True,
    small=(TRACKER, COMMON, METADATA, CONFIG, "*.distcp"),
    usage="--load {folder} --ckpt-format torch_dist --use-checkpoint-args --tensor-model-parallel-size N --pipeline-model-parallel-size M",
)
