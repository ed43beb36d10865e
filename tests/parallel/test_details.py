"""--dump-details and --profile-steps: the tokens' numbers are those of `score`, in the order of the records."""

from __future__ import annotations

import gzip
import json
import statistics
from pathlib import Path

import pytest

from tests.parallel.launch import LAYOUTS, assert_passed, run_python, torchrun


@pytest.mark.parametrize("layout", ["PP2", "DP2"])
def test_the_numbers_of_every_token(layout: str, train_cases: Path, tmp_path: Path) -> None:
    processes, flags = LAYOUTS[layout]
    model, rollouts = train_cases / "qwen3-tied", train_cases / "rollouts" / "step_000001.jsonl"
    words = ["train", "--hf-model", model, "--load-rollouts", train_cases / "rollouts", "--train-iters", "2", *flags]
    words += ["--policy-schedule", "layer:2x1,full", "--rollout-batch-size", "4", "--n-samples-per-prompt", "2"]
    words += ["--global-batch-size", "4", "--lr", "1e-3", "--kl-loss-coef", "0.1", "--max-tokens-per-micro-batch", "60"]
    words += ["--dump-details", tmp_path / "details", "--save", tmp_path / "run", "--profile-steps", "2"]
    assert_passed(torchrun(processes, "-m", "megatron_bupo", *map(str, words)))
    scored = tmp_path / "scores.jsonl"
    given = ["--hf-model", model, "--rollouts", rollouts, "--policy", "layer:2", "--output", scored]
    assert_passed(run_python("-m", "megatron_bupo", "score", *given))

    details = [json.loads(line) for line in (tmp_path / "details" / "step_000001.jsonl").read_text().splitlines()]
    records = [json.loads(line) for line in rollouts.read_text().splitlines()]
    scores = [json.loads(line) for line in scored.read_text().splitlines()]
    assert len(details) == len(records) == 8
    for detail, record, score in zip(details, records, scores, strict=True):
        assert (detail["response_tokens"], detail["group"]) == (record["response_tokens"], record["group"])
        # The policy from the start of the step, in both mini-batches; it is the reference too.
        assert detail["old_logprobs"] == pytest.approx(score["logprobs"], abs=2e-5)
        assert detail["ref_logprobs"] == pytest.approx(score["logprobs"], abs=2e-5)
        assert detail["old_entropy"] == pytest.approx(score["entropy"], abs=2e-5)
        rewards = [other["reward"] for other in records if other["group"] == record["group"]]
        advantage = (record["reward"] - statistics.fmean(rewards)) / (statistics.stdev(rewards) + 1e-6)
        assert detail["advantages"] == pytest.approx([advantage] * len(record["response_tokens"]), abs=1e-5)
    traces = sorted(path.name for path in (tmp_path / "run" / "profile").iterdir())
    assert traces == [f"step_000002_rank_{rank}.json.gz" for rank in range(processes)]
    with gzip.open(tmp_path / "run" / "profile" / traces[0], "rt") as file:
        names = {event.get("name", "") for event in json.load(file)["traceEvents"]}
    assert any("mm" in name for name in names)
