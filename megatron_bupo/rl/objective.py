"""The minimised objective of one micro-batch: loss per token, KL term, entropy bonus, and how tokens are averaged.

Everything returned is a *sum*: the caller adds the sums and counts of all micro-batches and data-parallel ranks and
divides once, so the objective does not depend on how the global mini-batch is cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_bupo.errors import UsageError
from megatron_bupo.rl.divergence import kl_divergence
from megatron_bupo.rl.loss import LossInputs, LossOutputs
from megatron_bupo.rl.objective_flags import ObjectiveFlags


@dataclass(frozen=True)
class ObjectiveSums:
    """The share of one micro-batch in the objective of the global mini-batch, which is sum(total) / sum(count).

    total: fp32 scalar with a graph to the log-probs (and to the entropy, if it is used), R = 0 included.
    count: int64 scalar, tokens, responses or responses x max length, as the aggregation wants it.
    metrics: float64 scalars without graph, sums over the trained tokens: those of the loss, `kl` where there is a
        reference, and `num_tokens`. Divided by `num_tokens` they are the means.
    """

    total: Tensor
    count: Tensor
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class Objective:
    """What an update minimises: per token loss + kl_loss_coef * KL - entropy_coef * entropy, aggregated.

    Args:
        loss: of `builtin.load_loss`; `name` is what --loss says.
        aggregation: token-mean, seq-mean or dr-grpo, see `aggregate`.
        max_response_len: tokens; read by the aggregation dr-grpo.
    """

    loss: Callable[[LossInputs], Any]
    name: str
    flags: ObjectiveFlags
    aggregation: str
    max_response_len: int

    @property
    def needs_reference(self) -> bool:
        return self.flags.kl_loss_coef > 0

    def __call__(self, inputs: LossInputs) -> ObjectiveSums:
        """Where `inputs.mask` is False the columns may hold anything, NaN included: it changes no value, no gradient.

        Raises:
            UsageError: the loss returns something else than LossOutputs of finite numbers [R].
        """
        assert not self.needs_reference or inputs.ref_logprobs is not None, "a KL term needs the reference's log-probs"
        inputs = _masked(inputs)
        outputs = self.loss(inputs)
        self._check(outputs, inputs)
        per_token, columns = outputs.per_token, dict(outputs.metrics)
        if inputs.ref_logprobs is not None:
            columns["kl"] = kl = kl_divergence(inputs.logprobs, inputs.ref_logprobs, self.flags.kl_type)
            if self.needs_reference:
                per_token = per_token + self.flags.kl_loss_coef * kl
        if self.flags.entropy_coef != 0:
            per_token = per_token - self.flags.entropy_coef * inputs.entropy
        per_token = torch.where(inputs.mask, per_token, 0.0)
        total, count = aggregate(per_token, inputs, self.aggregation, self.max_response_len)
        metrics = {
            name: torch.where(inputs.mask, column.detach(), 0).sum(dtype=torch.float64)
            for name, column in columns.items()
        }
        return ObjectiveSums(total, count, metrics | {"num_tokens": inputs.mask.sum(dtype=torch.float64)})

    def _check(self, outputs: Any, inputs: LossInputs) -> None:
        """Raise UsageError for what no loss returns; only the shapes, which cost nothing."""
        columns = [outputs.per_token, *outputs.metrics.values()] if isinstance(outputs, LossOutputs) else []
        shapes = [list(column.shape) if isinstance(column, Tensor) else type(column).__name__ for column in columns]
        if not shapes or any(shape != list(inputs.logprobs.shape) for shape in shapes):
            found = f"columns {shapes}" if shapes else f"a {type(outputs).__name__}"
            raise UsageError(
                f"--loss {self.name}: it returned {found}; it must return LossOutputs with tensors of "
                f"{list(inputs.logprobs.shape)}, one number for each token"
            )


def _masked(inputs: LossInputs) -> LossInputs:
    """With 0 where the mask is False, before any arithmetic: a NaN times a zero mask is NaN, in the backward too."""
    columns = ("logprobs", "entropy", "old_logprobs", "advantages", "ref_logprobs", "rollout_logprobs")
    masked: dict[str, Any] = {
        name: torch.where(inputs.mask, column, 0.0) for name in columns if (column := getattr(inputs, name)) is not None
    }
    return replace(inputs, **masked)


def aggregate(per_token: Tensor, inputs: LossInputs, aggregation: str, max_response_len: int) -> tuple[Tensor, Tensor]:
    """Sum and count of a micro-batch such that sum(sums) / sum(counts) over all micro-batches is the aggregate.

    per_token fp32 [R], 0 where the mask is False. A response lies whole in one micro-batch.

        token-mean  sum over trained tokens                       / their number
        seq-mean    sum over responses of their token means       / responses with a trained token
        dr-grpo     sum over trained tokens                       / responses x max_response_len

    Returns a scalar of per_token's dtype and an int64 scalar.
    """
    mask = inputs.mask
    if aggregation == "token-mean":
        return per_token.sum(), mask.sum()
    if aggregation == "dr-grpo":
        return per_token.sum(), mask.new_full((), inputs.num_responses * max_response_len, dtype=torch.int64)
    assert aggregation == "seq-mean", aggregation
    lengths = torch.bincount(inputs.segments[mask], minlength=inputs.num_responses)
    return (inputs.sum_by_response(per_token) / lengths.clamp(min=1)).sum(), (lengths > 0).sum()
