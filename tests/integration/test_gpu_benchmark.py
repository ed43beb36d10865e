"""benchmarks/gpu.sh on a machine without a GPU: with tiny shapes it makes every row; with the real ones it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

from tests.parallel.launch import ROOT, child_environment

SCRIPT = ROOT / "benchmarks" / "gpu.sh"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    environment = child_environment() | {"PYTHON": sys.executable}
    return subprocess.run(["bash", SCRIPT, *words], env=environment, capture_output=True, text=True, check=False)


def write_wheel(folder: Path) -> None:
    """A package that pip installs; the benchmark imports it nowhere."""
    folder.mkdir()
    info = "carried-1.0.dist-info"
    with zipfile.ZipFile(folder / "carried-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried.py", "")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: carried\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


def test_a_dry_run_makes_every_row(tmp_path: Path) -> None:
    write_wheel(tmp_path / "wheels")
    output = tmp_path / "out"
    done = run("--dry-run", "--wheels", str(tmp_path / "wheels"), "--output", str(output))
    assert done.returncode == 0, done.stderr
    assert (output / "site" / "carried.py").is_file()
    results = json.loads((output / "results.json").read_text())
    assert results["device"] == "CPU"
    rows = {row["work"]: row for row in results["rows"]}
    assert not [row["measured"] for row in rows.values() if "failed" in row["measured"]]
    assert all(row["reached"] is None for row in rows.values()), "goals are for GPUs"
    assert "4 skipped" in rows["`tests/gpu`"]["measured"]
    assert len(results["rows"]) == 2 * 2 + 3 * 4 + 2  # unembedding; updates and norms; tests and flow
    assert rows["update, full, 96 tokens a micro-batch"]["numbers"]["times_huggingface"] > 0
    assert rows["entropy flow, 32 tokens"]["numbers"]["nats_apart"]["huggingface"] < 0.01
    assert done.stdout.strip() == (output / "table.md").read_text().strip()
    assert (output / "table.md").read_text().count("\n|") == len(results["rows"]) + 2


def test_without_a_gpu_it_refuses_the_real_shapes(tmp_path: Path) -> None:
    done = run("--output", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "no CUDA GPU" in done.stderr


def test_a_wrong_word_shows_how_it_is_called(tmp_path: Path) -> None:
    done = run("--dryrun")
    assert done.returncode == 2
    assert "benchmarks/gpu.sh [--wheels DIR]" in done.stderr
    assert os.listdir(tmp_path) == []
