"""A case: a folder with everything that the commands read, for a test to break something in."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_bupo.__main__ import main
from megatron_bupo.data.rollout_files import step_file, write_rollouts
from tests.integration.bad_input.commands import error_line, words_of
from tests.parallel.references import configs, random_rollouts, write_model
from tests.parallel.test_generation import write_tokenizer


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that the commands read, intact. Tests copy it before they break something."""
    folder = tmp_path_factory.mktemp("good")
    write_model(configs()["qwen3-tied"], folder / "model")
    write_tokenizer(folder / "model")
    rng = random.Random(0)
    rows = [{"prompt": f"w{rng.randrange(2, 99)} w7", "answer": "0"} for _ in range(6)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text("def half(record):\n    return 0.5\n")
    for step in (1, 2):
        write_rollouts(step_file(folder / "rollouts", step), random_rollouts(4, seed=step))
    return folder


@pytest.fixture
def case(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "case"))


@pytest.fixture
def refused(case: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command in this process, where it may start no process group; the one line that it ends with."""
    from megatron_bupo.commands import entropy_flow, evaluate, generate, score, train

    def start(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("bad input got as far as the process group")

    for module in (evaluate, generate):
        monkeypatch.setattr(module, "processes", start)
    for module in (entropy_flow, evaluate, score, train):
        monkeypatch.setattr(module, "parallel_state", start)

    def run(command: str, *flags: str, out_exists: bool = False) -> str:
        capsys.readouterr()
        code = main(words_of(command, case, *flags))
        printed = capsys.readouterr()
        assert code == 2, printed.err
        assert len(printed.err.splitlines()) == 1, printed.err
        assert out_exists or not (case / "out").exists()
        return error_line(printed.err)

    return run
