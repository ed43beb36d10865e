"""Evaluations while training: what they measure, and that the training does not notice them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_bupo.analysis.plots import read_metrics
from tests.parallel.launch import run_several
from tests.parallel.test_generation import TEMPERATURE, Run, assert_equal_weights, train, write_inputs

EVERY_STEP = ["--eval-interval", "1", "--eval-n-samples", "3"]
REWARD = """
def even(record):
    return float(sum(record["response_tokens"]) % 2 == 0)
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval_training")
    write_inputs(folder)
    (folder / "reward.py").write_text(REWARD)
    (folder / "held_out.jsonl").write_text('{"prompt": "w5 w6", "answer": "0"}\n{"prompt": "w9", "answer": "0"}\n' * 3)
    return folder


@pytest.fixture(scope="module")
def runs(inputs: Path) -> dict[str, Run]:
    held_out = str(inputs / "held_out.jsonl")

    def run(name: str, *flags: str) -> list[str]:
        return ["-m", "megatron_bupo", *train(inputs, inputs / name, *flags)]

    def evaluate(name: str, model: Path) -> list[str]:
        words = ["-m", "megatron_bupo", "evaluate", "--hf-model", str(model), "--prompt-data", held_out]
        words += ["--n-samples-per-prompt", "3", "--rollout-max-response-len", "12", "--seed", "7"]
        words += ["--rollout-temperature", TEMPERATURE, "--reward", f"{inputs / 'reward.py'}:even"]
        return [*words, "--output", str(inputs / name)]

    several = ["--eval-data", held_out, str(inputs / "prompts.jsonl"), *EVERY_STEP]
    run_several(
        1,
        run("plain"),
        run("evaluated", *several, "--save-interval", "1"),
        run("ends", "--eval-data", held_out),
        evaluate("before", inputs / "model"),
        evaluate("after", inputs / "evaluated" / "hf"),
    )
    stopped = inputs / "stopped"
    shutil.copytree(inputs / "evaluated" / "save", stopped / "save")
    for step in (2, 3):  # as a kill after step 1 leaves it, with a line of step 2
        shutil.rmtree(stopped / "save" / f"iter_{step:07d}")
    lines = (stopped / "save" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (stopped / "save" / "metrics.jsonl").write_text("".join(lines[:3]))
    begun = inputs / "begun"
    begun.joinpath("save").mkdir(parents=True)
    begun.joinpath("save", "metrics.jsonl").write_text('{"step": 0, "eval/held_out/avg_at_n": 9.0}\n')
    run_several(
        1,
        run("stopped", *several, "--save-interval", "1", "--load", str(stopped / "save")),
        run("begun", "--eval-data", held_out, "--load", str(begun / "save")),
    )
    run_several(2, run("DP2", *several))
    return {
        name: Run(inputs / name)
        for name in ("plain", "evaluated", "ends", "before", "after", "stopped", "begun", "DP2")
    }


def split(run: Run) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The lines of metrics.jsonl without the evaluations and the clock, and the evaluations with their steps."""
    lines = [json.loads(line) for line in (run.folder / "save" / "metrics.jsonl").read_text().splitlines()]
    found = [{name: value for name, value in line.items() if name.startswith("eval/")} for line in lines]
    evaluations = [{"step": line["step"], **one} for line, one in zip(lines, found, strict=True) if one]
    timed = ("eval/", "time/", "tokens_per_s")
    trained = [{name: value for name, value in line.items() if not name.startswith(timed)} for line in lines]
    return [line for line in trained if line["step"] > 0], evaluations


def of_held_out(numbers: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in numbers.items() if name.startswith(("eval/held_out/", "step"))}


def test_the_training_does_not_notice(runs: dict[str, Run]) -> None:
    plain, evaluated = split(runs["plain"]), split(runs["evaluated"])
    assert plain[1] == []
    assert evaluated[0] == plain[0]
    assert_equal_weights(runs["evaluated"], runs["plain"], within=0)
    for step in (1, 2, 3):
        assert runs["evaluated"].rollouts(step) == runs["plain"].rollouts(step)


def test_every_evaluation_is_what_evaluate_says_of_these_weights(runs: dict[str, Run]) -> None:
    evaluations = split(runs["evaluated"])[1]
    assert [one["step"] for one in evaluations] == [0, 1, 2, 3]
    for evaluation, name in ((evaluations[0], "before"), (evaluations[-1], "after")):
        expected = json.loads((runs[name].folder / "evaluation.json").read_text())["data"]["held_out"]
        passed = expected.pop("pass_at_k")
        assert passed.keys() == {"1", "2"}
        wanted = {"step": evaluation["step"], **{f"eval/held_out/pass_at_k/{k}": passed[k] for k in passed}}
        wanted |= {f"eval/held_out/{key}": expected[key] for key in expected if not key.startswith("num_")}
        assert of_held_out(evaluation) == wanted
    assert "eval/prompts/avg_at_n" in evaluations[0]
    assert len({one["eval/held_out/avg_at_n"] for one in evaluations}) > 1, "the weights move, and the answers too"


def test_without_an_interval_it_is_before_and_after_the_run(runs: dict[str, Run]) -> None:
    evaluations = split(runs["ends"])[1]
    assert [one["step"] for one in evaluations] == [0, 3]
    assert evaluations[0].keys() == evaluations[1].keys()


def test_a_run_that_goes_on_evaluates_the_steps_that_are_left(runs: dict[str, Run]) -> None:
    assert split(runs["stopped"]) == split(runs["evaluated"])
    # One that was stopped before its first checkpoint begins again, with the evaluation.
    assert split(runs["begun"])[1] == split(runs["ends"])[1]


def test_two_processes_measure_the_same(runs: dict[str, Run]) -> None:
    ours, theirs = split(runs["DP2"])[1], split(runs["evaluated"])[1]
    assert [one["step"] for one in ours] == [0, 1, 2, 3]
    assert ours[0] == theirs[0]  # later the weights are the same but for rounding


def test_readers_of_metrics_and_tensorboard(runs: dict[str, Run]) -> None:
    save = runs["evaluated"].folder / "save"
    assert [step["step"] for step in read_metrics(save)] == [1, 2, 3]
    board = EventAccumulator(str(save / "tensorboard"))
    board.Reload()
    points = [(event.step, event.value) for event in board.Scalars("eval/held_out/avg_at_n")]
    expected = [(one["step"], one["eval/held_out/avg_at_n"]) for one in split(runs["evaluated"])[1]]
    assert points == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected]
