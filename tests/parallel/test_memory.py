"""The activations that `train --dry-run` estimates are those that autograd saves, to the byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parallel.launch import LAYOUTS, run_several
from tests.parallel.memory_worker import MODELS
from tests.parallel.references import configs, write_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    (folder / "rollouts").mkdir()  # the flags name it
    for name in MODELS:
        write_model(configs()[name], folder / name)
    return folder


@pytest.mark.parametrize("layout", ["TP1", "TP2", "TP2+SP", "PP2", "PP2xVPP2"])
def test_what_the_layers_keep(layout: str, models: Path) -> None:
    processes, flags = LAYOUTS[layout]
    run_several(processes, ["tests/parallel/memory_worker.py", str(models), *flags])
