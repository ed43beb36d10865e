"""Every number of the entropy flow equals HuggingFace fp32 for every family, in every layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parallel.launch import LAYOUTS, assert_passed, recompute_flags, torchrun


@pytest.mark.parametrize("layout", LAYOUTS)
def test_flow_equals_huggingface(layout: str, flow_cases: Path) -> None:
    processes, flags = LAYOUTS[layout]
    assert_passed(torchrun(processes, "tests/parallel/flow_worker.py", str(flow_cases), *flags))


def test_recompute_changes_nothing_in_the_flow(flow_cases: Path) -> None:
    processes, flags = LAYOUTS["PP2"]
    flags = [*flags, *recompute_flags(flags)]
    assert_passed(torchrun(processes, "tests/parallel/flow_worker.py", str(flow_cases), *flags))
