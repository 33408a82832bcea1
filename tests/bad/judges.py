"""What others read in a file: the safetensors library, torch, Python's zipfile."""

import argparse
import struct
import zipfile
from pathlib import Path

import numpy as np
import torch

from reshard.dtypes import DTYPE_SIZE
from reshard.stores import TensorInfo
from reshard.stores.torch_names import DTYPE_NAME, row_major_strides


def raw_bytes(path: Path, info: TensorInfo) -> bytes:
    """The bytes of a tensor where `info` says that it lies, in row-major order; by numpy alone."""
    if 0 in info.shape:
        return b""
    size = DTYPE_SIZE[info.dtype]
    strides = info.strides or row_major_strides(info.shape)
    count = sum((n - 1) * s for n, s in zip(info.shape, strides)) + 1
    raw = np.fromfile(path, np.uint8, count * size, offset=info.offset).view(f"V{size}")
    return np.lib.stride_tricks.as_strided(raw, info.shape, [s * size for s in strides]).tobytes()


def as_library(path: Path, found: dict[str, TensorInfo]) -> str | None:
    """What the safetensors library reads otherwise."""
    from safetensors import SafetensorError, deserialize

    try:
        theirs = {name: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for name, t in deserialize(path.read_bytes())}
    except (SafetensorError, ValueError):
        return None
    ours = {name: (info.dtype, info.shape, raw_bytes(path, info)) for name, info in found.items()}
    return None if ours == theirs else f"the library reads {sorted(theirs)[:3]}, reshard {sorted(ours)[:3]}"


def tensors_in(tree: object, at: str = "", seen: set[int] | None = None) -> dict[str, object]:
    """Every tensor in a tree of dicts, lists and namespaces, by its path; what is held twice is looked at once."""
    if isinstance(tree, (TensorInfo, torch.Tensor)):
        return {at: tree}
    if isinstance(tree, argparse.Namespace):
        tree = vars(tree)
    seen = set() if seen is None else seen
    if id(tree) in seen:
        return {}
    seen.add(id(tree))
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    return {path: leaf for key, value in items for path, leaf in tensors_in(value, f"{at}/{key}", seen).items()}


def as_torch(path: Path, tree: object) -> str | None:
    """What torch.load reads otherwise; a record that torch reads past the end of is judged by zipfile."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            theirs = tensors_in(torch.load(path, weights_only=True))
    except Exception:  # noqa: BLE001 - torch refuses in many ways; then it is no judge
        return None
    ours = tensors_in(tree)
    for name in ours.keys() & theirs.keys():
        mine, his = ours[name], theirs[name]
        plain = his.detach().contiguous().reshape(-1)
        same = DTYPE_NAME[mine.dtype] == str(his.dtype).removeprefix("torch.") and mine.shape == tuple(his.shape)
        if not same or (plain.numel() and raw_bytes(path, mine) != plain.view(torch.uint8).numpy().tobytes()):
            return None if same and _by_zipfile(path, mine) else f"{name}: torch reads {his.dtype} {tuple(his.shape)}, reshard {mine}"
    return None


def _by_zipfile(path: Path, info: TensorInfo) -> bool:
    """Whether `info` lies in a record of the zip, as Python's zipfile finds it: torch may return memory it never filled."""
    try:
        with zipfile.ZipFile(path) as file, open(path, "rb") as raw:
            for item in file.infolist():
                raw.seek(item.header_offset)
                header = struct.unpack("<4s5H3L2H", raw.read(30))
                begin = item.header_offset + 30 + header[-2] + header[-1]
                if begin <= info.offset < begin + item.file_size:
                    return True
    except (zipfile.BadZipFile, struct.error, OSError, ValueError):
        pass
    return False
