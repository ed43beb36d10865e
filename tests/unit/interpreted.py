"""Triton's kernels on the CPU: interpreted, see tests/conftest.py."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from megatron_bupo.ops import tiles


def interpreted(module: str) -> Any:
    """The module of megatron_bupo.ops of that name."""
    triton = pytest.importorskip("triton", reason="triton has no wheel for this platform")
    assert triton.knobs.runtime.interpret, "triton was imported before tests/conftest.py was"
    return importlib.import_module(f"megatron_bupo.ops.{module}")


def interpreted_triton_passes() -> tiles.Passes:
    return interpreted("triton_passes")  # type: ignore[no-any-return]
