"""The passes over a tile of logits (tiles.Passes) in torch: for the CPU, and as the reference of the Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor


def reduce(tile: Tensor, scale: float, targets: Tensor, first: int, sums: Tensor, scratch: Tensor) -> None:
    bits = _in_bits(tile, scale)
    top, total, weighted, target_bits = sums
    index, is_here = _find(targets, first, tile.shape[1])
    target_bits += torch.where(is_here, bits.gather(1, index), 0)[:, 0]
    move_top(sums, torch.maximum(top, bits.amax(1)))
    bits.sub_(top[:, None])
    exp_bits = _exp2(bits, scratch)
    total += exp_bits.sum(1)
    weighted += bits.mul_(exp_bits).sum(1)


def gradient(
    tile: Tensor,
    scale: float,
    targets: Tensor,
    first: int,
    columns: Tensor,
    has_slope: bool,
    scratch: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    lse_bits, offset, slope, d_target = columns[:, :, None]
    log2_p = _in_bits(tile, scale).sub_(lse_bits)
    dz = _exp2(log2_p, scratch)
    dz.mul_(log2_p.mul_(slope).add_(offset) if has_slope else offset)
    index, is_here = _find(targets, first, tile.shape[1])
    dz.scatter_add_(1, index, torch.where(is_here, d_target, 0))
    return dz.to(dtype)


def probabilities(
    tile: Tensor, scale: float, lse_bits: Tensor, scratch: Tensor, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor, Tensor]:
    bits = _in_bits(tile, scale)
    top, column = bits.max(dim=1)
    p = _exp2(bits.sub_(lse_bits[:, None]), scratch)
    if dtype == p.dtype:
        return [p], top, column
    high = p.to(dtype)
    return [high, p.sub_(high).to(dtype)], top, column


def move_top(sums: Tensor, new_top: Tensor) -> None:
    """Refer running sums [4, rows] (see tiles.Passes.reduce) to another `top` [rows], in place."""
    top, total, weighted, _ = sums
    shift = top - new_top
    weighted.add_(total * shift)
    sums[1:3].mul_(shift.exp2())
    top.copy_(new_top)


def _in_bits(tile: Tensor, scale: float) -> Tensor:
    return tile if scale == 1.0 else tile.mul_(scale)


def _exp2(bits: Tensor, scratch: Tensor) -> Tensor:
    return torch.exp2(bits, out=scratch[: bits.numel()].view(bits.shape))


def _find(targets: Tensor, first: int, width: int) -> tuple[Tensor, Tensor]:
    """Index [rows, 1] of each target in the tile (some valid index if it is not there), and whether it is there."""
    index = targets[:, None] - first
    return index.clamp(0, width - 1), (index >= 0) & (index < width)
