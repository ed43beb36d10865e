"""The entropy flow of one micro-batch: the policies of every layer measured at once, each stage its own layers'.

The cost is the unembedding of 5 L + 2 states; the forward itself is a few percent of it. So W goes to all stages once
(`UnembeddingEverywhere`), each stage reduces its own layers to numbers per row, and only numbers travel back. To
compare a policy with the full one the last stage sends the expected row of W under the full policy (two products more)
and its most likely token: with those, KL and top-1 agreement cost no further product in any layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from megatron_bupo.model.build import HiddenStateModel
from megatron_bupo.model.capture import LayerStates
from megatron_bupo.model.policy import unembedding_weight
from megatron_bupo.ops.unembedding import RowStatistics, expectation, row_statistics
from megatron_bupo.parallel.setup import ParallelState

_LN_2 = math.log(2.0)
# The columns that a stage computes for a layer, in this order.
_ENTROPIES = ("resid", "attn", "ffn", "attn_in", "ffn_in")
_NORM_ENTROPIES = ("resid@norm", "attn@norm", "ffn@norm")
_OTHERS = ("cos_attn", "cos_ffn", "resid_norm", "kl_full", "top1_full")


@dataclass(frozen=True)
class TokenFlow:
    """What the entropy flow has of R rows of L layers, in nats, fp32 on every rank of the pipeline.

    `layers` has the names of analysis/flow_file.py with [L, R] each; the rest is [R]: entropy and L2 norm of the
    embedding's residual stream H_0, entropy of the full policy.
    """

    layers: dict[str, Tensor]
    embedding_resid: Tensor
    embedding_norm: Tensor
    full: Tensor


@dataclass(frozen=True)
class _Full:
    """The numbers of the full policy at R rows that a comparison with it needs."""

    embedding: Tensor  # [R, H] the expected row of W
    entropy: Tensor  # [R]
    top_token: Tensor  # int64 [R]


class UnembeddingEverywhere:
    """W and the final norm on every pipeline stage. Collective over the pipeline: one broadcast of [V_local, H]."""

    def __init__(self, chunks: Sequence[HiddenStateModel], state: ParallelState, vocab_size: int) -> None:
        config = chunks[0].config
        self._state, self._vocab_size, self._eps = state, vocab_size, config.layernorm_epsilon
        weight = norm = None
        if state.is_last_stage:
            weight = unembedding_weight(chunks[-1]).detach()
            norm = chunks[-1].decoder.final_layernorm.weight.detach()
        rows = torch.tensor(0 if weight is None else len(weight), device=state.device)
        num_rows = int(self.from_stage(-1, rows, (), torch.int64))
        self._weight = self.from_stage(-1, weight, (num_rows, config.hidden_size), config.params_dtype)
        self._norm = self.from_stage(-1, norm, (config.hidden_size,), config.params_dtype)
        numbers = [layer.layer_number for chunk in chunks for layer in chunk.decoder.layers]
        self._order = torch.cat(self._from_all_stages(torch.tensor(numbers, device=state.device))).argsort()

    def from_stage(self, stage: int, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """On every stage, the tensor that the first (0) or the last (-1) one has."""
        ranks = dist.get_process_group_ranks(self._state.pp_group)
        if len(ranks) == 1:
            assert tensor is not None
            return tensor
        if dist.get_rank() == ranks[stage]:
            assert tensor is not None and tensor.shape == shape and tensor.dtype == dtype, (tensor, shape, dtype)
            received = tensor.contiguous()
        else:
            received = torch.empty(shape, dtype=dtype, device=self._state.device)
        dist.broadcast(received, ranks[stage], group=self._state.pp_group)
        return received

    def by_layer(self, tensor: Tensor) -> Tensor:
        """[L, ...] of all stages on every stage, from the [L_local, ...] of each."""
        return torch.cat(self._from_all_stages(tensor))[self._order]

    def _from_all_stages(self, tensor: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(tensor) for _ in range(self._state.pp_size)]
        dist.all_gather(parts, tensor.contiguous(), group=self._state.pp_group)
        return parts

    def statistics(self, rows: Tensor, targets: Tensor) -> RowStatistics:
        """Of softmax(rows W^T) for rows [N, H], with the logits of `targets` int64 [N]."""
        size, group = self._vocab_size, self._state.tp_group
        return row_statistics(rows, self._weight, targets, temperature=1.0, vocab_size=size, group=group)

    def full_policy(self, rows: Tensor) -> _Full:
        """The full policy from its normed states [R, H]; on the last stage."""
        statistics = self.statistics(rows, torch.zeros(len(rows), dtype=torch.int64, device=rows.device))
        size, group = self._vocab_size, self._state.tp_group
        expected = expectation(rows, self._weight, statistics.lse_bits, vocab_size=size, group=group)
        return _Full(expected.embedding, statistics.entropy, expected.top_token)

    def final_norm(self, rows: Tensor) -> Tensor:
        """LN_final of rows [N, H]."""
        return F.rms_norm(rows, self._norm.shape, self._norm, self._eps)


@torch.no_grad()
def token_flow(
    unembedding: UnembeddingEverywhere, states: Sequence[LayerStates], final: Tensor | None, final_norm: bool
) -> TokenFlow:
    """The flow of one micro-batch from the states of this stage's layers. Collective over tensor and pipeline groups.

    Args:
        states: by layer, lowest first; every stage has as many.
        final: [R, H] the normed states that the full policy unembeds, on the last stage; None elsewhere.
        final_norm: also the policies behind the final norm (the paper's ablation).
    """
    num_rows, hidden_size = states[0].below.shape
    full = None if final is None else unembedding.full_policy(final)
    sent = None if full is None else torch.cat([full.embedding, full.entropy[:, None]], dim=1)
    received = unembedding.from_stage(-1, sent, (num_rows, hidden_size + 1), torch.float32)
    top_token = unembedding.from_stage(-1, None if full is None else full.top_token, (num_rows,), torch.int64)
    full = _Full(received[:, :-1], received[:, -1], top_token)

    of_embedding = None
    if states[0].number == 1:
        bottom = states[0].below  # H_0
        of_embedding = torch.stack([unembedding.statistics(bottom, top_token).entropy, _norms(bottom)])
    embedding = unembedding.from_stage(0, of_embedding, (2, num_rows), torch.float32)

    mine = torch.stack([_layer_columns(unembedding, layer, full, final_norm) for layer in states])
    columns = unembedding.by_layer(mine).unbind(1)
    names = (*_ENTROPIES, *(_NORM_ENTROPIES if final_norm else ()), *_OTHERS)
    layers = dict(zip(names, columns, strict=True))
    layers["d_layer"] = layers["resid"] - torch.cat([embedding[:1], layers["resid"][:-1]])
    layers["d_attn"] = layers["attn"] - layers["attn_in"]
    layers["d_ffn"] = layers["ffn"] - layers["ffn_in"]
    return TokenFlow(layers, embedding[0], embedding[1], full.entropy)


def _layer_columns(unembedding: UnembeddingEverywhere, layer: LayerStates, full: _Full, final_norm: bool) -> Tensor:
    """fp32 [names, R] of one layer: all its distributions go through one pass over W."""
    rows = [layer.resid, layer.attn, layer.ffn, layer.attn_in, layer.ffn_in]
    if final_norm:
        rows += [unembedding.final_norm(state) for state in rows[:3]]
    statistics = unembedding.statistics(torch.cat(rows), full.top_token.repeat(len(rows)))
    num_rows = len(layer.resid)
    # KL(full || layer) = E_full[log full - log layer], and E_full[h . w] = h . E_full[w]: the differences of logits in
    # the hundreds, hence in float64.
    expected_logit = (layer.resid.double() * full.embedding.double()).sum(1)
    kl_full = statistics.lse_bits[:num_rows].double() * _LN_2 - expected_logit - full.entropy.double()
    top1_full = statistics.target_bits[:num_rows] >= statistics.top_bits[:num_rows]
    others = [
        F.cosine_similarity(layer.attn.float(), layer.below.float()),
        F.cosine_similarity(layer.ffn.float(), layer.middle.float()),
        _norms(layer.resid),
        kl_full.float(),
        top1_full.float(),
    ]
    return torch.cat([statistics.entropy.view(len(rows), num_rows), torch.stack(others)])


def _norms(rows: Tensor) -> Tensor:
    """L2 norms [N] of rows [N, H] in fp32."""
    return torch.linalg.vector_norm(rows.float(), dim=1)
