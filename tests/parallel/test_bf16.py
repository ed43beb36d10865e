"""bf16 weights with fp32 masters: over the phase switch nothing is rounded away, and the step is AdamW's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parallel.launch import assert_passed, torchrun
from tests.parallel.references import configs, write_model


@pytest.mark.parametrize("processes", [1, 2])
def test_masters_carry_on_unrounded_over_the_switch(processes: int, tmp_path: Path) -> None:
    write_model(configs()["qwen3-tied"], tmp_path / "qwen3-tied")
    (tmp_path / "rollouts").mkdir()
    assert_passed(torchrun(processes, "tests/parallel/bf16_worker.py", str(tmp_path)))
