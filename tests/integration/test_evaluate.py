"""`evaluate` as a user runs it: numbers, kept responses, whose weights answer, going on, comparisons."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from megatron_bupo.__main__ import main
from megatron_bupo.data.rollout_files import read_rollouts
from megatron_bupo.policy_spec import PolicySpec
from tests.parallel.launch import run_several
from tests.parallel.references import VOCAB_SIZE, configs, policy_logits, write_model

QUESTIONS, SAMPLES = 10, 4
RUN = ["train", "--train-iters", "2", "--rollout-batch-size", "2", "--n-samples-per-prompt", "4", "--lr", "1e-2"]


def write_inputs(folder: Path) -> None:
    """A random model of whose 101 words 40 are a box with 0 or 1, and ten questions about 0 or 1, one too long."""
    write_model(configs()["qwen3-tied"], folder / "model")
    words = {"<eos>": 0, "<unk>": 1, **{f"w{index}": index for index in range(2, 61)}}
    words |= {rf"\boxed{{{index % 2}}}w{index}": index for index in range(61, VOCAB_SIZE)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>").save_pretrained(folder / "model")
    rows = [{"prompt": f"w{index + 2} w{index + 9}", "answer": str(index % 2)} for index in range(QUESTIONS)]
    rows.insert(3, {"prompt": "w2 " * 20, "answer": "0"})
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))


def words_of(inputs: Path, output: Path, *flags: str) -> list[str]:
    data = ["--prompt-data", str(inputs / "sums.jsonl"), "--rollout-max-prompt-len", "10"]
    words = ["evaluate", "--hf-model", str(inputs / "model"), *data, "--n-samples-per-prompt", str(SAMPLES)]
    return [
        *words,
        "--rollout-max-response-len",
        "3",
        "--rollout-micro-batch-size",
        "8",
        "--output",
        str(output),
        *flags,
    ]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def out(inputs: Path) -> Path:
    """Folder of all results, each by the name of its command."""
    folder, run, export = inputs / "out", inputs / "run", inputs / "export"
    train = [*RUN, "--hf-model", str(inputs / "model"), "--prompt-data", str(inputs / "more.jsonl")]
    train += ["--rollout-max-response-len", "3", "--save", str(run), "--save-interval", "2", "--save-hf", str(export)]
    both = ["--prompt-data", str(inputs / "sums.jsonl"), str(inputs / "more.jsonl"), "--num-prompts", "2"]

    def evaluate(name: str, *flags: str) -> list[str]:
        return ["-m", "megatron_bupo", *words_of(inputs, folder / name, *flags)]

    convert = ["checkpoint_converters/hf_to_megatron.py", "--hf-model", str(inputs / "model")]
    run_several(
        1,
        evaluate("one", "--tensorboard-dir", str(folder / "board")),
        evaluate("both", *both, "--k", "1", "3"),
        evaluate("greedy", "--policy", "layer:2", "--rollout-temperature", "1e-4"),
        ["-m", "megatron_bupo", *train],
        [*convert, "--output", str(inputs / "converted")],
        evaluate("run", "--load", str(run), "--tensorboard-dir", str(folder / "board")),
        evaluate("export", "--hf-model", str(export)),
        evaluate("converted", "--load", str(inputs / "converted")),
    )
    two_stages = ["--pipeline-model-parallel-size", "2", "--load", str(run)]
    run_several(2, evaluate("two"), evaluate("run2", *two_stages), evaluate("inner", *two_stages, "--policy", "attn:3"))
    return folder


def result(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    return read


def records(folder: Path, name: str = "sums") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "responses" / f"{name}.jsonl").read_text().splitlines()]


def tokens(folder: Path) -> list[list[int]]:
    return [record["response_tokens"] for record in records(folder)]


def test_the_numbers_are_those_of_the_responses(out: Path) -> None:
    found = result(out / "one")
    lines = records(out / "one")
    assert found.keys() == {"schema", "model", "policy", "sampling", "grader", "data"}
    assert (found["schema"], found["model"], found["policy"]) == (1, "model", "full")
    assert found["sampling"] == {"n": 4, "temperature": 1.0, "top_p": 1.0, "max_response_len": 3, "template": "none"}
    assert re.match(r"math-verify [\d.]+, sympy [\d.]+, ", found["grader"])
    rewards = np.array([line["reward"] for line in lines]).reshape(QUESTIONS, SAMPLES)
    assert 0.2 < rewards.mean() < 0.8, "random answers, so that the numbers below are worth comparing"
    passed = {str(k): np.mean([[max(part) for part in combinations(row, k)] for row in rewards]) for k in (1, 2, 4)}
    assert found["data"].keys() == {"sums"}
    numbers = found["data"]["sums"]
    assert numbers.pop("pass_at_k") == pytest.approx(passed, rel=1e-12)
    assert numbers == {
        "num_questions": QUESTIONS,
        "num_dropped": 1,
        "avg_at_n": pytest.approx(rewards.mean(), rel=1e-12),
        "avg_at_n_se": pytest.approx(rewards.mean(axis=1).std(ddof=1) / QUESTIONS**0.5, rel=1e-12),
        "truncated_frac": np.mean([line["finish_reason"] == "length" for line in lines]),
        "reward_timeouts": 0,
    }


def test_every_response_is_kept_with_what_the_grader_read(out: Path, inputs: Path) -> None:
    lines = records(out / "one")
    rows = [json.loads(line) for line in (inputs / "sums.jsonl").read_text().splitlines()]
    assert [line["group"] for line in lines] == [row for row in range(11) if row != 3 for _ in range(SAMPLES)]
    for line in lines:
        assert (line["prompt"], line["answer"]) == (rows[line["group"]]["prompt"], rows[line["group"]]["answer"])
        boxes = re.findall(r"\\boxed\{(\d)\}", line["response"])
        assert line["extracted"] == (boxes[-1] if boxes else None)
        assert line["reward"] == float(line["extracted"] == line["answer"])
        assert len(line["rollout_logprobs"]) == len(line["response_tokens"]) <= 3
    assert {line["extracted"] for line in lines} == {None, "0", "1"}
    assert len(read_rollouts(out / "one" / "responses" / "sums.jsonl")) == QUESTIONS * SAMPLES


def test_two_processes_share_the_work_and_write_the_same(out: Path) -> None:
    for ours, theirs in zip(records(out / "one"), records(out / "two"), strict=True):
        assert ours.pop("rollout_logprobs") == pytest.approx(theirs.pop("rollout_logprobs"), rel=0, abs=1e-5)
        assert ours == theirs
    assert result(out / "two") == result(out / "one")


def test_several_files_and_their_first_questions(out: Path) -> None:
    found = result(out / "both")["data"]
    assert list(found) == ["sums", "more"]
    for name in found:
        assert (found[name]["num_questions"], found[name]["num_dropped"]) == (2, 0)
        assert found[name]["pass_at_k"].keys() == {"1", "3"}
        assert [line["response_tokens"] for line in records(out / "both", name)] == tokens(out / "one")[:8]


def test_an_internal_policy_answers(out: Path, inputs: Path) -> None:
    """Almost without noise every sample is the policy's most likely answer, as HuggingFace has it."""
    model = AutoModelForCausalLM.from_pretrained(inputs / "model", dtype=torch.float32).eval()
    for line in records(out / "greedy"):
        assert "rollout_logprobs" not in line
        given = list(line["prompt_tokens"])
        for token in line["response_tokens"]:
            with torch.no_grad():
                assert policy_logits(model, torch.tensor(given), PolicySpec.parse("layer:2"))[-1].argmax() == token
            given.append(token)
    assert result(out / "greedy")["policy"] == "layer:2"


def test_load_takes_the_weights_of_a_run_and_of_a_converted_checkpoint(out: Path) -> None:
    assert tokens(out / "run") == tokens(out / "run2") == tokens(out / "export") != tokens(out / "one")
    assert tokens(out / "converted") == tokens(out / "one")
    assert tokens(out / "inner") != tokens(out / "run")
    assert result(out / "run")["model"].startswith("model with the weights of ")
    assert {line["weight_version"] for line in records(out / "run")} == {"iter_0000002"}


def test_tensorboard_has_a_point_for_each_step_that_was_evaluated(out: Path) -> None:
    board = EventAccumulator(str(out / "board"))
    board.Reload()
    points = {event.step: event.value for event in board.Scalars("eval/sums/avg_at_n")}
    assert points.keys() == {0, 2}
    for step, name in ((0, "one"), (2, "run")):
        assert points[step] == pytest.approx(result(out / name)["data"]["sums"]["avg_at_n"], rel=1e-6)
    assert "eval/sums/pass_at_k/4" in board.Tags()["scalars"]


def test_a_stopped_evaluation_goes_on(out: Path, inputs: Path, tmp_path: Path) -> None:
    """A kill leaves whole pieces and maybe half a line; what is there is not answered again."""
    stopped = tmp_path / "stopped"
    shutil.copytree(out / "one", stopped)
    (stopped / "evaluation.json").unlink()
    file = stopped / "responses" / "sums.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    first = json.dumps(json.loads(lines[0]) | {"mark": 1}) + "\n"
    file.write_text(first + "".join(lines[1:13]) + lines[13][:50])
    assert main(words_of(inputs, stopped)) == 0
    ended = records(stopped)
    assert ended[0].pop("mark") == 1
    for ours, theirs in zip(ended, records(out / "one"), strict=True):
        assert ours.pop("rollout_logprobs") == pytest.approx(theirs.pop("rollout_logprobs"), rel=0, abs=1e-5)
        assert ours == theirs
    assert result(stopped) == result(out / "one")


@pytest.fixture
def refused(inputs: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(words: list[str]) -> str:
        capsys.readouterr()
        assert main(words) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert len(printed.err.splitlines()) == 1, printed.err
        return printed.err.removeprefix("megatron-bupo: error: ")

    return run


def test_other_settings_do_not_go_on(
    out: Path, inputs: Path, tmp_path: Path, refused: Callable[[list[str]], str]
) -> None:
    stopped = tmp_path / "stopped"
    shutil.copytree(out / "one", stopped)
    (stopped / "evaluation.json").unlink()
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    given = ["--seed", "1", "--rollout-temperature", "0.5", "--policy", "layer:1", "--n-samples-per-prompt", "2"]
    line = refused(words_of(inputs, stopped, *given))
    for change in ("seed: 1234 then, 1 now", "temperature: 1.0 then, 0.5 now", "policy: full then, layer:1 now"):
        assert change in line
    assert "samples of sums: 4 then, 2 now" in line
    line = refused(words_of(inputs, stopped, "--prompt-data", str(inputs / "more.jsonl")))
    assert "data of more: nothing then, " in line and "data of sums: " in line
    assert "weights: of the model then, " in refused(words_of(inputs, stopped, "--load", str(inputs / "converted")))
    assert "another evaluation" in refused(words_of(inputs, stopped, "--hf-model", str(inputs / "export")))
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before


def test_a_checkpoint_of_another_model_is_refused(
    inputs: Path, out: Path, tmp_path: Path, refused: Callable[[list[str]], str]
) -> None:
    write_model(configs()["llama-tied"], tmp_path / "other")
    shutil.copy(inputs / "model" / "tokenizer.json", tmp_path / "other")
    load = ["--hf-model", str(tmp_path / "other"), "--load", str(inputs / "converted")]
    assert "its config.json is of another model" in refused(words_of(inputs, tmp_path / "refused", *load))
    assert not (tmp_path / "refused").exists()


def test_comparison(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Row of the table against numpy, and the sign test against the outcomes one by one."""
    capsys.readouterr()
    assert main(["evaluate", "--compare", str(out / "one"), str(out / "run" / "evaluation.json")]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("sums"))
    one, other = (
        np.array([line["reward"] for line in records(out / name)]).reshape(QUESTIONS, SAMPLES).mean(axis=1)
        for name in ("one", "run")
    )
    gains = other - one
    wins, losses = int((gains > 0).sum()), int((gains < 0).sum())
    assert wins + losses > 0
    splits = [bin(outcome).count("1") for outcome in range(2 ** (wins + losses))]
    p_value = np.mean([abs(2 * split - wins - losses) >= abs(wins - losses) for split in splits])
    assert [cell.strip() for cell in row.split("│")] == [
        "sums",
        f"{100 * one.mean():.2f}",
        f"{100 * other.mean():.2f}",
        f"{100 * gains.mean():+.2f}",
        f"{100 * gains.std(ddof=1) / QUESTIONS**0.5:.2f}",
        str(wins),
        str(losses),
        str(QUESTIONS - wins - losses),
        f"{p_value:.4f}",
    ]


def test_a_comparison_says_what_else_differs(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["evaluate", "--compare", str(out / "one"), str(out / "run")]) == 0
    assert "not the same" not in capsys.readouterr().out
    assert main(["evaluate", "--compare", str(out / "one"), str(out / "greedy")]) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not the same: ")]
    assert notes == ["not the same: policy: full and layer:2", "not the same: temperature: 1.0 and 0.0001"]


def test_results_that_cannot_be_compared(
    out: Path, inputs: Path, tmp_path: Path, refused: Callable[[list[str]], str]
) -> None:
    def compare(other: Path) -> str:
        return refused(["evaluate", "--compare", str(out / "one"), str(other)])

    assert "sums has 10 questions in" in (line := compare(out / "both")) and "2 in" in line
    assert "has no evaluation.json" in compare(inputs)
    shutil.copytree(out / "one", tmp_path / "other")
    (tmp_path / "other" / "responses" / "sums.jsonl").rename(tmp_path / "other" / "responses" / "else.jsonl")
    assert "sums.jsonl: cannot be read (No such file or directory)" in compare(tmp_path / "other")
    text = (tmp_path / "other" / "evaluation.json").read_text().replace('"sums"', '"else"')
    (tmp_path / "other" / "evaluation.json").write_text(text)
    assert "give results of the same data" in compare(tmp_path / "other")
    (tmp_path / "other" / "evaluation.json").write_text('{"data": {"sums": {}}}')
    (tmp_path / "other" / "responses" / "sums.jsonl").write_text('{"group": 0}\n')
    assert "sums.jsonl:1: is no response of an evaluation" in compare(tmp_path / "other")
