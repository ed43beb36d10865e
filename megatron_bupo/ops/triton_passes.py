"""The passes over a tile of logits (tiles.Passes) as Triton kernels: each reads the tile once.

Composed of torch's operations a pass reads and writes the tile seven times, and takes longer than the product that made
it. TRITON_INTERPRET=1 runs the kernels on the CPU: so they are compared with torch_passes where there is no GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096  # columns that a program holds at once
_WARPS = 8


@triton.jit
def _reduce_kernel(tile, scale, targets, first, sums, stride, num_columns, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program a row; it goes over the columns with the running maximum and sums in registers."""
    row = tl.program_id(0)
    logits = tile + row.to(tl.int64) * num_columns
    top = tl.load(sums + row)
    total = tl.load(sums + stride + row)
    weighted = tl.load(sums + 2 * stride + row)
    for start in range(0, num_columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < num_columns
        bits = tl.load(logits + at, mask=inside, other=float("-inf")) * scale
        new_top = tl.maximum(top, tl.max(bits, 0))
        shift = top - new_top
        factor = tl.exp2(shift)
        weighted = (weighted + total * shift) * factor
        below = bits - new_top
        exp_bits = tl.exp2(below)
        total = total * factor + tl.sum(exp_bits, 0)
        weighted += tl.sum(tl.where(inside, below * exp_bits, 0.0), 0)  # outside it is -inf * 0
        top = new_top
    index = tl.load(targets + row) - first
    if (index >= 0) & (index < num_columns):
        tl.store(sums + 3 * stride + row, tl.load(logits + index) * scale)
    tl.store(sums + row, top)
    tl.store(sums + stride + row, total)
    tl.store(sums + 2 * stride + row, weighted)


@triton.jit
def _gradient_kernel(  # type: ignore[no-untyped-def]
    tile, scale, targets, first, columns, stride, dz, num_columns, HAS_SLOPE: tl.constexpr, BLOCK: tl.constexpr
):
    """One program a row and block of columns."""
    row = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_columns
    place = row.to(tl.int64) * num_columns + at
    log2_p = tl.load(tile + place, mask=inside, other=0.0) * scale - tl.load(columns + row)
    factor = tl.load(columns + stride + row)
    if HAS_SLOPE:
        factor += log2_p * tl.load(columns + 2 * stride + row)
    result = tl.exp2(log2_p) * factor
    is_target = at + first == tl.load(targets + row)
    result = tl.where(is_target, result + tl.load(columns + 3 * stride + row), result)
    tl.store(dz + place, result.to(dz.dtype.element_ty), mask=inside)


@triton.jit
def _probabilities_kernel(  # type: ignore[no-untyped-def]
    tile, scale, lse_bits, high, low, top, column, num_columns, HAS_LOW: tl.constexpr, BLOCK: tl.constexpr
):
    """One program a row."""
    row = tl.program_id(0)
    begin = row.to(tl.int64) * num_columns
    lse = tl.load(lse_bits + row)
    best = tl.full((), float("-inf"), tl.float32)
    best_column = tl.full((), 0, tl.int64)
    for start in range(0, num_columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < num_columns
        bits = tl.load(tile + begin + at, mask=inside, other=float("-inf")) * scale
        block_best = tl.max(bits, 0)
        best_column = tl.where(block_best > best, start + tl.argmax(bits, 0, tie_break_left=True), best_column)
        best = tl.maximum(best, block_best)
        p = tl.exp2(bits - lse)
        p_high = p.to(high.dtype.element_ty)
        tl.store(high + begin + at, p_high, mask=inside)
        if HAS_LOW:
            tl.store(low + begin + at, (p - p_high.to(tl.float32)).to(low.dtype.element_ty), mask=inside)
    tl.store(top + row, best)
    tl.store(column + row, best_column)


def reduce(tile: Tensor, scale: float, targets: Tensor, first: int, sums: Tensor, scratch: Tensor) -> None:
    num_rows, num_columns = tile.shape
    arguments = (tile, scale, targets, first, sums, sums.stride(0), num_columns)
    _reduce_kernel[(num_rows,)](*arguments, **_launch(num_columns))


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
    num_rows, num_columns = tile.shape
    dz = _halves(scratch, tile.shape, dtype)[0]
    launch = _launch(num_columns)
    grid = (num_rows, triton.cdiv(num_columns, launch["BLOCK"]))
    arguments = (tile, scale, targets, first, columns, columns.stride(0), dz, num_columns)
    _gradient_kernel[grid](*arguments, HAS_SLOPE=has_slope, **launch)
    return dz


def probabilities(
    tile: Tensor, scale: float, lse_bits: Tensor, scratch: Tensor, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor, Tensor]:
    num_rows, num_columns = tile.shape
    top = torch.empty(num_rows, dtype=torch.float32, device=tile.device)
    column = torch.empty(num_rows, dtype=torch.int64, device=tile.device)
    parts = _halves(scratch, tile.shape, dtype)
    arguments = (tile, scale, lse_bits, parts[0], parts[-1], top, column, num_columns)
    _probabilities_kernel[(num_rows,)](*arguments, HAS_LOW=len(parts) > 1, **_launch(num_columns))
    return parts, top, column


def _halves(scratch: Tensor, shape: torch.Size, dtype: torch.dtype) -> list[Tensor]:
    """The scratch buffer as a tensor of the tile's shape, or as two in a dtype of half its size."""
    count, size = scratch.element_size() // dtype.itemsize, shape.numel()
    return [part.view(shape) for part in scratch.view(dtype)[: count * size].split(size)]


def _launch(num_columns: int) -> dict[str, Any]:
    return {"BLOCK": min(_BLOCK, triton.next_power_of_2(num_columns)), "num_warps": _WARPS}
