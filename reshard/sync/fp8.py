"""Quantising to FP8 (E4M3) by square blocks, as DeepSeek's checkpoints are: value ≈ fp8 · scale, scale = largest / 448."""

import torch

from reshard.sync.fp8_blocks import Blocks

MAX = 448.0  # of float8_e4m3fn


def quantise(weight: torch.Tensor, blocks: Blocks) -> tuple[torch.Tensor, torch.Tensor]:
    """`weight` (any shape, row-major rows × columns) as (fp8 of its shape, fp32 scales [grid rows, grid columns])."""
    edge, (rows, columns) = blocks.edge, blocks.grid
    padded = torch.zeros(rows * edge, columns * edge, dtype=torch.float32, device=weight.device)
    padded[: blocks.rows, : blocks.columns] = weight.reshape(blocks.rows, blocks.columns)
    tiles = padded.view(rows, edge, columns, edge)
    # by a tensor of that device: CUDA divides by a Python number as a product with its reciprocal, which gives other bits
    scales = tiles.abs().amax(dim=(1, 3)) / torch.full((1,), MAX, dtype=torch.float32, device=weight.device)
    scales = torch.where(scales == 0, 1.0, scales)
    tiles = (tiles / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    return tiles.view(rows * edge, columns * edge)[: blocks.rows, : blocks.columns].reshape(weight.shape), scales
