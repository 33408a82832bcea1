"""safetensors files: the header read and checked, or laid out, without the library: only bytes' places matter here.

Stricter than the library in nothing, more talkative in everything. Source of the rules: safetensors' README and tensor.rs.
"""

import json
import os
import struct
from collections.abc import Sequence
from itertools import chain
from math import prod
from typing import Any

from reshard.dtypes import DTYPE_SIZE, FILE_ORDER
from reshard.errors import FormatError
from reshard.foreign import LIMIT, parse, quote
from reshard.stores import FileImage, TensorInfo
from reshard.stores.files import AnyPath, is_lfs_pointer, open_file, reading

_KEYS = {"dtype", "shape", "data_offsets"}
NOT_SAFETENSORS = "this is no safetensors file, or it is damaged; copy it again"


def read(path: AnyPath) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors and metadata of a file, from its header. Raises FormatError for anything the format forbids."""
    with reading(path):
        return _read(path)


def _read(path: AnyPath) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    with open_file(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        prefix = file.read(8)
        if is_lfs_pointer(prefix + file.read(min(size, 200))):
            raise FormatError(f"{path} is a Git LFS pointer of {size} bytes, not the file itself", "fetch it with `git lfs pull`")
        file.seek(8)
        if len(prefix) < 8:
            raise FormatError(f"{path} has {size} bytes, too few for a safetensors file", "the file is truncated; copy it again")
        (length,) = struct.unpack("<Q", prefix)
        if length > LIMIT:
            raise FormatError(f"{path}: header of {length} bytes is larger than the {LIMIT} allowed", NOT_SAFETENSORS)
        if 8 + length > size:
            raise FormatError(f"{path} has {size} bytes, its header alone needs {8 + length}", "the file is truncated; copy it again")
        raw = file.read(length)
    try:
        header = parse(raw)
    except ValueError as error:
        raise FormatError(f"{path}: header is not valid: {error}", NOT_SAFETENSORS) from None
    if not isinstance(header, dict):
        raise FormatError(f"{path}: header is a {type(header).__name__}, not an object", NOT_SAFETENSORS)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError(f"{path}: __metadata__ must hold text only", NOT_SAFETENSORS)
    base = 8 + length
    tensors, spans = _alike(header, base) or _each(path, header, base)
    at = 0
    for begin, end, name in spans:
        if begin != at:
            word = "overlaps the tensor before it" if begin < at else "leaves a hole before it"
            raise FormatError(f"{path}: {quote(name)} begins at byte {begin}, expected {at}: it {word}", NOT_SAFETENSORS)
        at = end
    if base + at != size:
        raise FormatError(
            f"{path} has {size} bytes, its header describes {base + at}", "the file is truncated or has been added to; copy it again"
        )
    return tensors, metadata


def _alike(header: dict[str, Any], base: int) -> tuple[dict[str, TensorInfo], list[tuple[int, int, str]]] | None:
    """The tensors of a sound header, all looked at together: most are of a few dtypes and shapes. None where something is amiss, for
    ``_each`` to tell."""
    entries = list(header.values())
    try:
        dtypes, offsets = [entry["dtype"] for entry in entries], [entry["data_offsets"] for entry in entries]
        shapes = [tuple(entry["shape"]) for entry in entries]
        kinds = set(zip(dtypes, shapes))
        ends = [(begin, end) for begin, end in offsets]
        numbers = {*map(type, chain.from_iterable(shapes)), *map(type, chain.from_iterable(ends))}
        sizes = {(dtype, shape): DTYPE_SIZE[dtype] * prod(shape) for dtype, shape in kinds}
        sound = numbers <= {int} and set(map(len, entries)) <= {3} and all(n >= 0 for _, shape in kinds for n in shape)
        sound = sound and all(DTYPE_SIZE[dtype] * prod([n or 1 for n in shape]) < 2**63 for dtype, shape in kinds)
        if not sound or [end - begin for begin, end in ends] != [sizes[kind] for kind in zip(dtypes, shapes)]:
            return None
    except (LookupError, TypeError, ValueError):
        return None
    tensors = dict(zip(header, map(TensorInfo, dtypes, shapes, [base + begin for begin, _ in ends])))
    return tensors, sorted([(begin, end, name) for (begin, end), name in zip(ends, header)])


def _each(path: AnyPath, header: dict[str, Any], base: int) -> tuple[dict[str, TensorInfo], list[tuple[int, int, str]]]:
    """The tensors of a header, one by one; raises FormatError at the first that is wrong."""
    tensors, spans = {}, []
    for name, entry in header.items():
        dtype, shape, begin, end = _entry(path, name, entry)
        tensors[name] = TensorInfo(dtype, shape, base + begin)
        spans.append((begin, end, name))
    return tensors, sorted(spans)


def _entry(path: AnyPath, name: str, entry: object) -> tuple[str, tuple[int, ...], int, int]:
    """Dtype, shape, first byte and the one past the last, each checked."""
    if not isinstance(entry, dict) or entry.keys() != _KEYS:
        raise FormatError(f"{_where(path, name)} must have dtype, shape and data_offsets and nothing else", NOT_SAFETENSORS)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_SIZE:
        raise FormatError(
            f"{_where(path, name)} has dtype {quote(repr(dtype))}, which reshard does not know", f"known: {', '.join(DTYPE_SIZE)}"
        )
    for label, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or not _are_sizes(numbers):
            raise FormatError(f"{_where(path, name)} has {label} {quote(numbers)}, expected a list of sizes", NOT_SAFETENSORS)
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FormatError(f"{_where(path, name)} has data_offsets {quote(offsets)}, expected [begin, end]", NOT_SAFETENSORS)
    begin, end = offsets
    need = DTYPE_SIZE[dtype]
    for n in shape:
        need *= n
        if need >= 2**63:
            raise FormatError(
                f"{_where(path, name)} has shape {quote(shape)}, which is 2**63 bytes or more; it spans {end - begin}", NOT_SAFETENSORS
            )
    if end - begin != need:
        raise FormatError(f"{_where(path, name)} spans {end - begin} bytes, {dtype} {quote(shape)} needs {need}", NOT_SAFETENSORS)
    return dtype, tuple(shape), begin, end


def _where(path: AnyPath, name: str) -> str:
    return f"{path}: {quote(name)}"


def _are_sizes(numbers: list[object]) -> bool:
    for n in numbers:
        if type(n) is not int or not 0 <= n < 2**63:
            return False
    return True


def compose(tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str] | None = None) -> FileImage:
    """A file of `tensors` (name, dtype, shape) as the safetensors library's save_file lays it out, to the byte."""
    ordered = sorted(tensors, key=lambda t: (-FILE_ORDER.index(t[1]), t[0]))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    at, offsets = 0, {}
    for name, dtype, shape in ordered:
        end = at + prod(shape) * DTYPE_SIZE[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        offsets[name] = at
        at = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    base = 8 + len(raw)
    infos = {name: TensorInfo(dtype, tuple(shape), base + offsets[name]) for name, dtype, shape in ordered}
    return FileImage(base + at, ((0, struct.pack("<Q", len(raw)) + raw),), infos)
