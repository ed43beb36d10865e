"""A run prints its own lines alone: no warnings of the libraries about each other."""

from __future__ import annotations

from pathlib import Path

from tests.parallel.launch import assert_passed, torchrun
from tests.parallel.resume_worker import train_words

FLAGS = ["--bf16", "--use-distributed-optimizer", "--tensor-model-parallel-size", "2", "--sequence-parallel"]


def test_training_warns_of_nothing(train_cases: Path, tmp_path: Path) -> None:
    words = [*train_words(train_cases, "layer:2x2,full"), "--save", str(tmp_path / "run"), "--save-interval", "5"]
    result = torchrun(2, "-m", "megatron_bupo", *words, *FLAGS)
    assert_passed(result)
    assert "Warning" not in result.stderr, result.stderr
