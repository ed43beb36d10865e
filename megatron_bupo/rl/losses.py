"""The GRPO / BuPO objective on the response tokens of one micro-batch: plain torch, no devices, no process groups.

R is the number of response tokens (rows) of the micro-batch. Everything returned is a *sum*: the caller adds the sums
and counts of all micro-batches and data-parallel ranks and divides once, so the loss does not depend on how the
global mini-batch is cut. Log-probs and entropies are fp32 and in nats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_bupo.errors import UsageError

LOSS_AGGREGATIONS = ("token-mean", "seq-mean", "dr-grpo")
KL_TYPES = ("k1", "k2", "k3")
MAX_LOG_RATIO = 20.0
"""Log-ratios are cut above this before exp: past exp(88) fp32 overflows and the backward gives 0 * inf = NaN."""


@dataclass(frozen=True)
class LossConfig:
    """What the loss needs to know. `max_response_len` (tokens) is read by the aggregation dr-grpo only."""

    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.2
    dual_clip: float = 10.0
    loss_aggregation: str = "token-mean"
    kl_loss_coef: float = 0.0
    kl_type: str = "k3"
    entropy_coef: float = 0.0
    max_response_len: int = 0

    def check(self) -> None:
        """Raise UsageError for values that no loss has."""
        if not 0 <= self.clip_ratio_low <= 1:
            raise UsageError(f"--clip-ratio-low {self.clip_ratio_low}: give 0 to 1 (ratios are cut below 1 - low)")
        if not (self.clip_ratio_high >= 0 and math.isfinite(self.clip_ratio_high)):
            raise UsageError(f"--clip-ratio-high {self.clip_ratio_high}: give a finite number from 0")
        if not (self.dual_clip == 0 or (self.dual_clip > 1 and math.isfinite(self.dual_clip))):
            raise UsageError(f"--dual-clip {self.dual_clip}: give a finite number above 1, or 0 to switch it off")
        if self.loss_aggregation not in LOSS_AGGREGATIONS:
            raise UsageError(f"--loss-aggregation '{self.loss_aggregation}' is none of: {', '.join(LOSS_AGGREGATIONS)}")
        if self.kl_type not in KL_TYPES:
            raise UsageError(f"--kl-type '{self.kl_type}' is none of: {', '.join(KL_TYPES)}")
        if not (self.kl_loss_coef >= 0 and math.isfinite(self.kl_loss_coef)):
            raise UsageError(f"--kl-loss-coef {self.kl_loss_coef}: give a finite number from 0")
        if not math.isfinite(self.entropy_coef):
            raise UsageError(f"--entropy-coef {self.entropy_coef}: give a finite number")
        if self.loss_aggregation == "dr-grpo" and self.max_response_len < 1:
            raise UsageError(
                f"--rollout-max-response-len {self.max_response_len}: dr-grpo divides by it; give 1 or more"
            )


@dataclass(frozen=True)
class LossOutput:
    """The share of one micro-batch in the loss of the global mini-batch, which is sum(loss_sum) / sum(count).

    loss_sum: fp32 scalar with a graph to the log-probs (and to the entropy, if it has a coefficient), R = 0 included.
    count: int64 scalar, tokens, responses or responses x max length, as the aggregation wants it.
    metrics: fp64 scalars without graph, sums over the trained tokens: `clip_frac`, `clip_frac_dual`, `ratio`,
        `entropy`, `num_tokens`, and `kl` where there is a reference. Divided by `num_tokens` they are the means.
    """

    loss_sum: Tensor
    count: Tensor
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class ClipLoss:
    """Per token, [R]: the loss, the ratio, and whether the clipped or the dual branch was taken (bool)."""

    loss: Tensor
    ratio: Tensor
    clipped: Tensor
    dual_clipped: Tensor


def ppo_clip_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_ratio_low: float,
    clip_ratio_high: float,
    dual_clip: float,
) -> ClipLoss:
    """The clipped surrogate per token, to be minimised; all tensors fp32 [R].

    With ratio = exp(logprobs - old_logprobs) and A the advantage:

        -min(ratio * A, clip(ratio, 1 - low, 1 + high) * A)        PPO, arXiv 1707.06347, eq. 7
        for A < 0 and c = dual_clip > 0: at most -c * A            dual clip, arXiv 1912.09729

    `clipped` marks tokens whose clipped branch has strictly the larger loss, `dual_clipped` those whose loss lay
    strictly above -c * A.
    """
    ratio = (logprobs - old_logprobs).clamp(max=MAX_LOG_RATIO).exp()
    unclipped = -ratio * advantages
    clipped = -ratio.clamp(1.0 - clip_ratio_low, 1.0 + clip_ratio_high) * advantages
    loss = torch.maximum(unclipped, clipped)
    if dual_clip == 0:
        return ClipLoss(loss, ratio, clipped > unclipped, torch.zeros_like(loss, dtype=torch.bool))
    bound = -dual_clip * advantages
    above = (advantages < 0) & (loss > bound)
    return ClipLoss(torch.where(above, bound, loss), ratio, clipped > unclipped, above)


def kl_divergence(logprobs: Tensor, ref_logprobs: Tensor, kl_type: str) -> Tensor:
    """Estimate of KL(current || reference) per token, fp32 [R], with d = ref_logprobs - logprobs.

    k1 = -d, k2 = d^2 / 2, k3 = exp(d) - d - 1 (Schulman, "Approximating KL divergence", 2020). In k3, d is cut above
    at MAX_LOG_RATIO.
    """
    difference = ref_logprobs - logprobs
    if kl_type == "k1":
        return -difference
    if kl_type == "k2":
        return difference.square() / 2
    assert kl_type == "k3", kl_type
    return _k3(difference)


def aggregate(
    per_token: Tensor, mask: Tensor, segments: Tensor, num_responses: int, aggregation: str, max_response_len: int
) -> tuple[Tensor, Tensor]:
    """Sum and count of a micro-batch such that sum(sums) / sum(counts) over all micro-batches is the aggregate.

    per_token fp32 [R], zero where the mask is; mask bool [R]; segments int64 [R], in 0..num_responses - 1. A response
    lies whole in one micro-batch.

        token-mean  sum over trained tokens                       / their number
        seq-mean    sum over responses of their token means       / responses with a trained token
        dr-grpo     sum over trained tokens                       / responses x max_response_len

    Returns a scalar of per_token's dtype and an int64 scalar.
    """
    if aggregation == "token-mean":
        return per_token.sum(), mask.sum()
    if aggregation == "dr-grpo":
        return per_token.sum(), mask.new_full((), num_responses * max_response_len, dtype=torch.int64)
    assert aggregation == "seq-mean", aggregation
    lengths = torch.bincount(segments[mask], minlength=num_responses)
    sums = per_token.new_zeros(num_responses).index_add(0, segments, per_token)
    return (sums / lengths.clamp(min=1)).sum(), (lengths > 0).sum()


def policy_loss(
    logprobs: Tensor,
    entropy: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    segments: Tensor,
    num_responses: int,
    config: LossConfig,
    ref_logprobs: Tensor | None = None,
) -> LossOutput:
    """The minimised objective of one micro-batch: per token clip loss + kl_loss_coef * KL - entropy_coef * entropy.

    All of the trained policy (full or internal: the loss is the same). Tensors are fp32 [R] except `segments`
    int64 [R]. Where `mask` is 0 the other columns may hold anything, NaN included: neither value nor gradient sees it.
    """
    assert config.kl_loss_coef == 0 or ref_logprobs is not None, "a KL loss needs the reference's log-probs"
    trained = mask > 0
    # Cut out before any arithmetic: a NaN times a zero mask is NaN, in the backward too.
    logprobs, entropy, old_logprobs, advantages = (
        torch.where(trained, column, 0.0) for column in (logprobs, entropy, old_logprobs, advantages)
    )
    clip = ppo_clip_loss(
        logprobs,
        old_logprobs,
        advantages,
        clip_ratio_low=config.clip_ratio_low,
        clip_ratio_high=config.clip_ratio_high,
        dual_clip=config.dual_clip,
    )
    per_token = clip.loss
    metrics = {
        "clip_frac": clip.clipped,
        "clip_frac_dual": clip.dual_clipped,
        "ratio": torch.where(trained, clip.ratio, 0.0),
        "entropy": entropy,
        "num_tokens": trained,
    }
    if ref_logprobs is not None:
        kl = kl_divergence(logprobs, torch.where(trained, ref_logprobs, 0.0), config.kl_type)
        metrics["kl"] = kl
        if config.kl_loss_coef != 0:
            per_token = per_token + config.kl_loss_coef * kl
    if config.entropy_coef != 0:
        per_token = per_token - config.entropy_coef * entropy
    loss_sum, count = aggregate(
        per_token, trained, segments, num_responses, config.loss_aggregation, config.max_response_len
    )
    sums = {name: column.detach().sum(dtype=torch.float64) for name, column in metrics.items()}
    return LossOutput(loss_sum, count, sums)


def logprob_difference(engine: Tensor, trainer: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """How far the engine's log-probs lie from the trainer's, over the tokens with mask 1; all fp32 [R].

    With d = trainer - engine, for tokens that the engine sampled:

        logprob_diff      sum of |d|; / num_tokens it is `logprob_diff_mean`
        logprob_diff_k3   sum of exp(d) - d - 1; / num_tokens it estimates KL(engine || trainer)
        logprob_diff_max  max of |d|, 0 without tokens; combine with max
        num_tokens        number of tokens

    fp64 scalars without graph. d is cut above at MAX_LOG_RATIO in k3.
    """
    measured = mask > 0
    difference = torch.where(measured, trainer.detach().double() - engine.detach().double(), 0.0)
    magnitude = difference.abs()
    return {
        "logprob_diff": magnitude.sum(),
        "logprob_diff_k3": _k3(difference).sum(),
        "logprob_diff_max": magnitude.max() if magnitude.numel() else magnitude.new_zeros(()),
        "num_tokens": measured.sum(dtype=torch.float64),
    }


def _k3(difference: Tensor) -> Tensor:
    difference = difference.clamp(max=MAX_LOG_RATIO)
    # exp(d) - 1 rounds away the d^2 / 2 of the small d that a healthy run has.
    return difference.expm1() - difference
