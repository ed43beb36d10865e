"""What an evaluation reports: pass@k without bias, means with standard errors over questions, the sign test."""

from __future__ import annotations

import math
from collections.abc import Sequence


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Probability that of k of the samples, drawn without putting back, at least one is correct: Chen et al., 2021.

    1 - C(n - c, k) / C(n, k) in whole numbers, so that the one division at the end is the only rounding.

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    assert 0 <= num_correct <= num_samples and 1 <= k <= num_samples, (num_samples, num_correct, k)
    draws = math.comb(num_samples, k)
    return (draws - math.comb(num_samples - num_correct, k)) / draws


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and its standard error, with the unbiased variance; no error of a single value.

    >>> mean_and_error([0.0, 1.0])
    (0.5, 0.5)
    """
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    squares = math.fsum((value - mean) ** 2 for value in values)
    return mean, math.sqrt(squares / (len(values) - 1) / len(values))


def sign_test(wins: int, losses: int) -> float:
    """Two-sided probability of a split at least so uneven if both sides were equally likely; 1 where there is none.

    >>> sign_test(5, 0)
    0.0625
    """
    total = wins + losses
    tail = sum(math.comb(total, count) for count in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**total)
