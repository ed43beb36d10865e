"""The proofs of tests/parallel once more in one process on a GPU, in fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.parallel.conftest import flow_cases, score_cases, train_cases  # noqa: F401 - fixtures
from tests.parallel.launch import assert_passed, torchrun

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine")


def test_every_policy_equals_huggingface(score_cases: Path) -> None:  # noqa: F811
    assert_passed(torchrun(1, "tests/parallel/score_worker.py", str(score_cases), on_gpu=True))


def test_five_steps_equal_huggingface_and_adamw(train_cases: Path) -> None:  # noqa: F811
    assert_passed(torchrun(1, "tests/parallel/train_worker.py", str(train_cases), on_gpu=True))


def test_the_flow_equals_huggingface(flow_cases: Path) -> None:  # noqa: F811
    assert_passed(torchrun(1, "tests/parallel/flow_worker.py", str(flow_cases), on_gpu=True))
