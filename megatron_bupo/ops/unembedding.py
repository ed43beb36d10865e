"""Log-probability and entropy of softmax(hidden @ weight.T / temperature), vocabulary-parallel and never dense.

One [R, V] tensor of logits at R = 16k, V = 152k is 10 GB in fp32, and a dense log-softmax with entropy keeps several.
Here tiles (some rows x some vocabulary columns) pass through one small buffer: the forward reduces them with an online
softmax (running max, sum of exp, sum of exp times logit), the backward computes them again from the saved
log-sum-exp and entropy of each row. The price is one product more than the dense way has (four instead of three).

Inside, logits are in bits (times log2 e, folded into the product): torch.exp on the CPU takes 0.7 ns an element and 10
to 20 ns where it underflows, as it does all over a peaked distribution, while torch.exp2 takes 0.15 and 0.6 ns.
Shapes: R response rows, H hidden, V real vocabulary, V_local rows of the padded vocabulary on one rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_bupo.errors import UsageError

# (rows, columns) of a tile at most. CPU: two buffers of 4 MB in fp32 stay in the last-level cache; 64 rows are 12 %
# slower, more with 2 threads, and larger tiles gain nothing (benchmarks/unembedding.py). CUDA: 256 MB, so that launches
# and reading the operands again are negligible (by arithmetic: not measured on a GPU).
_CPU_TILE = (512, 2048)
_CUDA_TILE = (4096, 16384)

_LOG2_E = math.log2(math.e)
_LN_2 = math.log(2.0)


class RowStatistics(NamedTuple):
    """Per row, over the whole real vocabulary, in the compute dtype (fp32, or float64 for float64 inputs)."""

    lse_bits: Tensor  # [R] log2 of the sum of exp(logits / T)
    target_bits: Tensor  # [R] the target's logit / T, times log2 e
    top_bits: Tensor  # [R] the largest logit / T, times log2 e
    entropy: Tensor  # [R] nats


class Expectation(NamedTuple):
    """Per row, under p = softmax(hidden @ weight.T)."""

    embedding: Tensor  # [R, H] sum over the vocabulary of p times the rows of weight, in the compute dtype
    top_token: Tensor  # int64 [R] the most likely token, the lowest id where several are


def logprob_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs of the targets and entropies of softmax(hidden @ weight.T / temperature), both differentiable.

    Args:
        hidden: [R, H], the same on every rank of `group`; R may be 0. A 2-D tensor: select the rows first.
        weight: [V_local, H]: rows [rank * V_local, (rank + 1) * V_local) of the padded unembedding matrix. Rows whose
            global number is >= `vocab_size` are padding: never read, gradient zero. A rank may hold nothing else.
        targets: int64 [R], global token ids in [0, vocab_size), the same on every rank.
        temperature: divides the logits; also for the entropy.
        vocab_size: number of real vocabulary entries, V.
        group: the tensor-parallel group, or None for one rank. Two all-reduces per call (the max, then the sums), none
            in the backward.

    Returns:
        Log-probs [R] and entropies [R] over the real vocabulary in nats, fp32 (float64 if an input is float64).

    The gradient of `hidden` is THIS RANK'S PARTIAL one: the caller sums it over the group, in exactly one place (the
    region function through which `hidden` came). The gradient of `weight` is complete for its rows. Softmax and both
    accumulations are in fp32 whatever the inputs' dtype; gradients are cast to it at the end.

    Raises:
        UsageError: temperature is not a positive number.
    """
    if not 0.0 < temperature < math.inf:
        raise UsageError(f"temperature {temperature} is not a positive number; give one above 0, for example 1.0")
    ranks = 1 if group is None else group.size()
    assert hidden.dim() == 2 and weight.dim() == 2 and hidden.shape[1] == weight.shape[1], (hidden.shape, weight.shape)
    assert targets.shape == hidden.shape[:1] and targets.dtype == torch.int64, (targets.shape, targets.dtype)
    assert 0 < vocab_size <= ranks * weight.shape[0], (vocab_size, ranks, weight.shape)
    if targets.device.type == "cpu" and targets.numel() > 0:  # on a GPU the check would wait for the device
        low, high = targets.min().item(), targets.max().item()
        assert low >= 0 and high < vocab_size, f"targets from {low} to {high} with a vocabulary of {vocab_size}"
    return _LogprobAndEntropy.apply(hidden, weight, targets, temperature, vocab_size, group)


class _LogprobAndEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        vocab_size: int,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]:
        rows = row_statistics(hidden, weight, targets, temperature=temperature, vocab_size=vocab_size, group=group)
        ctx.set_materialize_grads(False)  # an output that takes no part in the loss costs nothing in the backward
        ctx.save_for_backward(hidden, weight, targets, rows.lse_bits, rows.entropy)
        ctx.temperature, ctx.vocab_size, ctx.group = temperature, vocab_size, group
        return (rows.target_bits - rows.lse_bits).mul_(_LN_2), rows.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logprobs: Tensor | None, d_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, lse_bits, entropy = ctx.saved_tensors
        if d_logprobs is None and d_entropy is None:
            return (None,) * 6
        tiles = _Tiles(hidden, weight, ctx.temperature, ctx.vocab_size, ctx.group)
        d_hidden = d_weight = None
        if ctx.needs_input_grad[0]:
            d_hidden = torch.zeros(hidden.shape, dtype=tiles.dtype, device=hidden.device)
        if ctx.needs_input_grad[1]:
            d_weight = torch.zeros_like(weight, memory_format=torch.contiguous_format)
        if d_logprobs is None:
            d_logprobs = torch.zeros_like(lse_bits)

        # With z = logits / T: dz = d_logprobs * (onehot - p) - d_entropy * p * (log p + entropy)
        #                         = d_logprobs * onehot + p * (slope * log2 p + offset)
        offset = -d_logprobs if d_entropy is None else -(d_logprobs + d_entropy * entropy)
        slope = None if d_entropy is None else -_LN_2 * d_entropy
        for columns, weight_tile in tiles.columns():
            d_weight_tile = None if d_weight is None else d_weight[columns].to(tiles.dtype)  # a view, or zeros to fill
            for rows in tiles.rows():
                log2_p = tiles.logits_in_bits(rows, weight_tile).sub_(lse_bits[rows, None])
                dz = tiles.exp2(log2_p)
                if slope is None:
                    dz.mul_(offset[rows, None])
                else:
                    dz.mul_(log2_p.mul_(slope[rows, None]).add_(offset[rows, None]))
                index, is_here = tiles.find(targets[rows], columns)
                dz.scatter_add_(1, index, torch.where(is_here, d_logprobs[rows, None], 0))
                dz = dz.to(tiles.operand_dtype)
                if d_hidden is not None:
                    _add_product(d_hidden[rows], dz, weight_tile, 1 / ctx.temperature)
                if d_weight_tile is not None:
                    _add_product(d_weight_tile, dz.t(), tiles.hidden[rows], 1 / ctx.temperature)
            if d_weight is not None and d_weight_tile is not None and d_weight.dtype != tiles.dtype:
                d_weight[columns] = d_weight_tile
        return None if d_hidden is None else d_hidden.to(hidden.dtype), d_weight, None, None, None, None


def row_statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    vocab_size: int,
    group: dist.ProcessGroup | None,
) -> RowStatistics:
    """Log-sum-exp, target logit and entropy of every row, the same on every rank; arguments as in the public function.

    Not differentiable itself, and nothing of it is [R, V].
    """
    tiles = _Tiles(hidden, weight, temperature, vocab_size, group)
    # The lowest finite number and not -inf, so that neither the first tile nor a rank without real rows gives 0 * inf.
    top = torch.full(targets.shape, torch.finfo(tiles.dtype).min, dtype=tiles.dtype, device=hidden.device)
    # Per row, with e = 2^(bits - top): sum of e, sum of e * (bits - top), and the target's bits (0 on other ranks).
    sums = torch.zeros(3, len(targets), dtype=tiles.dtype, device=hidden.device)
    for columns, weight_tile in tiles.columns():
        for rows in tiles.rows():
            bits = tiles.logits_in_bits(rows, weight_tile)
            index, is_here = tiles.find(targets[rows], columns)
            sums[2, rows] += torch.where(is_here, bits.gather(1, index), 0)[:, 0]
            new_top = torch.maximum(top[rows], bits.amax(1))
            _move_top(sums[:, rows], top[rows], new_top)
            bits.sub_(new_top[:, None])
            exp_bits = tiles.exp2(bits)
            sums[0, rows] += exp_bits.sum(1)
            sums[1, rows] += bits.mul_(exp_bits).sum(1)
    if tiles.num_ranks > 1 and len(targets) > 0:
        group_top = top.clone()
        dist.all_reduce(group_top, dist.ReduceOp.MAX, group=group)
        _move_top(sums, top, group_top)
        dist.all_reduce(sums, group=group)
    log2_sum = sums[0].log2()
    return RowStatistics(top + log2_sum, sums[2], top, (log2_sum - sums[1] / sums[0]).mul_(_LN_2))


def expectation(
    hidden: Tensor, weight: Tensor, lse_bits: Tensor, *, vocab_size: int, group: dist.ProcessGroup | None
) -> Expectation:
    """The expected row of `weight` and the most likely token under softmax(hidden @ weight.T), the same on every rank.

    The cross entropy of any other policy softmax(h @ weight.T) relative to this one, its divergence therefore, needs of
    this one no more than the expected row: E[h . w] = h . E[w].

    Args:
        lse_bits: [R] of the same hidden states and weight at temperature 1, from `row_statistics`; the other
            arguments as there. Not differentiable.
    """
    tiles = _Tiles(hidden, weight, 1.0, vocab_size, group)
    expected = torch.zeros(hidden.shape, dtype=tiles.dtype, device=hidden.device)
    top = torch.full(lse_bits.shape, torch.finfo(tiles.dtype).min, dtype=tiles.dtype, device=hidden.device)
    token = torch.full(lse_bits.shape, vocab_size, dtype=torch.int64, device=hidden.device)
    for columns, weight_tile in tiles.columns():
        wide_weight_tile = weight_tile.to(tiles.dtype)
        for rows in tiles.rows():
            bits = tiles.logits_in_bits(rows, weight_tile)
            tile_top, index = bits.max(dim=1)
            token[rows] = torch.where(tile_top > top[rows], index + tiles.first_id + columns.start, token[rows])
            torch.maximum(top[rows], tile_top, out=top[rows])
            # In the compute dtype also where the logits are products of bf16: p in 8 bits would be off by 0.4 %.
            expected[rows].addmm_(tiles.exp2(bits.sub_(lse_bits[rows, None])), wide_weight_tile)
    if tiles.num_ranks > 1 and len(lse_bits) > 0:
        group_top = top.clone()
        dist.all_reduce(group_top, dist.ReduceOp.MAX, group=group)
        token.masked_fill_(top < group_top, vocab_size)
        dist.all_reduce(token, dist.ReduceOp.MIN, group=group)
        dist.all_reduce(expected, group=group)
    return Expectation(expected, token)


def _move_top(sums: Tensor, top: Tensor, new_top: Tensor) -> None:
    """Rebases the first two of the sums [3, R] from `top` [R] to `new_top` [R], and `top` with them, in place."""
    shift = top - new_top
    sums[1].add_(sums[0] * shift)
    sums[:2].mul_(shift.exp2())
    top.copy_(new_top)


class _Tiles:
    """The tiles of logits of this rank's real vocabulary rows, columns outermost: a weight tile is upcast only once."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, temperature: float, vocab_size: int, group: dist.ProcessGroup | None
    ) -> None:
        self.num_ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
        self.first_id = rank * weight.shape[0]
        self.weight = weight[: max(0, vocab_size - self.first_id)]
        self.dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
        # On CUDA bf16 products are summed in fp32; everything else is upcast (fp16 too: its range is too small for dz).
        in_bf16 = hidden.is_cuda and hidden.dtype == weight.dtype == torch.bfloat16 and _has_mm_out_dtype()
        self.operand_dtype = torch.bfloat16 if in_bf16 else self.dtype
        self.hidden = hidden.to(self.operand_dtype).contiguous()
        self.scale = _LOG2_E / temperature
        max_rows, max_columns = _CUDA_TILE if hidden.is_cuda else _CPU_TILE
        self.max_rows, self.max_columns = min(max_rows, len(hidden)), min(max_columns, len(self.weight))
        self.buffers = torch.empty(2, self.max_rows * self.max_columns, dtype=self.dtype, device=hidden.device)

    def columns(self) -> Iterator[tuple[slice, Tensor]]:
        """(local vocabulary rows, their weights [C, H] as operands)."""
        for start in range(0, len(self.weight), max(1, self.max_columns)):
            columns = slice(start, min(start + self.max_columns, len(self.weight)))
            yield columns, self.weight[columns].to(self.operand_dtype)

    def rows(self) -> Iterator[slice]:
        for start in range(0, len(self.hidden), max(1, self.max_rows)):
            yield slice(start, min(start + self.max_rows, len(self.hidden)))

    def logits_in_bits(self, rows: slice, weight_tile: Tensor) -> Tensor:
        """[rows, C]: logits / T * log2 e, in a buffer that the next call overwrites."""
        hidden = self.hidden[rows]
        bits = self.buffers[0, : len(hidden) * len(weight_tile)].view(len(hidden), len(weight_tile))
        if hidden.dtype == self.dtype:
            return bits.addmm_(hidden, weight_tile.t(), beta=0, alpha=self.scale)
        torch.mm(hidden, weight_tile.t(), out_dtype=self.dtype, out=bits)
        return bits.mul_(self.scale)

    def exp2(self, bits: Tensor) -> Tensor:
        """2^bits, in a buffer that the next call overwrites."""
        return torch.exp2(bits, out=self.buffers[1, : bits.numel()].view(bits.shape))

    def find(self, targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
        """Index [rows, 1] of each target in the tile (some valid index if it is not there), and whether it is there."""
        index = targets[:, None] - (self.first_id + columns.start)
        width = columns.stop - columns.start
        return index.clamp(0, width - 1), (index >= 0) & (index < width)


def _add_product(out: Tensor, left: Tensor, right: Tensor, alpha: float) -> None:
    """out += alpha * left @ right, in out's dtype."""
    if left.dtype == out.dtype:
        out.addmm_(left, right, alpha=alpha)
    else:
        out.add_(torch.mm(left, right, out_dtype=out.dtype), alpha=alpha)


def _has_mm_out_dtype() -> bool:
    """Whether torch can sum a bf16 product in fp32 and return it so (CUDA from torch 2.8 on, not ROCm)."""
    return torch.version.hip is None and "dtype" in torch.ops.aten.mm.overloads()
