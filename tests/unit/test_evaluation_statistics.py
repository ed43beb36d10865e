"""The numbers of an evaluation against counting: every subset of samples, every outcome of the sign test, numpy."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest

from megatron_bupo.evaluation.result import SetResult, Verdict, write_result
from megatron_bupo.evaluation.statistics import mean_and_error, pass_at_k, sign_test


def verdicts(*questions: str) -> list[Verdict]:
    """One question a text: + is a right sample, - a wrong one, h half a point, t without a verdict, c cut off."""
    return [
        Verdict(number, f"q{number}", {"+": 1.0, "h": 0.5}.get(sign, 0.0), truncated=sign == "c", timed_out=sign == "t")
        for number, signs in enumerate(questions)
        for sign in signs
    ]


@pytest.mark.parametrize("num_samples", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(num_samples: int) -> None:
    for correct in range(num_samples + 1):
        samples = [True] * correct + [False] * (num_samples - correct)
        for k in range(1, num_samples + 1):
            subsets = list(combinations(samples, k))
            assert pass_at_k(num_samples, correct, k) == sum(map(any, subsets)) / len(subsets)


def test_pass_at_k_of_300_samples_has_no_rounding_of_its_own() -> None:
    """Against the product of exact fractions; in floats C(300, 150) and the tiny probabilities would be lost."""
    for correct, k in [(1, 256), (1, 1), (3, 128), (44, 256), (45, 256), (299, 2), (0, 256), (300, 1)]:
        failing = Fraction(1)
        for drawn in range(k):
            failing *= Fraction(max(300 - correct - drawn, 0), 300 - drawn)
        assert pass_at_k(300, correct, k) == float(1 - failing)


def test_standard_error_equals_numpys() -> None:
    values = [0.0, 0.25, 1.0, 0.5, 0.5, 0.125]
    mean, error = mean_and_error(values)
    assert mean == pytest.approx(np.mean(values), rel=1e-14)
    assert error == pytest.approx(np.std(values, ddof=1) / math.sqrt(6), rel=1e-14)
    assert mean_and_error([0.25]) == (0.25, None)


def test_sign_test_counts_outcomes() -> None:
    for wins, losses in product(range(7), repeat=2):
        outcomes = list(product((1, -1), repeat=wins + losses))
        as_uneven = sum(abs(sum(outcome)) >= abs(wins - losses) for outcome in outcomes)
        assert sign_test(wins, losses) == as_uneven / len(outcomes)


def test_a_set_in_numbers() -> None:
    result = SetResult.of(verdicts("+---", "++-t", "c---"), [1, 2, 4], num_dropped=2)
    assert (result.num_questions, result.num_dropped) == (3, 2)
    assert result.avg_at_n == result.pass_at_k["1"] == pytest.approx((1 / 4 + 2 / 4 + 0) / 3)
    assert result.avg_at_n_se == pytest.approx(np.std([0.25, 0.5, 0.0], ddof=1) / math.sqrt(3))
    assert result.pass_at_k["2"] == pytest.approx((3 / 6 + 5 / 6 + 0) / 3)
    assert result.pass_at_k["4"] == pytest.approx(2 / 3)
    assert (result.truncated_frac, result.reward_timeouts) == (1 / 12, 1)


def test_a_reward_below_one_counts_in_the_average_alone() -> None:
    result = SetResult.of(verdicts("h+", "hh"), [1, 2], num_dropped=0)
    assert (result.avg_at_n, result.pass_at_k) == (0.625, {"1": 0.25, "2": 0.5})


def test_names_of_the_metrics_and_of_the_file(tmp_path: Path) -> None:
    one = SetResult.of(verdicts("+-"), [1, 2], num_dropped=0)
    assert one.metrics("aime") == {
        "eval/aime/avg_at_n": 0.5,  # a single question has no standard error
        "eval/aime/pass_at_k/1": 0.5,
        "eval/aime/pass_at_k/2": 1.0,
        "eval/aime/truncated_frac": 0.0,
        "eval/aime/reward_timeouts": 0,
    }
    write_result(tmp_path, {"model": "m"}, {"aime": one})
    assert json.loads((tmp_path / "evaluation.json").read_text()) == {
        "schema": 1,
        "model": "m",
        "data": {
            "aime": {
                "num_questions": 1,
                "num_dropped": 0,
                "avg_at_n": 0.5,
                "avg_at_n_se": None,
                "pass_at_k": {"1": 0.5, "2": 1.0},
                "truncated_frac": 0.0,
                "reward_timeouts": 0,
            }
        },
    }
