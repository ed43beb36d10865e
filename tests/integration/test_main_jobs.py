"""The two main jobs as a user runs them: `make demo`, and SmolLM2 on word problems."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from megatron_bupo.analysis.plots import read_metrics
from megatron_bupo.data.rollout_files import read_rollouts, step_file
from tests.integration.conftest import ROOT
from tests.parallel.launch import assert_passed, torchrun


def test_demo_learns_with_bupo_and_with_grpo(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, "examples/demo.py", "--output", str(tmp_path / "demo")]
    result = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
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
    subprocess.run(
        [sys.executable, "tools/make_word_problems.py", "--output", str(problems), "--num-prompts", "8"],
        cwd=ROOT,
        check=True,
    )
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
