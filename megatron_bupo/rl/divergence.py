"""How far one policy's log-probs lie from another's, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_DIFFERENCE = 20.0
"""Differences of log-probs are cut above this before exp, which overflows fp32 past 88."""


def kl_divergence(logprobs: Tensor, ref_logprobs: Tensor, kl_type: str) -> Tensor:
    """Estimate of KL(current || reference) per token, fp32 [R], with d = ref_logprobs - logprobs.

    k1 = -d, k2 = d^2 / 2, k3 = exp(d) - d - 1 (Schulman, "Approximating KL divergence", 2020). In k3, d is cut above
    at MAX_DIFFERENCE.
    """
    difference = ref_logprobs - logprobs
    if kl_type == "k1":
        return -difference
    if kl_type == "k2":
        return difference.square() / 2
    assert kl_type == "k3", kl_type
    return _k3(difference)


def logprob_difference(engine: Tensor, trainer: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """How far the engine's log-probs lie from the trainer's, over the tokens with mask 1; all fp32 [R].

    With d = trainer - engine, for tokens that the engine sampled:

        logprob_diff      sum of |d|; / num_tokens it is `logprob_diff_mean`
        logprob_diff_k3   sum of exp(d) - d - 1; / num_tokens it estimates KL(engine || trainer)
        logprob_diff_max  max of |d|, 0 without tokens; combine with max
        num_tokens        number of tokens

    fp64 scalars without graph. d is cut above at MAX_DIFFERENCE in k3.
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
    difference = difference.clamp(max=MAX_DIFFERENCE)
    # exp(d) - 1 rounds away the d^2 / 2 of the small d that a healthy run has.
    return difference.expm1() - difference
