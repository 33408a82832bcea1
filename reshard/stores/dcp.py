"""torch.distributed.checkpoint's own files: the ``.metadata`` of a folder, and the items of its ``.distcp`` files, without torch.

``.metadata`` is a bare pickle: per name the tensor's dtype, size and chunks (boxes at offsets), and per chunk the file and the
bytes of it that hold it, an *item*. An item is a whole ``torch.save`` zip of one tensor, so that its elements are found by offset.
Sources: torch 2.13 ``metadata.py``, ``filesystem.py``, ``planner.py``.
"""

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, NoReturn

from reshard.dtypes import DTYPE_SIZE
from reshard.errors import FormatError
from reshard.foreign import quote
from reshard.stores import FileImage, TensorInfo, safetensors, torchzip
from reshard.stores.files import reading
from reshard.stores.torch_names import DTYPE_NAME, DTYPE_OF_NAME, DType, Made, Opaque, TensorSpec
from reshard.stores.torch_pickle import Pickler
from reshard.stores.torch_unpickle import PICKLE_LIMIT, Unpickler

_HERE = "torch.distributed.checkpoint"
_DAMAGED = "the file is damaged, or of another kind; copy the folder again, whole"
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Item:
    """Bytes `start` to `start + length` of `file`, a path within the folder: the chunk of a tensor that begins at `offsets` and has `size`."""

    file: str
    start: int
    length: int
    offsets: Shape
    size: Shape


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of a DCP folder: `dtype` is safetensors' word."""

    dtype: str
    size: Shape
    items: list[Item]


@dataclass(frozen=True)
class Metadata:
    """What `.metadata` says: tensors by name; by name what is no tensor (numbers, states of schedulers), with its bytes; and `paths`, the keys
    of the saved state by which a name is reached."""

    tensors: dict[str, Stored]
    others: dict[str, Item] = field(default_factory=dict)
    paths: dict[str, tuple[str | int, ...]] = field(default_factory=dict)


class _Bare:
    """A pickle that is a file of its own, as ``Unpickler`` asks an archive: it has no storages."""

    def __init__(self, path: Path, raw: bytes):
        self.path, self.raw, self.start, self.end = path, raw, 0, len(raw)

    def content(self, key: str, limit: int) -> bytes:
        return self.raw

    def locate(self, key: str) -> NoReturn:
        raise self.error(f"refers to a storage {quote(key)}, of which it has none")

    def error(self, message: str, hint: str | None = _DAMAGED) -> FormatError:
        return FormatError(f"{self.path}: {message}", hint)


def read_metadata(path: Path) -> Metadata:
    """Raises FormatError for what is no metadata of DCP's, or names bytes in a way that this does not read."""
    with reading(path):
        if path.stat().st_size > PICKLE_LIMIT:
            raise FormatError(f"{path} has {path.stat().st_size} bytes, more than the {PICKLE_LIMIT} allowed")
        archive = _Bare(path, path.read_bytes())
    tree = Unpickler(archive).run()
    try:
        state = _state(tree, "Metadata")
        places = _places(state.get("storage_data"))
        return _tensors(state["state_dict_metadata"], places, state.get("planner_data"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise archive.error(f"it is no metadata of {_HERE}'s ({type(error).__name__}: {quote(error)})") from None


def _state(value: object, kind: str) -> dict[str, Any]:
    """The fields of an instance of DCP's class `kind`. Raises TypeError for anything else."""
    if not isinstance(value, Opaque) or value.name != kind or not value.module.startswith(_HERE) or not isinstance(value.state, dict):
        raise TypeError(f"{value.name if isinstance(value, Opaque) else type(value).__name__} where a {kind} is due")
    return value.state


def _places(table: Any) -> dict[tuple[str, Shape | None], tuple[str, int, int]]:
    """(name, offsets) → (file, first byte, bytes)."""
    out = {}
    for index, info in table.items():
        at, held = _state(index, "MetadataIndex"), _state(info, "_StorageInfo")
        offset, length = held["offset"], held["length"]
        if held.get("transform_descriptors"):
            raise ValueError(
                f"{at['fqn']} is compressed ({', '.join(map(str, held['transform_descriptors']))}), which cannot be read by offset"
            )
        if not isinstance(held["relative_path"], str) or not all(type(n) is int and 0 <= n < 1 << 63 for n in (offset, length)):
            raise ValueError(f"{at['fqn']} is said to lie at {offset}, {length} bytes, of {held['relative_path']}")
        out[at["fqn"], None if at.get("offset") is None else _sizes(at["offset"])] = held["relative_path"], offset, length
    return out


def _tensors(table: Mapping[str, object], places: Mapping[tuple[str, Shape | None], tuple[str, int, int]], keys: object) -> Metadata:
    tensors, others = {}, {}
    for name, value in table.items():
        if not isinstance(name, str):
            raise TypeError("a name is no text")
        if isinstance(value, Opaque) and value.name == "BytesStorageMetadata":
            if (name, None) in places:
                others[name] = Item(*places[name, None], (), ())
            continue
        state = _state(value, "TensorStorageMetadata")
        properties, size = state["properties"], _sizes(state["size"])
        told: Any = properties.state if isinstance(properties, Opaque) else None
        dtype = told[0] if isinstance(told, tuple) and told else told["dtype"]
        if not isinstance(dtype, DType) or dtype.name not in DTYPE_OF_NAME:
            raise ValueError(f"{name} is of dtype {dtype.name if isinstance(dtype, DType) else dtype}, which reshard does not know")
        items = []
        for chunk in state["chunks"]:
            at = _state(chunk, "ChunkStorageMetadata")
            offsets, sizes = _sizes(at["offsets"]), _sizes(at["sizes"])
            found = places.get((name, offsets))
            if found is None:
                raise ValueError(f"no file is named for {name} at {list(offsets)}")
            items.append(Item(*found, offsets, sizes))
        tensors[name] = Stored(DTYPE_OF_NAME[dtype.name], size, items)
    paths = {name: path for name, path in keys.items() if _is_path(path)} if isinstance(keys, dict) else {}
    return Metadata(tensors, others, paths)


def _is_path(value: object) -> bool:
    return isinstance(value, tuple) and all(type(key) in (str, int) for key in value)


def _sizes(value: object) -> Shape:
    if not isinstance(value, tuple) or not all(type(n) is int and 0 <= n < 1 << 63 for n in value):
        raise ValueError(f"{value} where sizes are due")
    return value


def locate(path: Path, items: Iterable[tuple[str, Item]]) -> list[TensorInfo]:
    """Where in the file `path` the elements of each (name, item) lie. Raises FormatError for an item that is not what it is said to be."""
    items = list(items)
    with reading(path), path.open("rb", buffering=0) as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        head = file.read(9)
    inside = None if head[:2] == b"PK" or head[8:9] != b"{" else safetensors.read(path)[0]  # SerializationFormat.SAFETENSORS
    out: list[TensorInfo] = []
    found: object
    for name, item in items:
        if inside is not None:
            found = inside.get(name)
        else:
            if item.start + item.length > size:
                raise FormatError(f"{path} has {size} bytes, {quote(name)} is said to lie at {item.start} to {item.start + item.length}",
                                  "the file is truncated, or of another checkpoint; copy the folder again, whole")  # fmt: skip
            try:
                found = torchzip.read(path, item.start, item.length)
            except FormatError as error:
                text = str(error).removeprefix(f"{path}: ")
                raise FormatError(
                    f"{path}: no item of {quote(name)} lies at bytes {item.start} to {item.start + item.length}: {text}", _DAMAGED
                ) from None
        if not isinstance(found, TensorInfo):
            raise FormatError(f"{path} holds no tensor for {quote(name)} at byte {item.start} but a {type(found).__name__}", _DAMAGED)
        if found.shape != item.size:
            raise FormatError(f"{path}: {quote(name)} at {list(item.offsets)} has shape {list(found.shape)}, .metadata says {list(item.size)}",
                              "files of several checkpoints were mixed; copy the folder again, whole")  # fmt: skip
        out.append(found)
    return out


def compose_items(specs: Iterable[tuple[str, Shape]]) -> tuple[FileImage, list[tuple[int, int, int]]]:
    """A ``.distcp`` file that holds a tensor of each (dtype, shape); per item its first byte, its bytes, and where its elements begin."""
    made: dict[tuple[str, Shape], FileImage] = {}
    images = []
    for spec in specs:
        if spec not in made:
            made[spec] = torchzip.compose(TensorSpec("", *spec))
        images.append(made[spec])
    file, starts = one_after_another(images)
    return file, [(at, image.size, at + image.tensors[""].offset) for at, image in zip(starts, images)]


def one_after_another(images: Iterable[FileImage]) -> tuple[FileImage, list[int]]:
    """The file that holds all of `images`, and the first byte of each."""
    segments: list[tuple[int, bytes]] = []
    starts, at = [], 0
    for image in images:
        segments += [(at + offset, content) for offset, content in image.segments]
        starts.append(at)
        at += image.size
    return FileImage(at, tuple(segments), {}), starts


def compose_metadata(metadata: Metadata) -> bytes:
    """The ``.metadata`` that DCP would write: torch's classes by name only, none of them imported."""
    places, tensors = {}, {}
    for name, stored in metadata.tensors.items():
        chunks = [_made("ChunkStorageMetadata", {"offsets": _size(item.offsets), "sizes": _size(item.size)}) for item in stored.items]
        strided = Made("torch.serialization", "_get_layout", ("torch.strided",), called=True)
        row_major = Made(f"{_HERE}.metadata", "_MEM_FORMAT_ENCODING", (0,), called=True)
        properties = _made("TensorProperties", (DType(DTYPE_NAME[stored.dtype]), strided, False, row_major, False))
        tensors[name] = _made("TensorStorageMetadata", {"properties": properties, "size": _size(stored.size), "chunks": chunks})
        for i, item in enumerate(stored.items):
            index = _made("MetadataIndex", {"fqn": name, "index": i, "offset": _size(item.offsets)})
            held = {"relative_path": item.file, "offset": item.start, "length": item.length}
            places[index] = Made(f"{_HERE}.filesystem", "_StorageInfo", (), held)
    for name, item in metadata.others.items():
        tensors[name] = _made("BytesStorageMetadata", {})
        index = _made("MetadataIndex", {"fqn": name, "index": None, "offset": None})
        places[index] = Made(
            f"{_HERE}.filesystem", "_StorageInfo", (), {"relative_path": item.file, "offset": item.start, "length": item.length}
        )
    paths = {name: metadata.paths.get(name, (name,)) for name in tensors}
    state = {"state_dict_metadata": tensors, "planner_data": paths, "storage_data": places,
             "storage_meta": None, "version": "1.0.0"}  # fmt: skip
    out = io.BytesIO()
    Pickler(out).dump(_made("Metadata", state))
    return out.getvalue()


def _made(name: str, state: object) -> Made:
    return Made(f"{_HERE}.metadata", name, (), state)


def _size(sizes: Shape) -> Made:
    return Made("torch", "Size", (sizes,), called=True)


def nbytes(dtype: str, shape: Shape) -> int:
    return prod(shape) * DTYPE_SIZE[dtype]
