"""Work of the first rank that needs the model of all ranks: every layout, and an early or a bad end."""

from pathlib import Path

import pytest

from tests.parallel.launch import LAYOUTS, ROOT, assert_passed, torchrun


@pytest.mark.parametrize("layout", ["TP1", "TP2", "PP2", "DP2"])
def test_the_first_rank_leads(score_cases: Path, layout: str) -> None:
    processes, flags = LAYOUTS[layout]
    worker = str(ROOT / "tests" / "parallel" / "lead_worker.py")
    assert_passed(torchrun(processes, worker, str(score_cases), *flags, timeout=240))
