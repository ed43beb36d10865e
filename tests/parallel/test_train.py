"""Five replayed steps across the phase switch equal a plain HuggingFace + torch AdamW loop, in every layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parallel.launch import LAYOUTS, assert_passed, torchrun


@pytest.mark.parametrize("layout", LAYOUTS)
def test_five_steps_equal_huggingface_and_adamw(layout: str, train_cases: Path) -> None:
    processes, flags = LAYOUTS[layout]
    assert_passed(torchrun(processes, "tests/parallel/train_worker.py", str(train_cases), *flags))
