"""The bound on the memory of the unembedding's forward and backward, each measured in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parallel.launch import assert_passed, run_python

BOUND_MB = 150

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from Linux's /proc")


def peak_growth_mb(implementation: str, rows: int) -> float:
    """At H = 64 and V = 151,936, beyond inputs and weight gradient."""
    done = run_python("tests/unit/unembedding_memory.py", implementation, rows)
    assert_passed(done)
    print(f"{implementation}, {rows} rows: peak grows by {done.stdout.strip()} MB")
    return float(done.stdout)


def test_peak_is_bounded() -> None:
    assert peak_growth_mb("tiled", rows=2048) <= BOUND_MB


def test_dense_would_not_pass() -> None:
    """A sixteenth of the rows is enough; all of them would take some 6 GB."""
    assert peak_growth_mb("dense", rows=128) > BOUND_MB
