"""Log-probability and entropy of softmax(hidden @ weight.T / temperature), vocabulary-parallel and never dense.

One [R, V] tensor of logits at R = 16k, V = 152k is 10 GB in fp32, and a dense log-softmax with entropy keeps several.
Here tiles (some rows x some vocabulary columns, tiles.py) pass through one small buffer: the forward reduces them with
an online softmax (running max, sum of exp, sum of exp times logit), the backward computes them again from the saved
log-sum-exp and entropy of each row. The price is one product more than the dense way has (four instead of three).

Shapes: R response rows, H hidden, V real vocabulary, V_local rows of the padded vocabulary on one rank.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_bupo.ops.tiles import Tiles, add_product
from megatron_bupo.ops.torch_passes import move_top

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
    """
    assert 0.0 < temperature < math.inf, temperature
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
        tiles = Tiles(hidden, weight, ctx.temperature, ctx.vocab_size, ctx.group)
        d_hidden = d_weight = None
        if ctx.needs_input_grad[0]:
            d_hidden = torch.zeros(hidden.shape, dtype=tiles.dtype, device=hidden.device)
        if ctx.needs_input_grad[1]:
            d_weight = torch.zeros_like(weight, memory_format=torch.contiguous_format)
        if d_logprobs is None:
            d_logprobs = torch.zeros_like(lse_bits)

        # With z = logits / T: dz = d_logprobs * (onehot - p) - d_entropy * p * (log p + entropy)
        #                         = d_logprobs * onehot + p * (slope * log2 p + offset)
        has_slope = d_entropy is not None
        offset = -d_logprobs if d_entropy is None else -(d_logprobs + d_entropy * entropy)
        slope = offset if d_entropy is None else -_LN_2 * d_entropy
        # The products are with logits, not with logits / T: divided here, where it is [R].
        columns = torch.stack([lse_bits, *(column / ctx.temperature for column in (offset, slope, d_logprobs))])
        for vocab, weight_tile in tiles.columns():
            d_weight_tile = None if d_weight is None else d_weight[vocab].to(tiles.dtype)  # a view, or zeros to fill
            for rows in tiles.rows():
                dz = tiles.passes.gradient(
                    tiles.product(rows, weight_tile),
                    tiles.scale,
                    targets[rows],
                    tiles.first_id + vocab.start,
                    columns[:, rows],
                    has_slope,
                    tiles.scratch,
                    tiles.operand_dtype,
                )
                if d_hidden is not None:
                    add_product(d_hidden[rows], dz, weight_tile)
                if d_weight_tile is not None:
                    add_product(d_weight_tile, dz.t(), tiles.hidden[rows])
            if d_weight is not None and d_weight_tile is not None and d_weight.dtype != tiles.dtype:
                d_weight[vocab] = d_weight_tile
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
    tiles = Tiles(hidden, weight, temperature, vocab_size, group)
    sums = torch.zeros(4, len(targets), dtype=tiles.dtype, device=hidden.device)
    # The lowest finite number and not -inf, so that neither the first tile nor a rank without real rows gives 0 * inf.
    sums[0] = torch.finfo(tiles.dtype).min
    for vocab, weight_tile in tiles.columns():
        for rows in tiles.rows():
            tile, first = tiles.product(rows, weight_tile), tiles.first_id + vocab.start
            tiles.passes.reduce(tile, tiles.scale, targets[rows], first, sums[:, rows], tiles.scratch)
    if tiles.num_ranks > 1 and len(targets) > 0:
        group_top = sums[0].clone()
        dist.all_reduce(group_top, dist.ReduceOp.MAX, group=group)
        move_top(sums, group_top)
        dist.all_reduce(sums[1:], group=group)
    top, total, weighted, target_bits = sums
    log2_sum = total.log2()
    return RowStatistics(top + log2_sum, target_bits, top, (log2_sum - weighted / total).mul_(_LN_2))


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
    tiles = Tiles(hidden, weight, 1.0, vocab_size, group)
    expected = torch.zeros(hidden.shape, dtype=tiles.dtype, device=hidden.device)
    top = torch.full(lse_bits.shape, torch.finfo(tiles.dtype).min, dtype=tiles.dtype, device=hidden.device)
    token = torch.full(lse_bits.shape, vocab_size, dtype=torch.int64, device=hidden.device)
    for vocab, weight_tile in tiles.columns():
        for rows in tiles.rows():
            parts, tile_top, column = tiles.passes.probabilities(
                tiles.product(rows, weight_tile), tiles.scale, lse_bits[rows], tiles.scratch, tiles.operand_dtype
            )
            token[rows] = torch.where(tile_top > top[rows], column + tiles.first_id + vocab.start, token[rows])
            torch.maximum(top[rows], tile_top, out=top[rows])
            for part in parts:
                add_product(expected[rows], part, weight_tile)
    if tiles.num_ranks > 1 and len(lse_bits) > 0:
        group_top = top.clone()
        dist.all_reduce(group_top, dist.ReduceOp.MAX, group=group)
        token.masked_fill_(top < group_top, vocab_size)
        dist.all_reduce(token, dist.ReduceOp.MIN, group=group)
        dist.all_reduce(expected, group=group)
    return Expectation(expected, token)
