"""Log-probs and entropies equal HuggingFace fp32 (eager) for every family and policy, in every layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parallel.launch import LAYOUTS, assert_passed, recompute_flags, torchrun


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_policy_equals_huggingface(layout: str, score_cases: Path) -> None:
    processes, flags = LAYOUTS[layout]
    result = torchrun(processes, "tests/parallel/score_worker.py", str(score_cases), *flags)
    assert_passed(result)


def test_recompute_changes_nothing_in_scores(score_cases: Path) -> None:
    processes, flags = LAYOUTS["TP2"]
    result = torchrun(processes, "tests/parallel/score_worker.py", str(score_cases), *flags, *recompute_flags(flags))
    assert_passed(result)
