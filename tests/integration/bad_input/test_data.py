"""Bad prompts, rollout files, rewards and outputs: exit code 2, one line, nothing started, nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.bad_input.commands import COMMANDS, GOOD_ROW

BAD_PROMPTS = {
    "empty": ("", "no rows in it"),
    "blank lines": ("\n\n", "no rows in it"),
    "malformed": (GOOD_ROW + '{"prompt": "w2"', "row 2: not JSON"),
    "no object": (GOOD_ROW + "[1]\n", "row 2: a list instead of a JSON object"),
    "no prompt": ('{"question": "w2", "answer": 1}\n', "row 1: no column 'prompt' (it has: question, answer)"),
    "number": ('{"prompt": 7, "answer": 1}\n', "row 1: 'prompt' is a int"),
    "blank": ('{"prompt": " ", "answer": 1}\n', "row 1: 'prompt' is empty or blank"),
    "other encoding": (GOOD_ROW.encode("utf-16").decode("latin-1"), "not UTF-8 text"),
    "messages without template": (
        '{"prompt": [{"role": "user", "content": "w2"}], "answer": 1}\n',
        "the tokenizer has no chat template",
    ),
    "all too long": (GOOD_ROW * 3, "all 3 prompts are longer than 1 tokens"),
}


@pytest.mark.parametrize("command", ["train", "generate"])  # entropy-flow reads prompts as generate does
@pytest.mark.parametrize("bad", BAD_PROMPTS)
def test_prompt_data(bad: str, command: str, case: Path, refused: Callable[..., str]) -> None:
    text, expected = BAD_PROMPTS[bad]
    (case / "prompts.jsonl").write_text(text, encoding="latin-1")
    flags = ["--rollout-max-prompt-len", "1"] if bad == "all too long" else []
    assert expected in refused(command, *flags)


def test_prompt_data_that_only_train_refuses(case: Path, refused: Callable[..., str]) -> None:
    assert "--rollout-batch-size 7: the data have 6 prompts" in refused("train", "--rollout-batch-size", "7")
    (case / "prompts.jsonl").write_text('{"prompt": "w2"}\n')
    assert "row 1: neither 'reward_model.ground_truth' nor 'answer'" in refused("train")
    (case / "prompts.jsonl").write_text(GOOD_ROW + '{"prompt": "w2", "answer": NaN}\n')
    assert "row 2: neither 'reward_model.ground_truth' nor 'answer'" in refused("train")


@pytest.mark.parametrize("command", ["train", "generate"])
def test_a_name_is_no_pattern(command: str, case: Path, refused: Callable[..., str]) -> None:
    (case / "p1.jsonl").write_text(GOOD_ROW * 6)
    (case / "p[1].jsonl").write_text(GOOD_ROW + "{")
    assert "p[1].jsonl, row 2: not JSON" in refused(command, "--prompt-data", str(case / "p[1].jsonl"))


@pytest.mark.parametrize("command", ["train", "generate"])
def test_parquet_that_is_none(command: str, case: Path, refused: Callable[..., str]) -> None:
    file = case / "prompts.parquet"
    file.write_text(GOOD_ROW)
    assert "prompts.parquet: cannot be read" in refused(command, "--prompt-data", str(file))


def test_data_that_cannot_be_evaluated(case: Path, refused: Callable[..., str]) -> None:
    (case / "prompts.jsonl").write_text('{"prompt": "w2"}\n')
    assert "row 1: neither 'reward_model.ground_truth' nor 'answer'" in refused("evaluate")
    (case / "prompts.jsonl").write_text("")
    assert "no rows in it" in refused("evaluate")


def test_evaluations_that_are_there(case: Path, refused: Callable[..., str]) -> None:
    """A finished folder, one that was begun otherwise, one of something else."""
    folder = case / "out" / "evaluation"
    (folder / "responses").mkdir(parents=True)
    assert "has responses/ but no settings.json" in refused("evaluate", out_exists=True)
    (folder / "settings.json").write_text('{"policy": "layer:2"}')
    assert "policy: layer:2 then, full now" in refused("evaluate", out_exists=True)
    (folder / "settings.json").write_text("{")
    assert "settings.json: not JSON" in refused("evaluate", out_exists=True)
    (folder / "evaluation.json").write_text("{}")
    assert "already holds evaluation.json" in refused("evaluate", out_exists=True)
    assert sorted(path.name for path in folder.iterdir()) == ["evaluation.json", "responses", "settings.json"]


def test_what_load_names(case: Path, refused: Callable[..., str]) -> None:
    assert "no such folder" in refused("evaluate", "--load", str(case / "nothing"))
    assert "has no latest_checkpointed_iteration.txt" in refused("evaluate", "--load", str(case / "rollouts"))


# --- rollout files


def edit_record(path: Path, **values: Any) -> None:
    """Change the last record; None removes a key."""
    lines = path.read_text().splitlines()
    record = {key: value for key, value in (json.loads(lines[-1]) | values).items() if value is not None}
    path.write_text("\n".join([*lines[:-1], json.dumps(record)]) + "\n")


BAD_ROLLOUTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda f: f.write_text(""), "the file is empty"),
    "malformed": (lambda f: f.write_text(f.read_text() + "{\n"), ":5: not JSON"),
    "UTF-16": (lambda f: f.write_text(f.read_text(), encoding="utf-16"), "not UTF-8 text"),
    "no text": (lambda f: f.write_bytes(b"\xff\xfe\x00"), "not UTF-8 text"),
    "no tokens": (lambda f: edit_record(f, response_tokens=[]), ":4: 'response_tokens' must be a list of at least one"),
    "a key less": (lambda f: edit_record(f, prompt_tokens=None), ":4: the key 'prompt_tokens' is missing"),
    "mask too short": (lambda f: edit_record(f, response_mask=[]), ":4: 'response_mask' must have one entry"),
    "beyond the vocabulary": (lambda f: edit_record(f, prompt_tokens=[3, 101]), ":4: token id 101, but the model's"),
}


@pytest.mark.parametrize("command", ["replay", "score", "entropy-flow"])
@pytest.mark.parametrize("bad", BAD_ROLLOUTS)
def test_rollout_files(bad: str, command: str, case: Path, refused: Callable[..., str]) -> None:
    break_file, expected = BAD_ROLLOUTS[bad]
    break_file(case / "rollouts" / "step_000001.jsonl")
    assert expected in refused(command)


def test_rollouts_without_a_flow(case: Path, refused: Callable[..., str]) -> None:
    assert "--heatmap-response 5: there are responses 1 to 4" in refused("entropy-flow", "--heatmap-response", "5")
    file = case / "rollouts" / "step_000001.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    unwritten = [record | {"response_mask": [0] * len(record["response_tokens"])} for record in records]
    file.write_text("".join(json.dumps(record) + "\n" for record in [unwritten[0], *records[1:]]))
    assert "--heatmap-response 1: the policy wrote no token of it" in refused("entropy-flow", "--heatmap-response", "1")
    file.write_text("".join(json.dumps(record) + "\n" for record in unwritten))
    assert "step_000001.jsonl: no response tokens that the policy wrote" in refused("entropy-flow")
    one = unwritten[0] | {"response_mask": [1, *unwritten[0]["response_mask"][1:]]}
    file.write_text(json.dumps(one) + "\n")
    assert "a single response token that the policy wrote" in refused("entropy-flow")


def test_replays_that_cannot_run_to_their_end(case: Path, refused: Callable[..., str]) -> None:
    assert "step_000003.jsonl: no such file; a replay of 3 steps" in refused("replay", "--train-iters", "3")
    assert "4 responses; rollout-batch-size x n-samples-per-prompt asks for 6" in refused(
        "replay", "--rollout-batch-size", "3"
    )
    second = case / "rollouts" / "step_000002.jsonl"
    edit_record(second, reward=None)
    assert "step_000002.jsonl:4: the key 'reward' is missing" in refused("replay")
    edit_record(second, reward=float("nan"))
    assert "step_000002.jsonl:4: 'reward' is nan" in refused("replay")


# --- rewards and outputs


@pytest.mark.parametrize(
    ("source", "expected"),
    [("def half(record:\n", "is not valid Python"), ("def whole(record):\n    return 1\n", "defines no half")],
)
def test_reward_files(source: str, expected: str, case: Path, refused: Callable[..., str]) -> None:
    (case / "reward.py").write_text(source)
    assert expected in refused("train")


def test_outputs_that_are_taken(case: Path, refused: Callable[..., str]) -> None:
    taken = case / "out"
    for name in ("save/metrics.jsonl", "rollouts/step_000001.jsonl"):
        (taken / name).parent.mkdir(parents=True)
        (taken / name).write_text("{}\n")
        before = sorted(taken.rglob("*"))
        assert "already holds" in refused("train", out_exists=True)
        assert sorted(taken.rglob("*")) == before
        shutil.rmtree(taken)
    (taken / "flow").mkdir(parents=True)
    (taken / "flow" / "entropy_flow.json").write_text("{}")
    assert "flow: already holds entropy_flow.json of an earlier run" in refused("entropy-flow", out_exists=True)
    shutil.rmtree(taken)
    taken.write_text("a file")
    for command in COMMANDS:
        assert "out is a file, not a folder" in refused(command, out_exists=True)


@pytest.mark.parametrize("exists", ["empty", "save", "above save"])
def test_an_export_that_would_be_refused_at_the_end_is_refused_at_the_start(
    exists: str, case: Path, refused: Callable[..., str]
) -> None:
    """The export takes a name that is not there; after hours of training it would be too late to say so."""
    export = {"empty": case / "rollouts", "save": case / "out" / "save", "above save": case / "out"}[exists]
    assert "--save-hf" in refused("train", "--save-hf", str(export))


@pytest.mark.parametrize("command", COMMANDS)
def test_outputs_that_cannot_be_written(command: str, case: Path, refused: Callable[..., str]) -> None:
    """Every way in which a place can be unfit is in tests/unit/test_outputs.py."""
    flag = "--save" if command in ("train", "replay") else "--output"
    assert f"{flag} /proc/out: nothing can be written in /proc" in refused(command, flag, "/proc/out")
    (case / "link").symlink_to("nothing")
    assert "is a link to nothing, not a folder" in refused(command, flag, str(case / "link" / "out"))
