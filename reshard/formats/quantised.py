"""Quantised checkpoints: recognised, and refused with one sentence. Codes without their scales mean nothing.

A quantised matrix is several tensors (codes, scales, sometimes zero points) that must be cut together. Until plans can do
that, such a model is told apart here, by config.json's quantization_config or by the names and dtypes of its tensors.
"""

import re
from collections.abc import Iterable, Mapping

from reshard.dtypes import FLOATS, INTEGERS
from reshard.errors import FormatError
from reshard.foreign import quote
from reshard.formats import Contents
from reshard.stores.files import AnyPath

#: how each scheme's tensors are named; the first that fits tells
_NAMES = (
    ("MXFP4", re.compile(r".*_blocks")),
    ("bitsandbytes 4 bit", re.compile(r".*\.(?:quant_map|absmax|nested_absmax|quant_state\..*)")),
    ("bitsandbytes 8 bit", re.compile(r".*\.SCB")),
    ("AWQ or GPTQ", re.compile(r".*\.(?:qweight|qzeros|g_idx)")),
    ("compressed-tensors", re.compile(r".*\.(?:weight_packed|weight_shape|weight_global_scale)")),
    ("FP8 in blocks", re.compile(r".*\.weight_scale_inv")),
    ("FP8 or INT8", re.compile(r".*\.(?:weight_scale|weight_scale_2|input_scale)")),
)
#: no other name can be one of these
_ENDS = (
    "_blocks",
    ".quant_map",
    "absmax",
    ".SCB",
    ".qweight",
    ".qzeros",
    ".g_idx",
    "_packed",
    "_shape",
    "_scale",
    "_scale_inv",
    "_scale_2",
)
_WAY = (
    "reshard moves weights that are not quantised: name the original in bf16, "
    "or dequantise first (transformers: from_pretrained(…).dequantize() and save_pretrained)"
)


def scheme(settings: Mapping[str, object], contents: Contents) -> str | None:
    """What the model is quantised as, in words; None where neither config.json nor the tensors say that it is."""
    telling = [piece.name for piece in contents.pieces if piece.name.endswith(_ENDS) or ".quant_state." in piece.name]
    by_name = next((word for word, pattern in _NAMES for name in telling if pattern.fullmatch(name)), None)
    config = quantization_config(settings)
    codes = any(piece.dtype not in FLOATS for piece in contents.pieces)
    if config is None:
        return by_name
    # a copy that was dequantised may have kept the entry
    return f"{_described(config)} (config.json's quantization_config)" if by_name or codes else None


def quantization_config(settings: Mapping[str, object]) -> Mapping[str, object] | None:
    for table in (settings, settings.get("text_config")):
        found = table.get("quantization_config") or table.get("compression_config") if isinstance(table, Mapping) else None
        if isinstance(found, Mapping):
            return found
    return None


def _described(config: Mapping[str, object]) -> str:
    method = config.get("quant_method") or config.get("quant_algo") or "unnamed scheme"
    details = [
        f"{key} {config[key]}" for key in ("bits", "group_size", "weight_block_size", "fmt", "format") if config.get(key) is not None
    ]
    details += [word for key, word in (("load_in_4bit", "4 bit"), ("load_in_8bit", "8 bit")) if config.get(key) is True]
    return quote(", ".join([str(method), *details]))


def refuse(folder: AnyPath, word: str, contents: Contents) -> FormatError:
    """The one error for a quantised checkpoint."""
    kinds: dict[str, int] = {}
    for piece in contents.pieces:
        kinds[piece.dtype] = kinds.get(piece.dtype, 0) + 1
    counted = ", ".join(f"{count} {dtype}" for dtype, count in sorted(kinds.items(), key=lambda item: -item[1]))
    return FormatError(f"{folder} is quantised: {word}; its tensors are {counted}. reshard does not move quantised weights yet", _WAY)


def codes_without_scales(
    folder: AnyPath, settings: Mapping[str, object], stored: Iterable, operands: Iterable[str] = ()
) -> FormatError | None:
    """The error for a model whose every name is explained, but some of whose tensors hold codes that are no `operands` of a
    scheme; None where none does."""
    config, known = quantization_config(settings), frozenset(operands)
    for s in stored:
        if (s.dtype in INTEGERS or (config is not None and s.dtype not in FLOATS)) and known.isdisjoint(s.entry.of):
            word = f", quantised as {_described(config)} by config.json" if config is not None else ""
            return FormatError(f"{folder}: {quote(s.name)} ({s.file}) is {s.dtype}: codes{word}, and no tensor holds their scales", _WAY)
    return None
