"""Advantages of whole responses from their rewards; every token of a response has the advantage of the response."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_bupo.errors import UsageError

ESTIMATORS = ("grpo", "dr-grpo", "rloo", "reinforce++")
EPSILON = 1e-6
"""Added to the standard deviation in the denominators of grpo and reinforce++."""


def advantages(rewards: list[float], groups: list[int], estimator: str) -> Tensor:
    """Advantages fp32 [N] of N responses, in record order; computed in fp64.

    With R the n rewards of one group (the responses to one prompt; they need not be neighbours) and `std` the unbiased
    standard deviation (divided by n - 1):

        grpo         (R - mean(R)) / (std(R) + 1e-6)                   arXiv 2512.19673
        dr-grpo      R - mean(R)                                       its loss is a token sum over batch x max length
        rloo         R - mean of the other n - 1
        reinforce++  (R - mean) / (std + 1e-6) over all N responses    the groups play no part

    Where all rewards are equal the advantages are exactly 0, whatever the rounding of the mean.

    Raises:
        UsageError: an unknown estimator, a reward that is no finite number, or too few responses: two of a group, and
            two in all for reinforce++.
    """
    assert len(rewards) == len(groups), f"{len(rewards)} rewards for {len(groups)} groups"
    if estimator not in ESTIMATORS:
        raise UsageError(f"--advantage-estimator '{estimator}' is none of: {', '.join(ESTIMATORS)}")
    values = torch.tensor(rewards, dtype=torch.float64)
    if not values.isfinite().all():
        record = int((~values.isfinite()).nonzero()[0])
        raise UsageError(f"the reward of record {record + 1} is {rewards[record]}; rewards must be finite numbers")
    if estimator == "reinforce++":
        if len(rewards) < 2:
            raise UsageError("--advantage-estimator reinforce++ needs 2 responses or more in a step")
        return _centre(values, estimator).float()
    result = torch.empty_like(values)
    for group, members in _members(groups).items():
        if len(members) < 2:
            raise UsageError(
                f"--advantage-estimator {estimator}: group {group} has 1 response; give --n-samples-per-prompt 2 or "
                "more, or take reinforce++"
            )
        result[members] = _centre(values[members], estimator)
    return result.float()


def num_zero_spread_groups(rewards: list[float], groups: list[int]) -> int:
    """Number of groups whose rewards are all equal: they teach nothing under the group estimators."""
    return sum(len({rewards[member] for member in members}) == 1 for members in _members(groups).values())


def _members(groups: list[int]) -> dict[int, list[int]]:
    """Positions of every group's responses, in record order."""
    members: dict[int, list[int]] = {}
    for position, group in enumerate(groups):
        members.setdefault(group, []).append(position)
    return members


def _centre(values: Tensor, estimator: str) -> Tensor:
    """Advantages fp64 [n] of values fp64 [n] that are compared with each other."""
    if (values == values[0]).all():
        return torch.zeros_like(values)
    if estimator == "rloo":
        return values - (values.sum() - values) / (len(values) - 1)
    centred = values - values.mean()
    return centred if estimator == "dr-grpo" else centred / (values.std(unbiased=True) + EPSILON)
