"""torch's names of its types, and what stands in a tree for objects that are never made: no torch here."""

from dataclasses import dataclass, field
from pathlib import PurePosixPath

#: torch's name of each dtype that reshard knows
DTYPE_NAME = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip
#: the storage class that torch pickles for a dtype; dtypes younger than 2023 have none and use UntypedStorage
STORAGE_NAME = {
    "BOOL": "BoolStorage", "U8": "ByteStorage", "I8": "CharStorage", "I16": "ShortStorage", "I32": "IntStorage",
    "I64": "LongStorage", "F16": "HalfStorage", "BF16": "BFloat16Storage", "F32": "FloatStorage", "F64": "DoubleStorage",
    "C64": "ComplexFloatStorage",
}  # fmt: skip
DTYPE_OF_NAME = {name: dtype for dtype, name in DTYPE_NAME.items()}
DTYPE_OF_STORAGE = {name: dtype for dtype, name in STORAGE_NAME.items()}
#: known to torch but not to reshard: fine as a value in the tree, an error as a tensor's dtype
OTHER_DTYPES = frozenset((
    "complex32", "complex128", "qint8", "quint8", "qint32", "quint4x2", "quint2x4",
    "float8_e4m3fnuz", "float8_e5m2fnuz", "float4_e2m1fn_x2",
))  # fmt: skip
OTHER_STORAGES = frozenset((
    "ComplexDoubleStorage", "QInt8Storage", "QInt32Storage", "QUInt8Storage", "QUInt4x2Storage", "QUInt2x4Storage",
))  # fmt: skip


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
class Storage:
    """The bytes that tensors share, by its number in the file; `offset` counts from the start of the file."""

    key: str
    dtype: str | None
    offset: int
    nbytes: int


#: what hashes without recursion
FLAT = frozenset((str, int, float, bool, complex, bytes, type(None), PurePosixPath, DType, Global, Opaque))


def row_major_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """As torch counts them: in elements, a dimension of 0 counting as 1."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= max(n, 1)
    return tuple(reversed(strides))
