"""Shard files as torch's HuggingFaceStorageWriter names and annotates them: safetensors per rank, with the place of each piece.

``shard-0000R-model-0000I-of-0000N.safetensors``, ranks from 1; the metadata's ``DCP_SHARDING_INFO`` says where each piece begins in
its tensor. How large a tensor is, nothing says. Source: torch 2.13 ``hf_storage.py``.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from reshard.errors import FormatError
from reshard.foreign import parse
from reshard.stores import TensorInfo, safetensors

FILE = re.compile(r"shard-([0-9]{5})-model-([0-9]{5})-of-([0-9]{5})\.safetensors")
NOTE = "reshard"  # the key under which our own files say of which mesh they are


class Shard(NamedTuple):
    """A file of `rank`: its tensors, its metadata, and where in their tensors the pieces begin, as far as it says so."""

    rank: int
    file: str
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    offsets: Mapping[str, tuple[int, ...]]


def name_of(rank: int, part: int, count: int) -> str:
    """Part `part` (from 1) of `count` of a rank's (from 0) files."""
    return f"shard-{rank + 1:05d}-model-{part:05d}-of-{count:05d}.safetensors"


def metadata_of(offsets: Mapping[str, tuple[int, ...]], **more: str) -> dict[str, str]:
    boxes = {name: {"saved_offsets": list(begin)} for name, begin in offsets.items()}
    return {"DCP_SHARDING_INFO": json.dumps(boxes), "DCP_VERSION": "1.0", "format": "pt", **more}


def noted(folder: Path, names: set[str]) -> bool | None:
    """Whether the shards among a folder's `names` carry our own note; None where there are none."""
    first = min((name for name in names if FILE.fullmatch(name)), default=None)
    return None if first is None else NOTE in safetensors.read(folder / first)[1]


def read_shards(folder: Path) -> Iterator[Shard]:
    """Every shard of a folder, in order of ranks. Raises FormatError where files are missing."""
    found: dict[int, dict[int, str]] = defaultdict(dict)
    counts: dict[int, set[int]] = defaultdict(set)
    for path in sorted(folder.iterdir()):
        if match := FILE.fullmatch(path.name):
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
    for rank in sorted(found):
        for file in found[rank].values():
            tensors, metadata = safetensors.read(folder / file)
            try:
                info = parse(metadata.get("DCP_SHARDING_INFO", "{}").encode())
                offsets = {name: _offset(value["saved_offsets"]) for name, value in info.items()}
            except (ValueError, KeyError, TypeError, AttributeError):
                raise FormatError(f"{folder / file}: DCP_SHARDING_INFO is not the JSON that torch writes") from None
            yield Shard(rank, file, tensors, metadata, offsets)


def _offset(numbers: object) -> tuple[int, ...]:
    """Raises ValueError for what is no list of sizes."""
    if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers):
        raise ValueError
    return tuple(numbers)
