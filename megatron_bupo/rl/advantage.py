"""Advantages of whole responses from their rewards; every token of a response has the advantage of the response."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_bupo.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_bupo.samples import Rollout

_EPSILON = 1e-6


@dataclass(frozen=True)
class AdvantageInputs:
    """The N responses of a step in record order: `rewards` float64 [N], `groups` has the prompt of each response."""

    rewards: Tensor
    groups: list[int]
    rollouts: Sequence[Rollout]

    def by_group(self, advantages: Callable[[Tensor], Tensor]) -> Tensor:
        """`advantages` of the rewards float64 [n] of each group, in record order [N]; see `unless_equal`.

        The responses of a group need not be neighbours.

        Raises:
            UsageError: a group of one response, which cannot be compared with another.
        """
        result = self.rewards.new_empty(len(self.groups))
        for group, members in members_of(self.groups).items():
            if len(members) < 2:
                raise UsageError(
                    f"group {group} has 1 response, and the advantage estimator compares responses to one prompt; give "
                    "--n-samples-per-prompt 2 or more, or take reinforce++"
                )
            result[members] = unless_equal(self.rewards[members], advantages)
        return result


Estimator = Callable[[AdvantageInputs], "Tensor"]
"""Advantages [N] of the responses, finite numbers."""


def unless_equal(rewards: Tensor, advantages: Callable[[Tensor], Tensor]) -> Tensor:
    """`advantages(rewards)`; exactly 0 where all rewards are equal, whatever the rounding of their mean."""
    import torch

    return torch.zeros_like(rewards) if bool((rewards == rewards[0]).all()) else advantages(rewards)


def standardized(rewards: Tensor) -> Tensor:
    """(R - mean) / (std + 1e-6), with the unbiased standard deviation."""
    return (rewards - rewards.mean()) / (rewards.std(unbiased=True) + _EPSILON)


def compute_advantages(estimator: Estimator, name: str, rollouts: Sequence[Rollout]) -> Tensor:
    """Advantages fp32 [N] of the responses, which have rewards.

    Args:
        estimator: of `builtin.load_estimator`.
        name: as --advantage-estimator has it, for the errors.

    Raises:
        UsageError: an estimator that returns anything else than one finite number for each response.
    """
    import torch

    given = [one.reward for one in rollouts if one.reward is not None]
    assert len(given) == len(rollouts), "a replay is checked for rewards, and a reward function for finite numbers"
    rewards = torch.tensor(given, dtype=torch.float64)
    found: Any = estimator(AdvantageInputs(rewards, [one.group for one in rollouts], rollouts))
    is_column = isinstance(found, torch.Tensor) and found.shape == rewards.shape
    if not is_column or not bool(found.isfinite().all()):
        what = f"a tensor {list(found.shape)}" if isinstance(found, torch.Tensor) else f"a {type(found).__name__}"
        what += f" with {found[~found.isfinite()][0]:g} in it" if is_column else ""
        raise UsageError(
            f"--advantage-estimator {name}: it returned {what}; it must be a tensor of {len(rewards)} finite numbers, "
            "one for each response"
        )
    return found.float()


def num_zero_spread_groups(rewards: list[float], groups: list[int]) -> int:
    """Number of groups whose rewards are all equal: they teach nothing under the group estimators."""
    return sum(len({rewards[member] for member in members}) == 1 for members in members_of(groups).values())


def members_of(groups: list[int]) -> dict[int, list[int]]:
    """Positions of every group's responses, in record order."""
    members: dict[int, list[int]] = {}
    for position, group in enumerate(groups):
        members.setdefault(group, []).append(position)
    return members
