"""Work of the first rank that needs the model of all ranks, with an early or a bad end.

From the other layouts weights are pushed in tests/integration/sglang/test_sync.py.
"""

from pathlib import Path

import pytest

from tests.parallel.launch import LAYOUTS, assert_passed, torchrun


@pytest.mark.parametrize("layout", ["PP2", "DP2"])
def test_the_first_rank_leads(score_cases: Path, layout: str) -> None:
    processes, flags = LAYOUTS[layout]
    assert_passed(torchrun(processes, "tests/parallel/led_model_worker.py", score_cases, *flags))
