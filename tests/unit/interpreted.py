"""Triton's kernels on the CPU: interpreted, which is decided when triton is first imported."""

from __future__ import annotations

import importlib
import os
import sys

import pytest

from megatron_bupo.ops import tiles


def interpreted_triton_passes() -> tiles.Passes:
    if "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"
    pytest.importorskip("triton", reason="triton has no wheel for this platform")
    return importlib.import_module("megatron_bupo.ops.triton_passes")  # type: ignore[return-value]
