"""`generate` with several policies as a user runs it: the file, the table, and what one policy alone gives."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_bupo.__main__ import main
from megatron_bupo.data.rollout_files import read_rollouts
from megatron_bupo.policy_spec import PolicySpec
from tests.parallel.launch import assert_passed, run_python, torchrun
from tests.parallel.references import policy_logits
from tests.parallel.test_generation import Run, generate, write_inputs

POLICIES = ["layer:2", "full", "ffn:3@norm"]
PROMPTS, SAMPLES = 10, 3


@dataclass(frozen=True)
class Command(Run):
    """The folder of a finished command, and what it printed."""

    result: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("side_by_side")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def runs(inputs: Path) -> dict[str, Command]:
    def run(name: str, processes: int, *policies: str) -> Command:
        words = ["-m", "megatron_bupo", *generate(inputs, inputs / name)]
        words += ["--rollout-temperature", "0.8", "--policy", *policies]
        result = run_python(*words) if processes == 1 else torchrun(processes, *words)
        assert_passed(result)
        return Command(inputs / name, result)

    return {
        "several": run("several", 1, *POLICIES),
        "several2": run("several2", 2, *POLICIES),
        "layer:2": run("layer:2", 1, "layer:2"),
        "full": run("full", 1, "full"),
    }


def blocks(run: Command) -> dict[str, list[dict[str, Any]]]:
    """The records of each policy, which stand one policy after the other; their key `policy` is taken off."""
    lines = run.lines()
    size = PROMPTS * SAMPLES
    assert [line["policy"] for line in lines] == [policy for policy in POLICIES for _ in range(size)]
    bare = [{name: value for name, value in line.items() if name != "policy"} for line in lines]
    return {
        policy: bare[start : start + size] for policy, start in zip(POLICIES, range(0, len(bare), size), strict=True)
    }


def table(run: Command) -> list[list[list[str]]]:
    """The words of each row of the table, by column."""
    rows = [line.split("│") for line in run.result.stdout.splitlines() if line.strip()[:1].isdigit()]
    return [[cell.split() for cell in row] for row in rows]


def test_a_policy_alone_says_the_same(runs: dict[str, Command]) -> None:
    """The same noise, whoever else is asked; and a file of one policy is what it was before there could be several."""
    together = blocks(runs["several"])
    keys = {"group", "prompt_tokens", "response_tokens", "prompt", "response", "answer", "finish_reason"}
    keys |= {"weight_version"}
    for policy in ("layer:2", "full"):
        alone = runs[policy]
        assert alone.lines() == together[policy]
        out = alone.folder / "out.jsonl"
        assert alone.result.stdout == f"{out}: 30 responses from {policy}, 0 prompts dropped\n"
        for record in alone.lines():
            assert record.keys() == (keys | {"rollout_logprobs"} if policy == "full" else keys)
    for policy in POLICIES:
        assert [record["group"] for record in together[policy]] == [g for g in range(PROMPTS) for _ in range(SAMPLES)]
    assert together["ffn:3@norm"][0].keys() == keys
    tokens = [[record["response_tokens"] for record in together[policy]] for policy in POLICIES]
    assert tokens[0] != tokens[1] != tokens[2]


def test_two_processes_write_and_print_the_same(runs: dict[str, Command]) -> None:
    for ours, theirs in zip(runs["several"].lines(), runs["several2"].lines(), strict=True):
        # Two processes batch other responses together: the log-probs are the same but for rounding.
        assert ours.pop("rollout_logprobs", []) == pytest.approx(theirs.pop("rollout_logprobs", []), rel=0, abs=1e-5)
        assert ours == theirs
    one, two = (runs[name].result.stdout.splitlines()[1:] for name in ("several", "several2"))
    assert two == one  # the first line names the file


def test_the_table_tells_the_policies_apart(runs: dict[str, Command], inputs: Path) -> None:
    """Every cell against HuggingFace, behind the first policy's response."""
    run = runs["several"]
    record = blocks(run)["layer:2"][0]
    response = record["response_tokens"]
    model = AutoModelForCausalLM.from_pretrained(inputs / "model", dtype=torch.float32).eval()
    ids = torch.tensor(record["prompt_tokens"] + response)
    rows = table(run)
    assert [row[1] for row in rows] == [[word(token)] for token in response]
    for column, policy in enumerate(POLICIES, start=2):
        with torch.no_grad():
            logits = policy_logits(model, ids, PolicySpec.parse(policy))[len(record["prompt_tokens"]) - 1 : -1]
        top = (logits / 0.8).softmax(dim=-1).topk(3)
        for row, tokens, values in zip(rows, top.indices.tolist(), top.values.tolist(), strict=True):
            assert row[column][0::2] == [word(token) for token in tokens]
            assert [float(text) for text in row[column][1::2]] == pytest.approx(values, abs=0.0051)
    lines = run.result.stdout.splitlines()
    assert lines[1].split() == ["prompt", *record["prompt"].split()]
    for line, policy in zip(lines[2:5], POLICIES, strict=True):
        first = blocks(run)[policy][0]["response_tokens"]
        assert line.split() == [policy, *map(word, first)]


def word(token: int) -> str:
    """The spelling of an id in the tiny models' vocabulary."""
    return {0: "<eos>", 1: "<unk>"}.get(token, f"w{token}")


def test_the_file_can_be_read_back(runs: dict[str, Command]) -> None:
    rollouts = read_rollouts(runs["several"].folder / "out.jsonl")
    assert [rollout.policy for rollout in rollouts[::30]] == POLICIES
    assert read_rollouts(runs["full"].folder / "out.jsonl")[0].policy is None


def test_a_layer_beyond_the_model_is_refused(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*generate(inputs, inputs / "refused"), "--policy", "full", "layer:99"]
    capsys.readouterr()
    assert main(words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "megatron-bupo: error: policy 'layer:99': the model has layers 1 to 4\n"
    assert not (inputs / "refused").exists()
