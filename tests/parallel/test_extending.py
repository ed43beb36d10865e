"""A loss, an estimator and a metric from docs/extending.md in a real run, over the switch of phases, in a pipeline."""

import json
from pathlib import Path

from tests.parallel.launch import assert_passed, torchrun
from tests.unit.pages import write_block


def test_a_run_with_ones_own_loss_and_estimator(train_cases: Path, tmp_path: Path) -> None:
    loss = f"{write_block('extending.md', 'mine_loss.py', tmp_path)}:gspo"
    estimator = f"{write_block('extending.md', 'mine_estimator.py', tmp_path)}:median_and_length"
    words = ["train", "--hf-model", str(train_cases / "qwen3-tied"), "--load-rollouts", str(train_cases / "rollouts")]
    words += ["--train-iters", "2", "--policy-schedule", "layer:2x1,full", "--global-batch-size", "4", "--lr", "1e-3"]
    words += ["--rollout-batch-size", "4", "--n-samples-per-prompt", "2", "--pipeline-model-parallel-size", "2"]
    words += ["--loss", loss, "--advantage-estimator", estimator, "--loss-aggregation", "seq-mean"]
    assert_passed(torchrun(2, "-m", "megatron_bupo", *words, "--save", str(tmp_path / "run")))
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step["phase"] for step in steps] == ["layer:2", "full"]
    for step in steps:
        assert step["sequence_ratio"] != 1.0, "the second optimizer step is off the policy that wrote"
        assert abs(step["sequence_ratio"] - 1) < 0.5
        assert "clip_frac" not in step, "a metric of another loss"
    flags = json.loads((tmp_path / "run" / "run.json").read_text())["flags"]["algorithm"]
    assert (flags["loss"], flags["advantage_estimator"]) == (loss, estimator)


def test_a_loss_that_returns_nonsense_ends_with_one_line(train_cases: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def loss(inputs):\n    return inputs.logprobs.mean()\n")
    words = ["train", "--hf-model", str(train_cases / "qwen3-tied"), "--load-rollouts", str(train_cases / "rollouts")]
    words += ["--train-iters", "1", "--rollout-batch-size", "4", "--n-samples-per-prompt", "2"]
    result = torchrun(1, "-m", "megatron_bupo", *words, "--loss", f"{tmp_path / 'mine.py'}:loss")
    assert result.returncode != 0
    assert f"--loss {tmp_path / 'mine.py'}:loss: it returned a Tensor; it must return LossOutputs" in result.stderr
    assert "Traceback" not in result.stderr.partition("megatron-bupo: error")[0]
