"""The proofs of tests/parallel once more in one process on a GPU, in fp32, and flash attention in bf16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_bupo.ops.attention import attention_by_sequence, flash_attention, has_flash_attention
from tests.parallel.conftest import flow_cases, score_cases, train_cases  # noqa: F401 - fixtures
from tests.parallel.launch import assert_passed, torchrun
from tests.unit.test_attention import reference, results

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine")


def test_every_policy_equals_huggingface(score_cases: Path) -> None:  # noqa: F811
    assert_passed(torchrun(1, "tests/parallel/score_worker.py", str(score_cases), on_gpu=True))


def test_five_steps_equal_huggingface_and_adamw(train_cases: Path) -> None:  # noqa: F811
    assert_passed(torchrun(1, "tests/parallel/train_worker.py", str(train_cases), on_gpu=True))


def test_the_flow_equals_huggingface(flow_cases: Path) -> None:  # noqa: F811
    assert_passed(torchrun(1, "tests/parallel/flow_worker.py", str(flow_cases), on_gpu=True))


def test_flash_attention_is_as_near_to_float64_as_one_call_a_sequence() -> None:
    """Output and gradients of bf16 inputs, grouped heads, sequences of several lengths."""
    assert has_flash_attention(torch.bfloat16, 8)
    device = torch.device("cuda")
    exact = results(reference, torch.bfloat16)  # in float64, of the same inputs
    one_call, by_sequence = (
        results(attend, torch.bfloat16, device) for attend in (flash_attention, attention_by_sequence)
    )
    for got, other, expected in zip(one_call, by_sequence, exact, strict=True):
        error, usual = (float((value.cpu().double() - expected.double()).abs().max()) for value in (got, other))
        assert error < 2 * usual + 0.01 * float(expected.abs().max())
