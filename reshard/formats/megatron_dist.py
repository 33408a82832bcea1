"""``megatron-dist``: Megatron-Core's ``torch_dist``, Megatron-LM's default: a DCP folder of whole tensors under Megatron's names.

No trace of a mesh: layers and experts have their numbers in the whole model, or lie one after another in one tensor (``decoder.layers.mlp…``
for all layers, ``experts.experts…`` for all experts). Beside tensors stand bytes: what modules of TransformerEngine keep of FP8
(``…._extra_state/shard_I_N``, asked for whether there is any or not) and what all ranks share: ``common.pt`` up to core 0.16,
``common_state/shard_0_1`` since. Sources: megatron-core 0.19.2 and 0.16.1, ``dist_checkpointing``, ``TransformerBlock.sharded_state_dict``.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from reshard.errors import FormatError
from reshard.foreign import quote
from reshard.formats import Contents, Format
from reshard.formats.dcp import METADATA, metadata_of, pieces_in
from reshard.formats.hf import torch_tree
from reshard.formats.manifest import read_manifest
from reshard.formats.megatron import disagreements, tracked
from reshard.formats.megatron_compare import fields
from reshard.formats.megatron_ranks import mp_ranks
from reshard.layout import Mesh, Rules
from reshard.layout.mesh import even_stages
from reshard.stores import dcp, torchzip
from reshard.stores.files import read_json, safe_join

CONFIG, COMMON = "metadata.json", "common.pt"
_SHARED = "common_state/shard_0_1"
_COPY = "copy the folder again, whole"


def _recognise(folder: Path, names: set[str]) -> bool:
    return _here(names) or (root := tracked(folder)) is not None and root.is_dir() and _here({path.name for path in root.iterdir()})


def _here(names: set[str]) -> bool:
    return bool(names & {CONFIG, COMMON}) and any(name == METADATA or name.endswith(".distcp") for name in names)


def _root(folder: Path) -> Path:
    """The folder that holds the files: `folder`, or the one that its tracker names."""
    root = folder if _here({path.name for path in folder.iterdir()}) else tracked(folder)
    if root is None or not root.is_dir():
        raise FormatError(f"{root or folder} holds no Megatron torch_dist checkpoint", f"one has {CONFIG}, {METADATA} and .distcp files")
    return root


def _read(folder: Path) -> Contents:
    root = _root(folder)
    if not (root / CONFIG).is_file():
        raise FormatError(f"{root} holds no {CONFIG}, which is written last: the save was not finished, or not copied whole",
                          "copy the folder again, or take the checkpoint before it")  # fmt: skip
    told = read_json(root / CONFIG)
    backend = told.get("sharded_backend") if isinstance(told, Mapping) else None
    if backend != "torch_dist":
        raise FormatError(f"{root / CONFIG}: sharded_backend is {quote(repr(backend))}, expected torch_dist",
                          "load and save it once with a Megatron-LM that knows it (--ckpt-format torch_dist)")  # fmt: skip
    held = metadata_of(root)
    inside = "" if root == folder else f"{root.name}/"
    manifest = read_manifest(folder)
    file, common = _common(root, held)
    settings = {inside + file: fields(common.get("args"))}
    writer = "reshard" if manifest else "Megatron-Core"
    layout = manifest and manifest.get("layout")
    return Contents(Mesh(), pieces_in(root, inside, held.tensors), layout, settings=settings, nested=True, writer=writer)


def _common(root: Path, held: dcp.Metadata) -> tuple[str, Mapping]:
    """What all ranks share, and the file that holds it; empty where nothing does."""
    item = held.others.get(_SHARED)
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


FORMAT = Format(
    "megatron-dist",
    "megatron",
    Rules(mp_ranks, even_stages),
    _recognise,
    _read,
    None,
    disagreements=disagreements,
    whole=True,
    forms=("dist",),
    stacks=True,
)
