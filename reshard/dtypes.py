"""The one table of dtypes: safetensors' words, and what each is for files, numpy and torch. Imports neither.

Elements are moved as words of their width, never as numbers; only a cast, a comparison and a sum look at values.
"""

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass(frozen=True, slots=True)
class DType:
    """One dtype. `numpy` is the name that numpy, or ml_dtypes, has for it; `storage` the class that torch pickles for its
    storages (dtypes younger than 2023 have none: UntypedStorage). `largest` finite value and `exponent` bits are floats'."""

    size: int  # bytes of an element
    torch: str
    numpy: str
    storage: str | None = None
    kind: str = "int"  # int, float, code (8-bit floats: their scales give them values) or complex
    largest: float = 0.0
    exponent: int = 0


TABLE = {
    "BOOL": DType(1, "bool", "bool", "BoolStorage"),
    "U8": DType(1, "uint8", "uint8", "ByteStorage"),
    "I8": DType(1, "int8", "int8", "CharStorage"),
    "F8_E4M3": DType(1, "float8_e4m3fn", "float8_e4m3fn", kind="code"),
    "F8_E5M2": DType(1, "float8_e5m2", "float8_e5m2", kind="code"),
    "F8_E8M0": DType(1, "float8_e8m0fnu", "float8_e8m0fnu", kind="code"),
    "U16": DType(2, "uint16", "uint16"),
    "I16": DType(2, "int16", "int16", "ShortStorage"),
    "F16": DType(2, "float16", "float16", "HalfStorage", "float", 65504.0, 0x7C00),
    "BF16": DType(2, "bfloat16", "bfloat16", "BFloat16Storage", "float", 3.3895313892515355e38, 0x7F80),
    "U32": DType(4, "uint32", "uint32"),
    "I32": DType(4, "int32", "int32", "IntStorage"),
    "F32": DType(4, "float32", "float32", "FloatStorage", "float", 3.4028234663852886e38, 0x7F800000),
    "U64": DType(8, "uint64", "uint64"),
    "I64": DType(8, "int64", "int64", "LongStorage"),
    "F64": DType(8, "float64", "float64", "DoubleStorage", "float", 1.7976931348623157e308, 0x7FF0000000000000),
    "C64": DType(8, "complex64", "complex64", "ComplexFloatStorage", "complex"),
}

#: bytes per element
DTYPE_SIZE = {name: dtype.size for name, dtype in TABLE.items()}
#: those that are cast into each other, and those whose elements are whole numbers
FLOATS = tuple(name for name, dtype in TABLE.items() if dtype.kind == "float")
INTEGERS = tuple(name for name, dtype in TABLE.items() if dtype.kind == "int")
#: what users type after --dtype
USER_WORDS = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
#: words as the safetensors library orders them in a file, the last first
FILE_ORDER = (
    "BOOL",
    "U8",
    "I8",
    "F8_E5M2",
    "F8_E4M3",
    "F8_E8M0",
    "I16",
    "U16",
    "F16",
    "BF16",
    "I32",
    "U32",
    "F32",
    "C64",
    "F64",
    "I64",
    "U64",
)


def words_of(width: int) -> "np.dtype":
    """A numpy dtype that carries `width` bytes untouched."""
    import numpy as np

    return np.dtype(f"u{width}") if width in (1, 2, 4, 8) else np.dtype(("V", width))


@cache
def numbers_of(name: str) -> "np.dtype":
    """The numpy dtype whose values are those of dtype `name`."""
    import ml_dtypes  # noqa: F401  teaches numpy bfloat16 and the 8-bit floats
    import numpy as np

    kind = TABLE[name].numpy
    return np.dtype(kind) if hasattr(np, kind) or kind == "bool" else np.dtype(getattr(ml_dtypes, kind))


@cache
def torch_dtypes() -> dict[str, "torch.dtype"]:
    """torch's dtype for each word that this torch knows."""
    import torch

    return {name: getattr(torch, dtype.torch) for name, dtype in TABLE.items() if hasattr(torch, dtype.torch)}
