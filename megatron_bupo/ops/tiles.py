"""The logits of softmax(hidden @ weight.T / temperature) tile by tile: some rows times some columns of the vocabulary.

A tile is one matrix product into a buffer. What is then computed from it is a *pass* over the tile: in torch
(torch_passes.py), or as one Triton kernel that reads the tile once (triton_passes.py). Both have the same functions.

Passes work in bits (logits times log2 e): torch.exp on the CPU takes 0.7 ns an element and 10 to 20 ns where it
underflows, as it does all over a peaked distribution, while torch.exp2 takes 0.15 and 0.6 ns.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Iterator
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bupo.ops import torch_passes

# (rows, columns) of a tile at most. CPU: two buffers of 4 MB in fp32 stay in the last-level cache; 64 rows are 12 %
# slower, more with 2 threads, and larger tiles gain nothing (benchmarks/unembedding.py). CUDA: 256 MB, measured on an
# H200 (4,096 and 14,336 rows are equally fast).
_CPU_TILE = (512, 2048)
CUDA_TILE = (4096, 16384)

_LOG2_E = math.log2(math.e)


class Passes(Protocol):
    """What is computed from a tile of products [rows, C], in fp32 or float64. In bits it is the tile times `scale`.

    `first` is the token id of the tile's first column, `targets` int64 [rows] are token ids, in the tile or not.
    `scratch` is a buffer as large as the tile, which the result may lie in until the next call. `tile` may be
    overwritten.
    """

    def reduce(self, tile: Tensor, scale: float, targets: Tensor, first: int, sums: Tensor, scratch: Tensor) -> None:
        """Add a tile to the running sums [4, rows]: the largest bits so far, top; the sum of e = 2^(bits - top); the
        sum of e * (bits - top); the bits of the target, once they are met.
        """

    def gradient(
        self,
        tile: Tensor,
        scale: float,
        targets: Tensor,
        first: int,
        columns: Tensor,
        has_slope: bool,
        scratch: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        """dz [rows, C] in `dtype`: p * (slope * log2 p + offset), plus d_target where the target is.

        `columns` [4, rows] has lse_bits, offset, slope, d_target; log2 p = bits - lse_bits. Without `has_slope` the
        slope is 0 and is not read.
        """

    def probabilities(
        self, tile: Tensor, scale: float, lse_bits: Tensor, scratch: Tensor, dtype: torch.dtype
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """p = 2^(bits - lse_bits) as a sum of one or two tensors [rows, C] in `dtype`; the largest bits of each row
        and their column, the first of several.

        bf16 has 8 bits: p is a bf16 number and the bf16 rest of it, which leaves an error of 2^-17.
        """


class Tiles:
    """The tiles of this rank's real vocabulary rows, columns outermost: a weight tile is upcast only once."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, temperature: float, vocab_size: int, group: dist.ProcessGroup | None
    ) -> None:
        self.num_ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
        self.first_id = rank * weight.shape[0]
        self.weight = weight[: max(0, vocab_size - self.first_id)]
        self.dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
        # On CUDA bf16 products are summed in fp32; everything else is upcast (fp16 too: its range is too small for dz).
        in_bf16 = hidden.is_cuda and hidden.dtype == weight.dtype == torch.bfloat16 and _has_out_dtype("mm")
        self.operand_dtype = torch.bfloat16 if in_bf16 else self.dtype
        self.hidden = hidden.to(self.operand_dtype).contiguous()
        # What makes bits of a product. The products in the compute dtype have it in them, at no cost.
        scale = _LOG2_E / temperature
        self._alpha, self.scale = (1.0, scale) if in_bf16 else (scale, 1.0)
        max_rows, max_columns = CUDA_TILE if hidden.is_cuda else _CPU_TILE
        self.max_rows, self.max_columns = min(max_rows, len(hidden)), min(max_columns, len(self.weight))
        self._buffers = torch.empty(2, self.max_rows * self.max_columns, dtype=self.dtype, device=hidden.device)
        self.scratch = self._buffers[1]
        self.passes = passes_for(hidden.device, self.dtype)

    def columns(self) -> Iterator[tuple[slice, Tensor]]:
        """(local vocabulary rows, their weights [C, H] as operands)."""
        for start in range(0, len(self.weight), max(1, self.max_columns)):
            columns = slice(start, min(start + self.max_columns, len(self.weight)))
            yield columns, self.weight[columns].to(self.operand_dtype)

    def rows(self) -> Iterator[slice]:
        for start in range(0, len(self.hidden), max(1, self.max_rows)):
            yield slice(start, min(start + self.max_rows, len(self.hidden)))

    def product(self, rows: slice, weight_tile: Tensor) -> Tensor:
        """hidden @ weight_tile.T, [rows, C]: times `scale` in bits. In a buffer that the next call overwrites."""
        hidden = self.hidden[rows]
        tile = self._buffers[0, : len(hidden) * len(weight_tile)].view(len(hidden), len(weight_tile))
        if hidden.dtype == self.dtype:
            return tile.addmm_(hidden, weight_tile.t(), beta=0, alpha=self._alpha)
        return torch.mm(hidden, weight_tile.t(), out_dtype=self.dtype, out=tile)


def has_triton(device: torch.device) -> bool:
    """Whether Triton's kernels run on this device."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def passes_for(device: torch.device, dtype: torch.dtype) -> Passes:
    """Triton's kernels on a GPU for fp32 tiles, torch elsewhere."""
    if dtype == torch.float32 and has_triton(device):
        from megatron_bupo.ops import triton_passes

        return triton_passes
    return torch_passes


def add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out += left @ right, summed in out's dtype."""
    if left.dtype == out.dtype:
        out.addmm_(left, right)
    elif _has_out_dtype("addmm"):
        torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
    else:
        out.add_(torch.mm(left, right, out_dtype=out.dtype))


@functools.cache
def _has_out_dtype(product: str) -> bool:
    """Whether torch can sum this bf16 product in fp32 and return it so (CUDA from torch 2.8 on, not ROCm)."""
    return torch.version.hip is None and "dtype_out" in getattr(torch.ops.aten, product).overloads()
