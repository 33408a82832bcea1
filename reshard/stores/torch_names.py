"""torch's names of its types, and what stands in a tree for objects that are never made: no torch here."""

from dataclasses import dataclass, field
from pathlib import PurePosixPath

from reshard.dtypes import TABLE
from reshard.stores import TensorInfo

#: torch's name of each dtype that reshard knows, and the storage class that torch pickles for it
DTYPE_NAME = {name: dtype.torch for name, dtype in TABLE.items()}
STORAGE_NAME = {name: dtype.storage for name, dtype in TABLE.items() if dtype.storage}
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
    args: tuple[object, ...]
    state: object = None
    items: list[object] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Sharded:
    """A DTensor: what this rank has of a tensor of `size`, its place in a device mesh of `mesh`, and per dimension of that mesh how
    it is cut: (dimension of the tensor or None, split factor)."""

    local: TensorInfo
    size: tuple[int, ...]
    mesh: tuple[int, ...]
    coordinate: tuple[int, ...]
    cuts: tuple[tuple[int | None, int], ...]


@dataclass(frozen=True, slots=True)
class Shards:
    """A ShardedTensor: the boxes that this rank has of a tensor of `size`, each with its offsets."""

    size: tuple[int, ...]
    local: tuple[tuple[TensorInfo, tuple[int, ...]], ...]


@dataclass(eq=False, slots=True)
class Made:
    """An instance to be written, of a class that is only named: made of nothing and given `state`, or `called` with `args`."""

    module: str
    name: str
    args: tuple[object, ...]
    state: object = None
    called: bool = False


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
