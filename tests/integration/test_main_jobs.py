"""The two main jobs as a user runs them: `make demo`, and SmolLM2 on word problems."""

from __future__ import annotations

from pathlib import Path

from megatron_bupo.analysis.plots import read_metrics
from megatron_bupo.data.rollout_files import read_rollouts, step_file
from tests.parallel.launch import assert_passed, run_python, torchrun


def test_demo_learns_with_bupo_and_with_grpo(tmp_path: Path) -> None:
    result = run_python("examples/demo.py", "--output", tmp_path / "demo")
    assert_passed(result)
    for run, first_phase in (("bupo", "layer:2"), ("grpo", "full")):
        metrics = read_metrics(tmp_path / "demo" / run)
        rewards = [step["reward_mean"] for step in metrics]
        assert metrics[0]["phase"] == first_phase
        assert metrics[-1]["phase"] == "full"
        assert sum(rewards[-5:]) / 5 - sum(rewards[:5]) / 5 >= 0.2, rewards
        assert max(step["logprob_diff_max"] for step in metrics) < 1e-4
        assert list((tmp_path / "demo" / run / "tensorboard").iterdir())
    assert (tmp_path / "demo" / "rewards.png").stat().st_size > 10_000
    assert "accuracy before" in result.stdout


def test_smollm2_takes_a_step_in_each_phase(smollm2: Path, tmp_path: Path) -> None:
    problems = tmp_path / "problems.jsonl"
    assert_passed(run_python("tools/make_word_problems.py", "--output", problems, "--num-prompts", "8"))
    words = ["-m", "megatron_bupo", "train", "--config", "examples/smollm2_bupo.yaml", "--hf-model", str(smollm2)]
    words += ["--prompt-data", str(problems), "--train-iters", "2", "--internal-steps", "1"]
    words += ["--rollout-batch-size", "2", "--rollout-max-response-len", "48"]
    words += ["--save", str(tmp_path / "run"), "--save-rollouts", str(tmp_path / "rollouts")]
    assert_passed(torchrun(2, *words))
    metrics = read_metrics(tmp_path / "run")
    assert [step["phase"] for step in metrics] == ["layer:6", "full"]
    # The engine has the trainer's weights, also those of the step before.
    assert max(step["logprob_diff_max"] for step in metrics) < 1e-4
    for step in (1, 2):
        responses = read_rollouts(step_file(tmp_path / "rollouts", step))
        assert len(responses) == 8
        assert any(r"\boxed{" in (rollout.response or "") for rollout in responses)
