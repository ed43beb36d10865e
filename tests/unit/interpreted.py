"""Triton's kernels on the CPU: interpreted, see tests/conftest.py."""

from __future__ import annotations

import importlib

import pytest

from megatron_bupo.ops import tiles


def interpreted_triton_passes() -> tiles.Passes:
    triton = pytest.importorskip("triton", reason="triton has no wheel for this platform")
    assert triton.knobs.runtime.interpret, "triton was imported before tests/conftest.py was"
    return importlib.import_module("megatron_bupo.ops.triton_passes")  # type: ignore[return-value]
