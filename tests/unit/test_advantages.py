"""Advantage estimators against numbers worked out by hand."""

import math

import pytest
import torch

from megatron_bupo.errors import UsageError
from megatron_bupo.rl.advantage import compute_advantages, num_zero_spread_groups
from megatron_bupo.rl.builtin import estimator_names, load_estimator
from megatron_bupo.samples import Rollout

# Group 7: rewards 0, 3, 3 (mean 2, deviations -2 1 1, unbiased variance 6 / 2 = 3); group 2: 1, 0 (mean 1/2,
# deviations 1/2 -1/2, variance 1/2). The members are interleaved on purpose.
REWARDS = [0.0, 1.0, 3.0, 0.0, 3.0]
GROUPS = [7, 2, 7, 2, 7]
ROOT_3 = math.sqrt(3) + 1e-6
ROOT_HALF = math.sqrt(0.5) + 1e-6
# All five: mean 7/5, deviations -1.4 -0.4 1.6 -1.4 1.6, squares sum to 9.2, unbiased variance 9.2 / 4 = 2.3.
ROOT_2_3 = math.sqrt(2.3) + 1e-6


def advantages(rewards: list[float], groups: list[int], name: str) -> torch.Tensor:
    rollouts = [Rollout(group, [1], [2], reward=reward) for reward, group in zip(rewards, groups, strict=True)]
    return compute_advantages(load_estimator(name), name, rollouts)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("grpo", [-2 / ROOT_3, 0.5 / ROOT_HALF, 1 / ROOT_3, -0.5 / ROOT_HALF, 1 / ROOT_3]),
        ("dr-grpo", [-2.0, 0.5, 1.0, -0.5, 1.0]),
        # 0 - (3 + 3) / 2, 1 - 0, 3 - (0 + 3) / 2, 0 - 1, 3 - (0 + 3) / 2
        ("rloo", [-3.0, 1.0, 1.5, -1.0, 1.5]),
        ("reinforce++", [-1.4 / ROOT_2_3, -0.4 / ROOT_2_3, 1.6 / ROOT_2_3, -1.4 / ROOT_2_3, 1.6 / ROOT_2_3]),
    ],
)
def test_by_hand(estimator, expected):
    result = advantages(REWARDS, GROUPS, estimator)
    assert result.dtype == torch.float32
    assert result.tolist() == pytest.approx(expected, rel=1e-6)


def test_the_arithmetic_is_in_float64():
    # In fp32 the two rewards are one number.
    values = [0.3, 0.3 + 1e-8]
    assert advantages(values, [0, 0], "dr-grpo").tolist() == pytest.approx([-0.5e-8, 0.5e-8], rel=1e-6)


@pytest.mark.parametrize("estimator", estimator_names())
def test_equal_rewards_give_exactly_zero(estimator):
    # The fp64 mean of three 0.1 is not 0.1, so a plain R - mean would not be 0.
    assert advantages([0.1, 0.1, 0.1], [4, 4, 4], estimator).tolist() == [0.0, 0.0, 0.0]


def test_a_tiny_spread_is_damped_by_epsilon():
    # Deviations -+1e-9 / 2, unbiased std 1e-9 / sqrt 2: the denominator is 1e-6 + 7.07e-10.
    expected = 0.5e-9 / (1e-6 + 1e-9 / math.sqrt(2))
    assert advantages([0.0, 1e-9], [0, 0], "grpo").tolist() == pytest.approx([-expected, expected], rel=1e-5)


@pytest.mark.parametrize("estimator", ["grpo", "dr-grpo", "rloo"])
def test_a_group_of_one_is_refused_by_name(estimator):
    with pytest.raises(UsageError, match="group 9 has 1 response"):
        advantages([1.0, 0.0, 1.0], [3, 3, 9], estimator)


def test_reinforce_needs_no_groups_but_two_responses():
    assert advantages([0.0, 2.0], [0, 1], "reinforce++").tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5], rel=1e-5)


@pytest.mark.parametrize(
    ("returned", "found"),
    [
        ([1.0, 2.0], "a list"),
        (torch.zeros(3), r"a tensor \[3\]"),
        (torch.tensor([1.0, math.nan]), r"a tensor \[2\] with nan in it"),
    ],
)
def test_what_is_no_advantage_is_named(returned, found):
    rollouts = [Rollout(0, [1], [2], reward=1.0)] * 2
    with pytest.raises(
        UsageError, match=f"--advantage-estimator mine.py:f: it returned {found}; it must be a tensor of 2"
    ):
        compute_advantages(lambda inputs: returned, "mine.py:f", rollouts)


def test_num_zero_spread_groups():
    assert num_zero_spread_groups(REWARDS, GROUPS) == 0
    assert num_zero_spread_groups([1.0, 0.0, 1.0, 0.0, 5.0], [1, 2, 1, 2, 3]) == 3
    assert num_zero_spread_groups([1.0, 0.0, 0.0, 0.0], [1, 2, 1, 2]) == 1
