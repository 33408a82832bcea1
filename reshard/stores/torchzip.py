"""torch.save files: where their tensors lie, and new ones laid out, without torch (its import takes two seconds).

Such a file is a zip of stored (never compressed) records under one folder::

    archive/data.pkl     a pickle of the saved object; each tensor in it names a storage by number
    archive/data/N       storage N: raw little-endian bytes, aligned to 64
    archive/byteorder, version, .format_version, .storage_alignment, .data/serialization_id

Reading trusts nothing. The pickle runs on an interpreter of ours, whose every callable is in a table below: a name outside
is refused, and no named module is ever imported. Sources: torch/serialization.py and caffe2/serialize/inline_container.cc.
"""

import argparse
import hashlib
import io
import pickle
import struct
import types
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NoReturn

from reshard.errors import FormatError, ReshardError
from reshard.stores import DTYPE_SIZE, FileImage, TensorInfo

#: torch's name of each dtype that reshard knows
DTYPE_NAME = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip
#: the storage class that torch pickles for a dtype; dtypes younger than 2023 have none and use UntypedStorage
_STORAGE_NAME = {
    "BOOL": "BoolStorage", "U8": "ByteStorage", "I8": "CharStorage", "I16": "ShortStorage", "I32": "IntStorage",
    "I64": "LongStorage", "F16": "HalfStorage", "BF16": "BFloat16Storage", "F32": "FloatStorage", "F64": "DoubleStorage",
    "C64": "ComplexFloatStorage",
}  # fmt: skip
_DTYPE_OF_NAME = {name: dtype for dtype, name in DTYPE_NAME.items()}
_DTYPE_OF_STORAGE = {name: dtype for dtype, name in _STORAGE_NAME.items()}
#: known to torch but not to reshard: fine as a value in the tree, an error as a tensor's dtype
_OTHER_DTYPES = frozenset((
    "complex32", "complex128", "qint8", "quint8", "qint32", "quint4x2", "quint2x4",
    "float8_e4m3fnuz", "float8_e5m2fnuz", "float4_e2m1fn_x2",
))  # fmt: skip
_OTHER_STORAGES = frozenset((
    "ComplexDoubleStorage", "QInt8Storage", "QInt32Storage", "QUInt8Storage", "QUInt4x2Storage", "QUInt2x4Storage",
))  # fmt: skip
#: classes that may occur and are never needed: recorded as Opaque, by package or by full name
_INERT_PACKAGES = frozenset(("megatron", "transformer_engine", "transformer_engine_torch", "numpy"))
_INERT_MODULES = frozenset(("torch.nn.functional", "torch._C._nn"))
_INERT = frozenset((("torch", "device"), ("_io", "BytesIO"), ("io", "BytesIO"), ("signal", "Signals"), ("torch.serialization", "_get_layout")))
_TENSOR_TYPES = frozenset((("torch", "Tensor"), ("torch.nn.parameter", "Parameter"), ("torch.nn.parameter", "Buffer")))

_PICKLE_LIMIT = 256 << 20
_DIRECTORY_LIMIT = 256 << 20
#: bounds on what a pickle may unfold to, so that a caller may walk the tree by plain recursion
_DEPTH_LIMIT, _NODE_LIMIT = 200, 20_000_000
_ALIGNMENT = 64
_RESAVE = "re-save it with a current torch: torch.save(torch.load(path, weights_only=True), path)"
_COPY = "the file is damaged; copy it again"

_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_END = struct.Struct("<4s4H2LH")
_FULL32, _FULL16 = 0xFFFFFFFF, 0xFFFF


# ---------------------------------------------------------------------------------------------- the tree's own leaves


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to be written, standing in the tree given to ``compose``; ``name`` is its key in ``FileImage.tensors``."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DType:
    """A torch dtype as a value: ``DType("bfloat16")`` is torch.bfloat16."""

    name: str


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function that a pickle names, never imported."""

    module: str
    name: str


@dataclass(eq=False, slots=True)
class Opaque:
    """What an inert class was called with and filled with; nothing of it was executed."""

    module: str
    name: str
    args: tuple
    state: object = None
    items: list = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Storage:
    key: str
    dtype: str | None
    offset: int
    nbytes: int


#: what hashes without recursion
_FLAT = frozenset((str, int, float, bool, complex, bytes, type(None), PurePosixPath, DType, Global, Opaque))


# --------------------------------------------------------------------------------------------------------------- read


def read(path: Path, start: int = 0, length: int | None = None) -> object:
    """The object saved in `path`, each tensor of it a TensorInfo (offsets count from the start of `path`).

    `start` and `length` say where in the file the zip lies; default is all of it. Reads the zip's directory, the pickle
    and one header per storage, no tensor. Raises FormatError for anything broken, foreign or unsafe.
    """
    with open(path, "rb", buffering=0) as file:
        size = file.seek(0, io.SEEK_END)
        end = size if length is None else start + length
        if not 0 <= start <= end <= size:
            raise FormatError(f"{path} has {size} bytes, an item is said to lie at {start} to {end}", _COPY)
        archive = _Archive(path, file, start, end)
        order = archive.content("byteorder", 64) if "byteorder" in archive.records else b"little"
        if order != b"little":
            raise FormatError(f"{path} was saved on a {order.decode('latin1')}-endian machine", "re-save it on a little-endian one")
        if "constants.pkl" in archive.records:
            raise FormatError(f"{path} is a TorchScript program, not a checkpoint", "save model.state_dict() with torch.save")
        tree = _Unpickler(archive).run()
    return tree


class _Archive:
    """The records of one zip, by name without the leading folder, as its directory lists them; offsets are the file's."""

    def __init__(self, path: Path, file: BinaryIO, start: int, end: int):
        self.path, self.file, self.start, self.end = path, file, start, end
        at, size, count = self._directory()
        self.data_end = at
        raw = self._at(at, size)
        self.records: dict[str, tuple[str, int, int, int]] = {}
        folder, at = None, 0
        for _ in range(count):
            if at + _CENTRAL.size > size:
                raise self.error(f"directory ends after {len(self.records)} of {count} records")
            sign, _, _, flags, method, _, _, crc, packed, unpacked, n, e, c, _, _, _, header = _CENTRAL.unpack_from(raw, at)
            name_at = at + _CENTRAL.size
            at = name_at + n + e + c
            if sign != b"PK\1\2" or at > size:
                raise self.error(f"record {len(self.records)} of the directory is malformed")
            name = raw[name_at : name_at + n].decode("utf-8", "backslashreplace")
            if _FULL32 in (packed, unpacked, header):
                unpacked, packed, header = self._wide(raw[name_at + n : name_at + n + e], name, unpacked, packed, header)
            if method or flags & 1 or packed != unpacked:
                raise self.error(f"record {name} is compressed or encrypted (method {method}, {packed} for {unpacked} bytes)", _RESAVE)
            head, slash, rest = name.partition("/")
            folder = head if folder is None else folder
            if not slash or head != folder:
                raise self.error(f"record {name} lies outside the folder {folder}", "this is a zip, but not of torch.save")
            if rest in self.records:
                raise self.error(f"record {name} stands twice in the directory")
            self.records[rest] = (name, start + header, unpacked, crc)

    def _at(self, offset: int, size: int) -> bytes:
        self.file.seek(offset)
        raw = self.file.read(size) if size else b""
        if len(raw) != size:
            raise self.error(f"has {len(raw)} bytes at {offset}, {size} are needed")
        return raw

    def error(self, message: str, hint: str | None = _COPY) -> FormatError:
        return FormatError(f"{self.path}: {message}", hint)

    def _directory(self) -> tuple[int, int, int]:
        """Offset, size and number of records of the zip's directory."""
        tail_at = max(self.start, self.end - _END.size - _FULL16)
        tail = self._at(tail_at, self.end - tail_at)
        found = tail.rfind(b"PK\5\6")
        if found < 0 or found + _END.size > len(tail):
            raise self._foreign()
        _, _, _, _, count, size, at, comment = _END.unpack_from(tail, found)
        if found + _END.size + comment != len(tail):
            raise self.error(f"has {len(tail) - found - _END.size} bytes after its end, {comment} are declared")
        limit = tail_at + found
        if found >= _LOCATOR.size and tail[found - _LOCATOR.size :][:4] == b"PK\6\7":
            (_, _, end64, _) = _LOCATOR.unpack_from(tail, found - _LOCATOR.size)
            limit -= _LOCATOR.size + _END64.size
            if self.start + end64 != limit:
                raise self.error(f"zip64 end record is said to lie at {end64}, expected {limit - self.start}")
            sign, _, _, _, _, _, _, count, size, at = _END64.unpack(self._at(limit, _END64.size))
            if sign != b"PK\6\6":
                raise self.error(f"no zip64 end record at {end64}")
        if self.start + at + size != limit or size > _DIRECTORY_LIMIT or count * _CENTRAL.size > size:
            raise self.error(f"directory of {count} records is said to span bytes {at} to {at + size}, expected to end at {limit - self.start}")
        return self.start + at, size, count

    def _foreign(self) -> FormatError:
        head = self._at(self.start, min(512, self.end - self.start))
        if head[:1] == b"\x80" or head[257:262] == b"ustar":
            return self.error("is in torch's format of before 1.6 (a bare pickle or a tar)", _RESAVE)
        if head[:4] == b"PK\3\4":
            return self.error(f"zip of {self.end - self.start} bytes has no end record: it is truncated")
        return self.error("is not a torch.save file", "expected a zip that holds a data.pkl")

    def _wide(self, extra: bytes, name: str, *numbers: int) -> list[int]:
        """`numbers` with those that do not fit 32 bits taken from the zip64 extra field, in the order of the specification."""
        while len(extra) >= 4:
            kind, size = struct.unpack_from("<2H", extra)
            if kind == 1:
                wide = iter(struct.unpack_from(f"<{min(size, len(extra) - 4) // 8}Q", extra, 4))
                return [next(wide, _FULL32) if n == _FULL32 else n for n in numbers]
            extra = extra[4 + size :]
        raise self.error(f"record {name} lacks its zip64 sizes")

    def locate(self, key: str) -> tuple[int, int]:
        """Offset and size of a record's content, by its own header."""
        if key not in self.records:
            raise self.error(f"record {key} is missing; the zip has {len(self.records)} records")
        name, header, size, _ = self.records[key]
        if header + _LOCAL.size > self.data_end:
            raise self.error(f"record {name} is said to lie at {header}, the data ends at {self.data_end}")
        sign, *_, n, e = _LOCAL.unpack(self._at(header, _LOCAL.size))
        at = header + _LOCAL.size + n + e
        if sign != b"PK\3\4" or n != len(name.encode("utf-8", "backslashreplace")):
            raise self.error(f"record {name} has no header at {header}")
        if at + size > self.data_end:
            raise self.error(f"record {name} spans bytes {at} to {at + size}, the data ends at {self.data_end}")
        return at, size

    def content(self, key: str, limit: int) -> bytes:
        at, size = self.locate(key)
        if size > limit:
            raise self.error(f"record {key} has {size} bytes, more than the {limit} allowed", "this is no checkpoint of tensors")
        raw, crc = self._at(at, size), self.records[key][3]
        # torch writes 0 when told not to compute checksums, so 0 says nothing
        if crc and zlib.crc32(raw) != crc:
            raise self.error(f"record {key} has checksum {zlib.crc32(raw):08x}, its directory says {crc:08x}")
        return raw


# ----------------------------------------------------------------------------------------------------------- unpickle


def _flat(keys: Iterable) -> list:
    """`keys` if each hashes without recursion: C code hashing a tuple nested 100,000 deep would end the process."""
    keys = list(keys)
    if not all(type(k) in _FLAT or type(k) is tuple and all(type(part) in _FLAT for part in k) for k in keys):
        raise ValueError("keys and set members may not be nested")
    return keys


def _slice(*bounds: int | None) -> slice:
    """Of numbers only: nested slices end the process when they are freed."""
    if not all(b is None or type(b) is int for b in bounds):
        raise ValueError("slice of no numbers")
    return slice(*bounds)


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """How protocol 2 spells bytes; only ever with latin1, and other codecs (zlib, …) are code of a kind."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "utf-8"):
        raise ValueError(f"encoding {str(encoding)[:40]!r} is not allowed")
    return text.encode(encoding)


def _bytearray(content: object = b"", encoding: str = "latin1") -> bytearray:
    if isinstance(content, str):
        return bytearray(_encode(content, encoding))
    if not isinstance(content, bytes):  # a number would allocate that many bytes
        raise ValueError("bytearray of no bytes")
    return bytearray(content)


def _ordered_dict(items: object = ()) -> OrderedDict:
    pairs = [tuple(pair) for pair in items]
    _flat(key for key, _ in pairs)
    return OrderedDict(pairs)


def _path(*parts: str) -> PurePosixPath:
    return PurePosixPath(*parts)


#: every callable there is, by the name that a pickle uses; none has an effect
_CALLS: dict[tuple[str, str], Callable] = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("collections", "defaultdict"): lambda factory=None: {},
    ("argparse", "Namespace"): argparse.Namespace,
    ("types", "SimpleNamespace"): types.SimpleNamespace,
    ("torch", "Size"): lambda sizes=(): tuple(sizes),
    ("_codecs", "encode"): _encode,
    ("builtins", "bytes"): lambda: b"",
    ("builtins", "bytearray"): _bytearray,
    ("builtins", "complex"): lambda real=0.0, imag=0.0: complex(float(real), float(imag)),
    ("builtins", "slice"): _slice,
    ("builtins", "set"): lambda items=(): set(_flat(items)),
    ("builtins", "frozenset"): lambda items=(): frozenset(_flat(items)),
    **{(m, n): _path for m in ("pathlib", "pathlib._local") for n in ("Path", "PosixPath", "PurePath", "PurePosixPath")},
}
#: names that are only ever passed along, as defaultdict's factory (protocol 2 writes int as long, str as unicode)
_REFERENCES = frozenset(("builtins", n) for n in ("int", "long", "float", "str", "unicode", "list", "dict", "tuple", "bool", "object"))


class _Unpickler(pickle._Unpickler):
    """pickle's own interpreter in Python, every opcode that calls, fills or hashes replaced.

    The C one is three times as fast, but would hash a deeply nested key, set attributes of whatever lies on its stack, and
    size its memo by a number in the file.
    """

    #: BYTEARRAY8 would allocate any size that the file names
    dispatch = {code: load for code, load in pickle._Unpickler.dispatch.items()
                if bytes((code,)) not in (pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX, pickle.PERSID, pickle.EXT1, pickle.EXT2,
                                          pickle.EXT4, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER, pickle.BYTEARRAY8)}  # fmt: skip

    def __init__(self, archive: _Archive):
        super().__init__(io.BytesIO(archive.content("data.pkl", _PICKLE_LIMIT)))
        self.archive = archive
        self.storages: dict[str, _Storage] = {}
        self.globals: dict[tuple[str, str], Global | DType] = {}
        self.calls = _CALLS | {
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor_v2,
            ("torch._utils", "_rebuild_tensor_v3"): self._tensor_v3,
            ("torch._utils", "_rebuild_parameter"): self._parameter,
            ("torch._utils", "_rebuild_parameter_with_state"): self._parameter,
            ("torch._tensor", "_rebuild_from_type_v2"): self._from_type,
        }

    def run(self) -> object:
        try:
            tree = self.load()
        except FormatError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a damaged stream leads to
            what = f"{type(error).__name__}: {error}"
            self._fail(f"its pickle is damaged or hostile ({what[:200]})")
        problem = _unbounded(tree)
        if problem:
            raise self.archive.error(f"its pickle unfolds to {problem}", "this is no checkpoint of tensors")
        return tree

    def _fail(self, message: str, hint: str | None = _COPY) -> NoReturn:
        """Raises, naming the key under which the interpreter is at work: the last text on its stack."""
        stacks = [getattr(self, "stack", [])] + getattr(self, "metastack", [])[::-1]
        near = next((item for stack in stacks for item in reversed(stack) if type(item) is str), None)
        raise self.archive.error(message if near is None else f"{near[:200]}: {message}", hint)

    # names and calls

    def find_class(self, module: str, name: str) -> Global | DType:
        key = ("builtins" if module == "__builtin__" else module, name)
        if key not in self.globals:
            self.globals[key] = self._resolve(*key)
        return self.globals[key]

    def _resolve(self, module: str, name: str) -> Global | DType:
        key = (module, name)
        if module == "torch" and (name in _DTYPE_OF_NAME or name in _OTHER_DTYPES):
            return DType(name)
        if module == "torch" and (name in _DTYPE_OF_STORAGE or name in _OTHER_STORAGES) or key == ("torch.storage", "UntypedStorage"):
            return Global(module, name)
        if key in self.calls or key in _REFERENCES or key in _TENSOR_TYPES or self._is_inert(key):
            return Global(module, name)
        self._fail(f"its pickle names {module[:100]}.{name[:100]}, which reshard neither needs nor runs",
                   "save plain tensors: torch.save({name: tensor, …}, path), sharded tensors (DTensor) made whole first")  # fmt: skip

    @staticmethod
    def _is_inert(key: tuple[str, str]) -> bool:
        return key in _INERT or key[0] in _INERT_MODULES or key[0].partition(".")[0] in _INERT_PACKAGES

    def _call(self, what: object, args: object) -> object:
        if not isinstance(what, Global) or not isinstance(args, tuple):
            self._fail(f"its pickle calls a {type(what).__name__} with a {type(args).__name__}")
        key = (what.module, what.name)
        if key in self.calls:
            return self.calls[key](*args)
        if self._is_inert(key):
            return Opaque(*key, args)
        self._fail(f"its pickle calls {what.module}.{what.name}")

    def load_reduce(self):
        args = self.stack.pop()
        what = self.stack.pop()
        self.stack.append(self._call(what, args))

    def load_build(self):
        state = self.stack.pop()
        held = self.stack[-1]
        if isinstance(held, Opaque):
            held.state = state
        elif type(held) in (argparse.Namespace, types.SimpleNamespace):
            if type(state) is not dict or not all(type(name) is str for name in state):
                self._fail("a namespace's state is not a dict of names")
            vars(held).update(state)
        elif type(held) is not OrderedDict:  # a state_dict's _metadata is an attribute, of no use here
            self._fail(f"its pickle sets attributes of a {type(held).__name__}")

    # containers

    def _fill(self, held: object, items: list, kind: type) -> None:
        """Adds `items` to the dict (keys and values in turn), list or set `held`, or to an opaque stand-in for one."""
        if isinstance(held, Opaque):
            held.items.extend(items)
        elif not isinstance(held, kind):
            self._fail(f"its pickle puts items into a {type(held).__name__}")
        elif kind is dict:
            held.update(zip(_flat(items[::2]), items[1::2], strict=True))
        else:
            (held.extend if kind is list else held.update)(items if kind is list else _flat(items))

    def load_setitem(self):
        value = self.stack.pop()
        key = self.stack.pop()
        self._fill(self.stack[-1], [key, value], dict)

    def load_setitems(self):
        items = self.pop_mark()
        self._fill(self.stack[-1], items, dict)

    def load_dict(self):
        items = self.pop_mark()
        self.stack.append({})
        self._fill(self.stack[-1], items, dict)

    def load_append(self):
        item = self.stack.pop()
        self._fill(self.stack[-1], [item], list)

    def load_appends(self):
        items = self.pop_mark()
        self._fill(self.stack[-1], items, list)

    def load_additems(self):
        items = self.pop_mark()
        self._fill(self.stack[-1], items, set)

    def load_frozenset(self):
        self.stack.append(frozenset(_flat(self.pop_mark())))

    dispatch |= {
        pickle.REDUCE[0]: load_reduce, pickle.NEWOBJ[0]: load_reduce, pickle.BUILD[0]: load_build,
        pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems, pickle.DICT[0]: load_dict,
        pickle.APPEND[0]: load_append, pickle.APPENDS[0]: load_appends,
        pickle.ADDITEMS[0]: load_additems, pickle.FROZENSET[0]: load_frozenset,
    }  # fmt: skip

    # tensors

    def persistent_load(self, pid: object) -> _Storage:
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage" and isinstance(pid[1], Global) and isinstance(pid[2], str)):
            self._fail(f"its pickle refers to a {type(pid).__name__} where a storage is due")
        _, kind, key, _, count = pid
        if key in self.storages:
            return self.storages[key]
        if kind.name in _OTHER_STORAGES:
            self._fail(f"its dtype is torch's {kind.name}, which reshard does not know", f"known: {', '.join(DTYPE_NAME.values())}")
        if kind.name not in _DTYPE_OF_STORAGE and kind.name != "UntypedStorage":
            self._fail(f"its storage is a {kind.module}.{kind.name}")
        dtype = _DTYPE_OF_STORAGE.get(kind.name)
        offset, nbytes = self.archive.locate(f"data/{key}")
        if type(count) is not int or nbytes != count * DTYPE_SIZE.get(dtype, 1):
            self._fail(f"record data/{key} has {nbytes} bytes, the pickle says {str(count)[:40]} elements of {kind.name}")
        storage = self.storages[key] = _Storage(key, dtype, offset, nbytes)
        return storage

    def _tensor_v2(self, storage, offset, shape, strides, requires_grad=False, hooks=None, metadata=None) -> TensorInfo:
        return self._tensor(storage, getattr(storage, "dtype", None), offset, shape, strides, metadata)

    def _tensor_v3(self, storage, offset, shape, strides, requires_grad, hooks, dtype, metadata=None) -> TensorInfo:
        name = dtype.name if isinstance(dtype, DType) else str(type(dtype))
        if name not in _DTYPE_OF_NAME:
            self._fail(f"its dtype is torch.{name}, which reshard does not know", f"known: {', '.join(DTYPE_NAME.values())}")
        return self._tensor(storage, _DTYPE_OF_NAME[name], offset, shape, strides, metadata)

    def _tensor(self, storage, dtype, offset, shape, strides, metadata) -> TensorInfo:
        """Offsets and strides count elements of `dtype` in `storage`. Every element must lie inside."""
        if not isinstance(storage, _Storage) or dtype is None:
            self._fail("a tensor has no storage of a known dtype")
        if metadata:
            self._fail(f"a tensor is a lazily conjugated or negated view ({str(metadata)[:80]})", "save tensor.resolve_conj().resolve_neg()")
        if not (isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides) <= 64):
            self._fail(f"a tensor has shape {str(shape)[:80]} and strides {str(strides)[:80]}")
        for n in (offset, *shape, *strides):
            if type(n) is not int or not 0 <= n < 1 << 63:
                self._fail(f"a tensor has offset {str(offset)[:40]}, shape {str(shape)[:80]} and strides {str(strides)[:80]}, expected sizes")
        size = DTYPE_SIZE[dtype]
        if 0 in shape:
            return TensorInfo(dtype, shape, storage.offset)
        last, row_major = offset, row_major_strides(shape)
        for n, stride in zip(shape, strides):
            last += (n - 1) * stride
        if (last + 1) * size > storage.nbytes or prod(shape) * size >= 1 << 63:
            self._fail(f"a tensor of {dtype} {shape} with strides {strides} ends at byte {(last + 1) * size} of its storage "
                       f"data/{storage.key}, which has {storage.nbytes}")  # fmt: skip
        plain = strides == row_major or all(n == 1 or a == b for n, a, b in zip(shape, strides, row_major))
        return TensorInfo(dtype, shape, storage.offset + offset * size, None if plain else strides)

    def _parameter(self, data, requires_grad=True, hooks=None, state=None) -> TensorInfo:
        if not isinstance(data, TensorInfo):
            self._fail(f"a parameter holds a {type(data).__name__}")
        return data

    def _from_type(self, rebuild, kind, args, state) -> object:
        """A tensor that carries Python attributes; they are dropped."""
        if not isinstance(kind, Global) or (kind.module, kind.name) not in _TENSOR_TYPES:
            self._fail(f"a tensor is of the class {getattr(kind, 'name', kind)}", "save plain tensors")
        return self._call(rebuild, args)


def _children(node: object) -> list | None:
    if isinstance(node, dict):
        return list(node.values())
    if type(node) in (list, tuple):
        return list(node)
    if type(node) in (argparse.Namespace, types.SimpleNamespace):
        return list(vars(node).values())
    return [node.args, node.state, node.items] if type(node) is Opaque else None


def _unbounded(root: object) -> str | None:
    """What is wrong with a tree that holds itself, is too deep, or by sharing unfolds to too many nodes; None if nothing."""
    done: dict[int, tuple[int, int]] = {}
    entered: set[int] = set()
    stack = [(root, False)]
    while stack:
        node, leaving = stack.pop()
        children = _children(node)
        if children is None or id(node) in done:
            continue
        if leaving:
            depth = size = 0
            for child in children:
                d, s = done.get(id(child), (0, 1))
                depth, size = max(depth, d), size + s
            if depth >= _DEPTH_LIMIT:
                return f"more than {_DEPTH_LIMIT} levels"
            if size >= _NODE_LIMIT:
                return f"more than {_NODE_LIMIT} values"
            entered.discard(id(node))
            done[id(node)] = depth + 1, size + 1
        elif id(node) in entered:
            return "an object that holds itself"
        else:
            entered.add(id(node))
            stack.append((node, True))
            stack.extend((child, False) for child in children)
    return None


# ------------------------------------------------------------------------------------------------------------ compose


def row_major_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """As torch counts them: in elements, a dimension of 0 counting as 1."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= max(n, 1)
    return tuple(reversed(strides))


#: what a tree to be written may hold beyond pickle's own types; no sets, whose order changes from run to run
_WRITABLE = frozenset(_CALLS) - {("builtins", "set"), ("builtins", "frozenset"), ("collections", "defaultdict")}


class _Pickler(pickle._Pickler):
    """Writes what torch.save would for the same tree, torch's classes by name only. ``specs`` lists the storages in order."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file, protocol=2)
        self.specs: list[TensorSpec] = []
        self.names: set[str] = set()
        self.globals: dict[tuple[str, str], Global] = {}  # one object per name, so that the memo knows it again

    def _named(self, module: str, name: str) -> Global:
        return self.globals.setdefault((module, name), Global(module, name))

    def persistent_id(self, obj: object) -> tuple | None:
        if type(obj) is not _Storage:
            return None
        kind = self._named("torch", _STORAGE_NAME[obj.dtype]) if obj.dtype else self._named("torch.storage", "UntypedStorage")
        return ("storage", kind, obj.key, "cpu", obj.nbytes // DTYPE_SIZE.get(obj.dtype, 1))

    def save_spec(self, spec: TensorSpec) -> None:
        if spec.name in self.names:
            raise ReshardError(f"{spec.name} stands twice among the tensors of one file")
        if spec.dtype not in DTYPE_NAME:
            raise ReshardError(f"{spec.name} has dtype {spec.dtype}, which torch has not")
        typed = spec.dtype in _STORAGE_NAME
        nbytes = prod(spec.shape) * DTYPE_SIZE[spec.dtype]
        storage = _Storage(str(len(self.specs)), spec.dtype if typed else None, 0, nbytes)
        self.names.add(spec.name)
        self.specs.append(spec)
        args = (storage, 0, tuple(spec.shape), row_major_strides(spec.shape), False, OrderedDict())
        self.save(self._named("torch._utils", "_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3"))
        self.save(args if typed else (*args, DType(DTYPE_NAME[spec.dtype])))
        self.write(pickle.REDUCE)
        self.memoize(spec)

    def save_dtype(self, dtype: DType) -> None:
        self.save(self._named("torch", dtype.name))

    def save_name(self, obj: Global) -> None:
        self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        self.memoize(obj)

    def save_global(self, obj: object, name: str | None = None) -> None:
        key = (getattr(obj, "__module__", ""), name or getattr(obj, "__qualname__", ""))
        if key not in _WRITABLE:
            raise ReshardError(f"a torch file of reshard cannot hold {key[0]}.{key[1]}", "use plain dicts, lists, texts and numbers")
        super().save_global(obj, name)

    dispatch = {**pickle._Pickler.dispatch, TensorSpec: save_spec, DType: save_dtype, Global: save_name, type: save_global,
                types.FunctionType: save_global}  # fmt: skip


def compose(tree: object) -> FileImage:
    """The file that torch.save would write for `tree`, in which each TensorSpec is a tensor; all but the tensors' bytes.

    The tree is made of dicts, lists, tuples, texts, bytes, numbers, None, Namespace, PurePosixPath and DType. The same
    tree gives the same bytes. Layout and flags are torch 2.13's, to the byte, but for two things. The serialization id is a
    hash of this skeleton. And tensors' checksums are 0, as torch writes under ``set_crc32_options(False)``: the bytes are
    not known here, and torch does not check them on reading (Python's zipfile and unzip do, and will complain).
    """
    pickled = io.BytesIO()
    pickler = _Pickler(pickled)
    pickler.dump(tree)
    layout = _Layout("archive")
    layout.add("data.pkl", pickled.getvalue())
    layout.add(".format_version", b"1")
    layout.add(".storage_alignment", str(_ALIGNMENT).encode())
    layout.add("byteorder", b"little")
    tensors = {}
    for i, spec in enumerate(pickler.specs):
        shape = tuple(spec.shape)
        offset = layout.reserve(f"data/{i}", prod(shape) * DTYPE_SIZE[spec.dtype])
        tensors[spec.name] = TensorInfo(spec.dtype, shape, offset)
    layout.add("version", b"3\n")
    digest = hashlib.sha256(pickled.getvalue()).digest()  # the pickle tells all names and sizes
    halves = (int.from_bytes(half, "little") % 10**20 for half in (digest[:16], digest[16:]))
    layout.add(".data/serialization_id", "".join(f"{half:020d}" for half in halves).encode())
    size, segments = layout.finish()
    return FileImage(size, segments, tensors)


def _zip64(numbers: list[int]) -> bytes:
    """The extra field for numbers that do not fit 32 bits."""
    return struct.pack(f"<2H{len(numbers)}Q", 1, 8 * len(numbers), *numbers) if numbers else b""


class _Layout:
    """A zip growing record by record; content that is only reserved parts its bytes into segments."""

    def __init__(self, folder: str):
        self.folder = folder
        self.segments: list[tuple[int, bytes]] = []
        self.at, self.bytes = 0, bytearray()  # of the segment in work
        self.directory = bytearray()
        self.count = 0

    def add(self, name: str, content: bytes) -> None:
        self._header(name, len(content), zlib.crc32(content))
        self.bytes += content
        self._descriptor(len(content), zlib.crc32(content))

    def reserve(self, name: str, size: int) -> int:
        self._header(name, size, 0)
        offset = self.at + len(self.bytes)
        if size:
            self.segments.append((self.at, bytes(self.bytes)))
            self.at, self.bytes = offset + size, bytearray()
            self._descriptor(size, 0)
        return offset

    def _header(self, name: str, size: int, crc: int) -> None:
        """The record's own header, padded so that its content is aligned, and its line in the directory.

        As torch's writer: sizes in the header are 0 and follow the content (flag 8), except where there is no content; zip64
        fields appear only where a number needs them, and padding is a field `FB` of Zs.
        """
        start = self.at + len(self.bytes)
        full = f"{self.folder}/{name}".encode()
        big, far = size >= _FULL32, start >= _FULL32
        wide = _zip64(([size, size] if big else []) + ([start] if far else []))
        padding = -(start + _LOCAL.size + len(full) + len(wide) + 4) % _ALIGNMENT
        # the packed size is 0 here as all sizes are, by torch's reading of the specification
        extra = _zip64(([size, 0] if big else []) + ([start] if far else [])) + struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        flags = 0x0808 if size else 0x0800  # UTF-8 name, sizes after the content
        self.wide = big or far
        self.bytes += _LOCAL.pack(b"PK\3\4", 0, flags, 0, 0, 0, 0, 0, 0, len(full), len(extra)) + full + extra
        short = _FULL32 if big else size
        self.directory += _CENTRAL.pack(b"PK\1\2", 0, 0, flags, 0, 0, 0, crc, short, short, len(full), len(wide),
                                        0, 0, 0, 0, _FULL32 if far else start) + full + wide  # fmt: skip
        self.count += 1

    def _descriptor(self, size: int, crc: int) -> None:
        self.bytes += struct.pack("<4sL2Q" if self.wide else "<4s3L", b"PK\7\x08", crc, size, size)

    def finish(self) -> tuple[int, tuple[tuple[int, bytes], ...]]:
        """Size of the whole file and its segments."""
        at, size, count = self.at + len(self.bytes), len(self.directory), self.count
        self.bytes += self.directory
        self.bytes += _END64.pack(b"PK\6\6", 44, 0x031E, 45, 0, 0, count, count, size, at)
        self.bytes += _LOCATOR.pack(b"PK\6\7", 0, at + size, 1)
        short = min(count, _FULL16)
        self.bytes += _END.pack(b"PK\5\6", 0, 0, short, short, min(size, _FULL32), min(at, _FULL32), 0)
        self.segments.append((self.at, bytes(self.bytes)))
        return self.at + len(self.bytes), tuple(self.segments)
