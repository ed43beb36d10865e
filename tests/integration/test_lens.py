"""The library for notebooks: its numbers are HuggingFace's, and the example notebooks run to their ends."""

import json
from pathlib import Path

import pytest

from tests.integration.test_tools import arithmetic
from tests.parallel.launch import ROOT, run_python

NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("lens") / "model"
    recipe = arithmetic.Recipe(max_operand=20, num_test=30, exact_steps=3, noisy_steps=2, batch_size=8)
    arithmetic.make(folder, seed=3, force=False, recipe=recipe)
    return folder


def test_numbers_are_those_of_huggingface(model: Path) -> None:
    result = run_python("tests/integration/lens_worker.py", model)
    assert result.returncode == 0, result.stderr
    assert result.stderr == "", "a notebook shows what is printed here"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_notebooks(notebook: Path, model: Path, tmp_path: Path) -> None:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert code and all(not cell.get("outputs") for cell in cells), "notebooks are kept without outputs"
    folder = '"models/SmolLM2-135M-Instruct"'
    assert folder in code[0]
    program = tmp_path / "cells.py"
    # The last line of a cell is shown in a notebook: here it must be computed too.
    program.write_text("\n\n".join(code).replace(folder, repr(str(model))), encoding="utf-8")
    result = run_python(program)
    assert result.returncode == 0, result.stderr


def test_there_are_notebooks() -> None:
    assert len(NOTEBOOKS) >= 2


def test_torchrun_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    program = tmp_path / "two.py"
    program.write_text(f"import megatron_bupo as mb\nmb.load({str(model)!r})\n")
    result = run_python(program)
    assert result.returncode == 1 and "a lens works in one process, torchrun started 2" in result.stderr
