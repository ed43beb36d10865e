"""Squared distances of tensors, by torch and by the Triton kernel (interpreted without a GPU), against float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from megatron_bupo.training import norms
from tests.unit.interpreted import interpreted

SIZES = (1, 63, 64, 700)  # of blocks of 16 elements, of which two programs take turns


@pytest.fixture(params=["torch", "triton"])
def squared_distances(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    if request.param == "torch":
        monkeypatch.setattr(norms, "_CHUNK", 16)
        return norms.squared_distances
    kernel = interpreted("triton_movement")
    monkeypatch.setattr(kernel, "_BLOCK", 16)
    monkeypatch.setattr(kernel, "_PROGRAMS", 2)
    return kernel.squared_distances_triton  # type: ignore[no-any-return]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("with_before", [True, False])
@pytest.mark.parametrize("with_start", [True, False])
def test_equal_to_float64(
    squared_distances: Callable[..., Tensor], size: int, with_before: bool, with_start: bool
) -> None:
    randn = partial(torch.randn, size, generator=torch.Generator().manual_seed(size))
    start = randn().bfloat16()
    # A little further from 0 than a bf16 number: rounded and cut to bf16 (the interpreter cuts) it is that number.
    value = (start + start * 2**-4).bfloat16().float() * (1 + 2**-10)
    before = value + 1e-6 * randn()
    found = squared_distances(value, before if with_before else None, start if with_start else None)
    rounded = value.double() / (1 + 2**-10)
    distances = [value.double() - before.double(), value.double() - rounded, value.double() - start.double()]
    counted = (with_before, with_start, with_start)
    expected = [float(one.square().sum()) * is_counted for one, is_counted in zip(distances, counted, strict=True)]
    assert found.dtype == torch.float64
    assert all(number > 0 for number, is_counted in zip(expected, counted, strict=True) if is_counted)
    # Differences in fp32 of numbers this close are exact, but for value - start.
    assert found.tolist() == pytest.approx(expected, rel=1e-6, abs=0)


def test_nothing_moved(squared_distances: Callable[..., Tensor]) -> None:
    start = torch.arange(40).bfloat16()
    assert squared_distances(start.float(), start.float(), start).tolist() == [0, 0, 0]
