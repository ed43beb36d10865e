"""How these tests start processes: what the processes find, and what a failing one tells."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.parallel.launch import MOST_CHARACTERS, assert_passed, torchrun

WORKER = """
import os, sys
import found_by_pythonpath, megatron_bupo

assert "TRITON_INTERPRET" not in os.environ

def reason():
    if os.environ["RANK"] == "1":
        raise ValueError("why it failed")

print("printed before")
print("warning " * 20, file=sys.stderr)
reason()
"""


def test_a_failing_process_shows_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "found_by_pythonpath.py").touch()
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # on a GPU its kernels are compiled
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["/no such folder", str(packages)]))
    with pytest.raises(AssertionError) as failure:
        assert_passed(torchrun(2, tmp_path / "worker.py"))
    told = str(failure.value)
    assert told.startswith("exit code 1\n")
    for part in ("printed before", "Traceback", "in reason", "ValueError: why it failed", "local_rank: 1"):
        assert part in told, told
    assert "ChildFailedError" not in told, "torchrun's own traceback"


def test_what_is_told_is_bounded() -> None:
    long = "".join(f"line {number}\n" for number in range(100_000))
    with pytest.raises(AssertionError) as failure:
        assert_passed(subprocess.CompletedProcess([], 1, long, f"{long}ValueError: why it failed\n"))
    told = str(failure.value)
    assert "line 99999" in told and "ValueError: why it failed" in told
    assert len(told) < 2 * MOST_CHARACTERS + 100


def test_a_passing_command_passes() -> None:
    assert_passed(subprocess.CompletedProcess([], 0, "", "a warning"))
