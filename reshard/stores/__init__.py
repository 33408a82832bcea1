"""Where bytes live. A store knows one kind of file: where each tensor's bytes lie in it, and how to lay a new one out.

Both kinds (``safetensors``, ``torchzip``) offer the same two functions, and neither touches a tensor's bytes:

- ``read(path)``: check the file's structure, and say where each tensor lies;
- ``compose(…)``: from names, dtypes and shapes alone, the whole file but for its tensors' bytes.
"""

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from reshard.dtypes import DTYPE_SIZE


class TensorInfo(NamedTuple):
    """One tensor as a file holds it.

    ``dtype`` is safetensors' word for it (``BF16``), ``offset`` counts bytes from the start of the file to the first
    element, ``strides`` count elements per dimension; None means row-major.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_SIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class FileImage:
    """A file to be written: its size, all its bytes that belong to no tensor as (offset, bytes), and where tensors go."""

    size: int
    segments: tuple[tuple[int, bytes], ...]
    tensors: dict[str, TensorInfo]

    @property
    def content(self) -> bytes:
        """All its bytes, of a file that holds no tensor."""
        out = bytearray(self.size)
        for offset, content in self.segments:
            out[offset : offset + len(content)] = content
        return bytes(out)
