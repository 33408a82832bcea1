"""Codes and scales as the weights that they stand for, computed rank by rank from what the rank itself holds.

Written from the schemes' formulas alone: what this judges must not share its rules. FP8 (blocks, rows, one scale), MXFP8 and MXFP4.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from reshard.errors import FormatError
from reshard.foreign import quote
from reshard.formats.pieces import Piece

#: values of 4-bit codes (E2M1). Source: OCP Microscaling Formats specification, 5.3.3
_E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
#: how codes end, how the scales beside them, and how the weight would
_SUFFIXES = (("_blocks", "_scales", ""), ("_packed", "_scale", ""), ("", "_scale_inv", ""), ("", "_scale", ""))


def block_of(folder: Path) -> int:
    """Rows of a block of scales, as config.json tells; 128 where it does not."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return 128
    found = config.get("quantization_config") if isinstance(config, dict) else None
    size = found.get("weight_block_size") if isinstance(found, dict) else None
    return size[0] if isinstance(size, list) and size and type(size[0]) is int and size[0] > 0 else 128


def paired(pieces: Iterable[Piece]) -> Iterator[tuple[Piece, Piece | None, Piece | None]]:
    """The pieces of one rank as (what a weight looks like, its codes, its scales); what is not quantised with None and None."""
    by_name = {piece.name: piece for piece in pieces}
    scales: set[str] = set()
    out: list[tuple[Piece, Piece | None, Piece | None]] = []
    for name, piece in by_name.items():
        found = next(
            (
                (base, by_name[base + scale], code)
                for code, scale, _ in _SUFFIXES
                if piece.dtype in ("F8_E4M3", "U8") and name.endswith(code) and (base := name.removesuffix(code)) + scale in by_name
            ),
            None,
        )
        if found is None:
            out.append((piece, None, None))
            continue
        base, scale, code = found
        scales.add(scale.name)
        shape = piece.shape
        if code == "_blocks":  # groups and their bytes apart, output first: weights of these modules have the input first
            shape = (*shape[:-3], 2 * shape[-2] * shape[-1], shape[-3])
        elif piece.dtype == "U8":
            shape = (*shape[:-1], 2 * shape[-1])
        out.append((piece._replace(name=base, dtype="BF16", shape=shape), piece, scale))
    return (each for each in out if each[0].name not in scales)


def weight(codes: torch.Tensor, scale: torch.Tensor, block: int, name: str) -> torch.Tensor:
    """The weight in fp32, rounded to bf16 as engines and converters round it: [*, out, in]; input first where groups and bytes are apart."""
    turned = codes.dtype == torch.uint8 and codes.dim() == scale.dim() + 1
    values = codes.flatten(-2) if turned else codes
    if values.dtype == torch.uint8:
        table = torch.tensor([*_E2M1, *(-value for value in _E2M1)])
        values = torch.stack([table[(values & 15).long()], table[(values >> 4).long()]], -1).flatten(-2)
    values = values.float()
    if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
        scale = torch.exp2(scale.view(torch.uint8).float() - 127)
    scale = scale.float()
    if scale.dim() == 4 and values.dim() == 2:  # two of four dimensions are 1
        scale = scale.reshape(scale.shape[0], scale.shape[2])
    if scale.dim() < 2:
        if scale.numel() not in (1, values.shape[0]):
            raise FormatError(f"{quote(name)}: {scale.numel()} scales for its parts: verify does not know where these end")
        scale = scale.reshape(-1, 1)
    rows, columns = (_edge(values.shape[dim], scale.shape[dim], block, name) for dim in (-2, -1))
    spread = scale.repeat_interleave(rows, -2)[..., : values.shape[-2], :].repeat_interleave(columns, -1)[..., : values.shape[-1]]
    made = (values * spread).bfloat16()
    return made.transpose(-1, -2) if turned else made


def _edge(size: int, count: int, block: int, name: str) -> int:
    """How many elements share a scale, where `count` scales are for `size`: blocks, or finer ones of an engine's experts."""
    for edge in (size if count == 1 else 0, block, block // 2, block // 4):
        if edge and -(-size // edge) == count:
            return edge
    if size % count:
        raise FormatError(f"{quote(name)}: {count} scales for {size} elements: no size of blocks fits")
    return size // count
