"""The minimised objective of one micro-batch: loss per token, KL term, entropy bonus, and how tokens are averaged.

Everything returned is a *sum*: the caller adds the sums and counts of all micro-batches and data-parallel ranks and
divides once, so the objective does not depend on how the global mini-batch is cut.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_bupo.errors import UsageError
from megatron_bupo.rl.divergence import kl_divergence
from megatron_bupo.rl.loss import Loss, LossInputs, LossOutputs
from megatron_bupo.rl.objective_flags import ObjectiveFlags


@dataclass(frozen=True)
class ObjectiveSums:
    """The share of one micro-batch in the objective of the global mini-batch, which is sum(total) / sum(count).

    total: fp32 scalar with a graph to the log-probs (and to the entropy, if it is used), R = 0 included.
    count: int64 scalar, tokens, responses or responses x max length, as the aggregation wants it.
    metrics: scalars without graph: `loss` and `count`, the two above; `num_tokens` that are trained, and `num_bad` of
        them where a number of the loss is not finite; sums over the trained tokens of the loss's own metrics, and of
        `kl` where there is a reference. Divided by `num_tokens` they are the means.
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

    loss: Loss
    name: str
    flags: ObjectiveFlags
    aggregation: str
    max_response_len: int

    @property
    def needs_reference(self) -> bool:
        return self.flags.kl_loss_coef > 0

    def __call__(self, inputs: LossInputs) -> ObjectiveSums:
        """Where the response mask is False the columns may hold anything, NaN included: no value, no gradient sees it.

        Raises:
            UsageError: the loss returns something else than LossOutputs of tensors [R] with a gradient.
        """
        assert not self.needs_reference or inputs.ref_logprobs is not None, "a KL term needs the reference's log-probs"
        inputs = _masked(inputs)
        trained = inputs.response_mask
        outputs = self.loss(inputs) if len(trained) else LossOutputs(inputs.logprobs)
        self._check(outputs, inputs)
        per_token = outputs.per_token
        columns = {"num_tokens": trained, "num_bad": _bad(outputs, inputs)}
        if inputs.ref_logprobs is not None:
            columns["kl"] = kl = kl_divergence(inputs.logprobs, inputs.ref_logprobs, self.flags.kl_type)
            if self.needs_reference:
                per_token = per_token + self.flags.kl_loss_coef * kl
        if self.flags.entropy_coef != 0:
            per_token = per_token - self.flags.entropy_coef * inputs.entropy
        per_token = torch.where(trained, per_token, 0.0)
        total, count = aggregate(per_token, inputs, self.aggregation, self.max_response_len)
        metrics = {
            name: torch.where(trained, column.detach(), 0).sum(dtype=torch.float64)
            for name, column in (outputs.metrics | columns).items()
        }
        own = {"loss": total.detach(), "count": count}
        if taken := outputs.metrics.keys() & (columns.keys() | own.keys()):
            raise taken_name(self.name, min(taken))
        return ObjectiveSums(total, count, metrics | own)

    def check_finite(self, num_bad: float, num_tokens: float) -> None:
        """Raise UsageError if there are tokens where the loss was given numbers and returned none."""
        if num_bad:
            raise UsageError(
                f"--loss {self.name}: it returned numbers that are not finite, at {num_bad:.0f} of {num_tokens:.0f} "
                "tokens of a mini-batch; loss and metrics must be finite"
            )

    def _check(self, outputs: Any, inputs: LossInputs) -> None:
        """Raise UsageError for what no loss returns; not the values, for which a GPU would have to be waited for."""
        wanted = list(inputs.logprobs.shape)
        if fault := _fault(outputs, wanted):
            raise UsageError(
                f"--loss {self.name}: it returned {fault}; it must return LossOutputs with tensors of {wanted}, one "
                "number for each token"
            )
        if inputs.logprobs.requires_grad and not outputs.per_token.requires_grad:
            raise UsageError(f"--loss {self.name}: its loss has no gradient; compute it from inputs.logprobs")


def _fault(outputs: Any, wanted: list[int]) -> str | None:
    """What is wrong with the types and shapes of what a loss returned, or None."""
    if not isinstance(outputs, LossOutputs):
        return f"a {type(outputs).__name__}"
    metrics: Any = outputs.metrics
    if not isinstance(metrics, dict):
        return f"metrics that are a {type(metrics).__name__}"
    columns = [outputs.per_token, *metrics.values()]
    shapes = [list(one.shape) if isinstance(one, Tensor) else type(one).__name__ for one in columns]
    return None if all(shape == wanted for shape in shapes) else f"columns {shapes}"


def taken_name(loss: str, name: str) -> UsageError:
    """The error for a metric of the loss that would hide another number of the step."""
    return UsageError(f"--loss {loss}: its metric '{name}' has the name of another number of the step; rename it")


def _bad(outputs: LossOutputs, inputs: LossInputs) -> Tensor:
    """Where something that the loss returns is not finite, bool [R]; a model that gives NaN is not the loss's fault."""
    finite = outputs.per_token.isfinite()
    for column in outputs.metrics.values():
        finite = finite & column.isfinite()
    return inputs.logprobs.isfinite() & inputs.old_logprobs.isfinite() & ~finite


def _masked(inputs: LossInputs) -> LossInputs:
    """With 0 where the mask is False, before any arithmetic: a NaN times a zero mask is NaN, in the backward too."""
    columns = ("logprobs", "entropy", "old_logprobs", "advantages", "ref_logprobs", "rollout_logprobs")
    masked: dict[str, Any] = {
        name: torch.where(inputs.response_mask, column, 0.0)
        for name in columns
        if (column := getattr(inputs, name)) is not None
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
    mask = inputs.response_mask
    if aggregation == "token-mean":
        return per_token.sum(), mask.sum()
    if aggregation == "dr-grpo":
        return per_token.sum(), mask.new_full((), inputs.num_responses * max_response_len, dtype=torch.int64)
    assert aggregation == "seq-mean", aggregation
    lengths = torch.bincount(inputs.segments[mask], minlength=inputs.num_responses)
    return (inputs.sum_by_response(per_token) / lengths.clamp(min=1)).sum(), (lengths > 0).sum()
