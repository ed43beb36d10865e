"""What only the running command can find, and what torchrun makes of it, in real processes."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.integration.bad_input.commands import GOOD_ROW, error_line, rewrite, words_of
from tests.parallel.launch import run_python, torchrun


def assert_every_rank_was_refused(result: subprocess.CompletedProcess[str]) -> None:
    """torchrun returns 1 and tells of its processes: each ended with 2, or was ended by torchrun after another had."""
    assert result.returncode == 1, result.stderr
    codes = {int(code) for code in re.findall(r"exitcode +: (-?\d+)", result.stderr)}
    assert 2 in codes, result.stderr
    assert codes <= {2, -15}, result.stderr


def put_nan(model: Path) -> None:
    """Into the last layer: with two pipeline stages only the second reads it."""
    rewrite(model, lambda tensors: tensors["model.layers.3.mlp.up_proj.weight"][5, 7:].fill_(float("nan")))


@pytest.mark.parametrize("command", ["train", "replay", "entropy-flow"])
def test_nan_in_one_stage_ends_every_rank_in_one_line(command: str, case: Path) -> None:
    put_nan(case / "model")
    result = torchrun(2, "-m", "megatron_bupo", *words_of(command, case, "--pipeline-model-parallel-size", "2"))
    assert_every_rank_was_refused(result)
    assert "model.layers.3.mlp.up_proj.weight" in error_line(result.stderr)
    assert "has NaN or infinite values" in error_line(result.stderr)
    assert not (case / "out").exists()


@pytest.mark.parametrize("command", ["score", "generate", "evaluate", "entropy-flow"])
def test_nan_in_one_process(command: str, case: Path) -> None:
    put_nan(case / "model")
    result = run_python("-m", "megatron_bupo", *words_of(command, case))
    assert result.returncode == 2, result.stderr
    assert "model.layers.3.mlp.up_proj.weight" in error_line(result.stderr)
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert not (case / "out").exists()


def test_an_output_that_cannot_be_written_ends_every_rank_in_one_line(case: Path) -> None:
    """Only the first rank tries it."""
    result = torchrun(2, "-m", "megatron_bupo", *words_of("train", case, "--save", "/proc/out"))
    assert_every_rank_was_refused(result)
    assert "--save /proc/out: nothing can be written in /proc" in error_line(result.stderr)
    assert not (case / "out").exists()


def test_bad_prompts_end_every_rank_in_one_line(case: Path) -> None:
    (case / "prompts.jsonl").write_text(GOOD_ROW + "{")
    result = torchrun(2, "-m", "megatron_bupo", *words_of("train", case))
    assert_every_rank_was_refused(result)
    assert "row 2: not JSON" in error_line(result.stderr)
    assert not (case / "out").exists()


def test_a_reward_file_that_cannot_be_loaded_ends_every_rank(case: Path) -> None:
    """Its text is valid Python: only its worker finds out, before the first response is generated."""
    (case / "reward.py").write_text("import no_such_module\ndef half(record):\n    return 0.5\n")
    result = torchrun(2, "-m", "megatron_bupo", *words_of("train", case))
    assert_every_rank_was_refused(result)
    assert "no_such_module" in error_line(result.stderr)
    assert not (case / "out").exists()


def test_a_reward_that_raises_ends_the_run_in_one_line(case: Path) -> None:
    (case / "reward.py").write_text("def half(record):\n    return record['no such key']\n")
    result = run_python("-m", "megatron_bupo", *words_of("train", case))
    assert result.returncode == 2, result.stderr
    assert "failed on record 1: it raised KeyError: 'no such key'" in error_line(result.stderr)
    assert "Traceback" not in result.stderr, result.stderr
