"""The examples of docs/extending.md in real runs, over the switch of phases: from files outside, and built in."""

import json
import statistics
from pathlib import Path

import pytest
from transformers import MistralConfig

from megatron_bupo.data.rollout_files import read_rollouts, step_file
from megatron_bupo.samples import Rollout
from megatron_bupo.user_code import UserFunction
from tests.parallel.launch import assert_passed, run_python, torchrun
from tests.parallel.references import SIZES
from tests.parallel.test_generation import write_inputs
from tests.unit.pages import extended_project, write_block

PAGE = "extending.md"


def test_a_run_with_ones_own_loss_and_estimator(train_cases: Path, tmp_path: Path) -> None:
    loss = f"{write_block(PAGE, 'mine_loss.py', tmp_path)}:gspo"
    estimator = f"{write_block(PAGE, 'mine_estimator.py', tmp_path)}:median_and_length"
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
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["loss"].startswith("mine_loss.py:gspo (sha256 ")
    assert run["advantage_estimator"].startswith("mine_estimator.py:median_and_length (sha256 ")


def expected_loss(rollouts: list[Rollout]) -> float:
    """Of the full policy with the weights that wrote: -3 x the token mean of advantage x the engine's log-prob."""
    total = 0.0
    for one in rollouts:
        assert one.reward is not None and one.rollout_logprobs is not None
        mean = statistics.fmean(float(other.reward or 0) for other in rollouts if other.group == one.group)
        total += ((one.reward > mean) - (one.reward < mean)) * sum(one.rollout_logprobs)
    assert total != 0, "the groups have responses of different rewards"
    return -3 * total / sum(len(one.response_tokens) for one in rollouts)


def test_a_run_with_what_the_page_builds_in(tmp_path: Path) -> None:
    """The family, the loss with its flag, the estimator, the metric and the reward; responses of the embedded engine.

    That engine is HuggingFace's model: where its log-probs give the same loss, the new family's numbers are right.
    """
    project = extended_project(PAGE, tmp_path / "project")
    write_inputs(tmp_path, MistralConfig(**SIZES, head_dim=24, sliding_window=None))
    reward, out = write_block(PAGE, "mine_reward.py", tmp_path), tmp_path / "run"
    words = ["train", "--hf-model", str(tmp_path / "model"), "--prompt-data", str(tmp_path / "prompts.jsonl")]
    words += ["--train-iters", "2", "--policy-schedule", "layer:2x1,full", "--lr", "1e-3", "--save", str(out)]
    words += ["--rollout-batch-size", "4", "--n-samples-per-prompt", "2", "--rollout-max-response-len", "12"]
    words += ["--reward", f"{reward}:short_and_right", "--save-rollouts", str(tmp_path / "rollouts")]
    words += ["--loss", "policy-gradient", "--gradient-weight", "3", "--advantage-estimator", "sign"]
    assert_passed(run_python("-m", "megatron_bupo", *words, project=project))
    score = UserFunction.parse("--reward", f"{reward}:short_and_right", "record", ()).load()
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [step["phase"] for step in steps] == ["layer:2", "full"]
    for step in steps:
        rollouts = read_rollouts(step_file(tmp_path / "rollouts", step["step"]))
        rewards = [score(vars(rollout)) for rollout in rollouts]
        assert [rollout.reward for rollout in rollouts] == pytest.approx(rewards)
        assert step["reward_max"] == pytest.approx(max(rewards))
    assert steps[1]["loss"] == [pytest.approx(expected_loss(rollouts), rel=1e-3)]
    assert json.loads((out / "run.json").read_text())["flags"]["algorithm"]["losses"]["policy_gradient"] == {
        "gradient_weight": 3.0
    }


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ("inputs.logprobs.mean()", "it returned a Tensor; it must return LossOutputs"),
        ("LossOutputs(inputs.logprobs / 0)", "it returned numbers that are not finite, at "),
        ("LossOutputs(inputs.logprobs, {'step': inputs.entropy})", "its metric 'step' has the name of another number"),
    ],
)
def test_a_loss_that_returns_nonsense_ends_with_one_line(
    returned: str, said: str, train_cases: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(f"from megatron_bupo.rl.loss import LossOutputs\n\n\ndef loss(inputs):\n    return {returned}\n")
    words = ["train", "--hf-model", str(train_cases / "qwen3-tied"), "--load-rollouts", str(train_cases / "rollouts")]
    words += ["--train-iters", "1", "--rollout-batch-size", "4", "--n-samples-per-prompt", "2"]
    result = torchrun(1, "-m", "megatron_bupo", *words, "--loss", f"{mine}:loss")
    assert result.returncode != 0
    assert f"--loss {mine}:loss: {said}" in result.stderr
    assert "Traceback" not in result.stderr.partition("megatron-bupo: error")[0]
