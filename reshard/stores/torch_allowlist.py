"""The allowlist of a pickle: every callable that it may name, and the names that it may mention. All else is refused.

None of the callables has an effect, and none hashes, allocates or nests without bound: what a pickle calls, it calls
with arguments of its own choice. What calls copy is counted by a ``Budget``.
"""

import argparse
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import PurePosixPath

from reshard.stores.torch_names import FLAT

#: classes that may occur and are never needed: recorded as Opaque, by package or by full name
_INERT_PACKAGES = frozenset(("megatron", "transformer_engine", "transformer_engine_torch", "numpy", "deepspeed"))
_INERT_MODULES = frozenset((
    "torch.nn.functional", "torch._C._nn", "torch.distributed._mesh_layout", "torch.distributed.device_mesh",
    "torch.distributed.tensor._dtensor_spec", "torch.distributed.tensor.placement_types", "torch.distributed._tensor.placement_types",
    "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem", "torch.distributed.checkpoint.planner", "torch.distributed._shard.metadata",
    "torch.distributed._shard.sharded_tensor.api",
    "torch.distributed._shard.sharded_tensor.shard", "torch.distributed._shard.sharded_tensor.metadata",
    "torch.distributed._shard.sharding_spec.chunk_sharding_spec", "torch.distributed._shard.sharding_spec.api",
    "torch.distributed.remote_device",
))  # fmt: skip
_INERT = frozenset(
    (
        ("torch", "device"),
        ("_io", "BytesIO"),
        ("io", "BytesIO"),
        ("signal", "Signals"),
        ("torch.serialization", "_get_layout"),
        ("torch._utils", "_rebuild_wrapper_subclass"),
    )
)
#: torch's class of a tensor that is spread over ranks, by the names that it had
DTENSORS = frozenset(
    (m, "DTensor")
    for m in ("torch.distributed.tensor", "torch.distributed.tensor._api", "torch.distributed._tensor.api", "torch.distributed._tensor")
)
#: and FSDP1's: a list of local boxes
SHARDED_TENSORS = frozenset((("torch.distributed._shard.sharded_tensor.api", "ShardedTensor"),))
TENSOR_TYPES = frozenset((("torch", "Tensor"), ("torch.nn.parameter", "Parameter"), ("torch.nn.parameter", "Buffer")))


#: parts of a tuple that is a key: comparing and hashing one costs its length, each time it is used
_MOST_PARTS = 16


class Budget:
    """How much all calls of one pickle together may copy: bytes, and items of lists.

    A pickle may name one long text or list once and pass it to a call a million times, for three bytes each. What torch
    writes copies everything about once, so a few times the pickle's own size is plenty.
    """

    def __init__(self, most: int, what: str):
        self.most = self.left = most
        self.what = what

    def take(self, cost: int) -> None:
        self.left -= cost
        if self.left < 0:
            raise ValueError(f"{self.what} more than {self.most}")


def cost(argument: object) -> int:
    """What a call may copy of one of its arguments."""
    return len(argument) if isinstance(argument, (str, bytes, bytearray, list, tuple, dict, set, frozenset)) else 1


def flat(keys: Iterable[object]) -> list[object]:
    """`keys` if each hashes without recursion: C code hashing a tuple nested 100,000 deep would end the process."""
    keys = list(keys)
    if not all(type(k) in FLAT or type(k) is tuple and len(k) <= _MOST_PARTS and all(type(part) in FLAT for part in k) for k in keys):
        raise ValueError("keys and set members may not be nested or long")
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
        raise TypeError("bytearray of no bytes")
    return bytearray(content)


def _ordered_dict(items: Iterable[object] = ()) -> OrderedDict[object, object]:
    pairs = [tuple(pair) if isinstance(pair, (tuple, list)) and len(pair) == 2 else (pair,) for pair in items]
    flat(key for key, _ in pairs)
    return OrderedDict(pairs)


def _path(*parts: str) -> PurePosixPath:
    return PurePosixPath(*parts)


def _size(sizes: object = ()) -> tuple[int, ...]:
    """torch.Size: of a tuple or list of numbers, not of bytes or a text, which have items too."""
    if not isinstance(sizes, (tuple, list)) or not all(type(n) is int for n in sizes):
        raise TypeError("torch.Size of no numbers")
    return tuple(sizes)


def _complex(real: float = 0.0, imag: float = 0.0) -> complex:
    """Of numbers, not of texts to be parsed."""
    if not isinstance(real, (int, float)) or not isinstance(imag, (int, float)):
        raise TypeError("complex of no numbers")
    return complex(float(real), float(imag))


#: every callable there is, by the name that a pickle uses; none has an effect
CALLS: dict[tuple[str, str], Callable[..., object]] = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("collections", "defaultdict"): lambda factory=None: {},
    ("argparse", "Namespace"): argparse.Namespace,
    ("types", "SimpleNamespace"): types.SimpleNamespace,
    ("torch", "Size"): _size,
    ("_codecs", "encode"): _encode,
    ("builtins", "bytes"): lambda: b"",
    ("builtins", "bytearray"): _bytearray,
    ("builtins", "complex"): _complex,
    ("builtins", "slice"): _slice,
    ("builtins", "set"): lambda items=(): set(flat(items)),
    ("builtins", "frozenset"): lambda items=(): frozenset(flat(items)),
    **{(m, n): _path for m in ("pathlib", "pathlib._local") for n in ("Path", "PosixPath", "PurePath", "PurePosixPath")},
}
#: names that are only ever passed along, as defaultdict's factory (protocol 2 writes int as long, str as unicode)
REFERENCES = frozenset(("builtins", n) for n in ("int", "long", "float", "str", "unicode", "list", "dict", "tuple", "bool", "object"))


def is_inert(module: str, name: str) -> bool:
    """Whether a class is known, and needed by nobody: it is recorded, not made."""
    return (module, name) in _INERT or module in _INERT_MODULES or module.partition(".")[0] in _INERT_PACKAGES
