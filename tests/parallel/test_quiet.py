"""What a run prints: whose kernels it computes with, then its own lines; no warnings of libraries about each other."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from megatron_bupo.data.rollout_files import step_file
from tests.parallel.launch import assert_passed, run_several, torchrun
from tests.parallel.resume_worker import train_words

FLAGS = ["--bf16", "--use-distributed-optimizer", "--tensor-model-parallel-size", "2", "--sequence-parallel"]
FLAGS += ["--recompute-granularity", "selective"]
PARTS = ["attention", "norms", "rope", "SwiGLU", "unembedding"]
TORCH = f"torch {torch.__version__}"


def test_training_says_whose_kernels_and_warns_of_nothing(train_cases: Path, tmp_path: Path) -> None:
    words = [*train_words(train_cases, "layer:2x2,full"), "--save", str(tmp_path / "run"), "--save-interval", "5"]
    result = torchrun(2, "-m", "megatron_bupo", *words, *FLAGS)
    assert_passed(result)
    assert "Warning" not in result.stderr, result.stderr
    parts = [*PARTS, "optimizer"]
    assert result.stdout.splitlines()[0] == f"kernels: {TORCH} ({', '.join(parts)})"
    assert json.loads((tmp_path / "run" / "run.json").read_text())["kernels"] == dict.fromkeys(parts, TORCH)


def test_measurements_say_whose_kernels(train_cases: Path, tmp_path: Path) -> None:
    words = ["--hf-model", str(train_cases / "qwen3-tied"), "--rollouts", str(step_file(train_cases / "rollouts", 1))]
    commands = [
        ["-m", "megatron_bupo", command, *words, "--output", str(tmp_path / command)]
        for command in ("score", "entropy-flow")
    ]
    for printed in run_several(1, *commands):
        assert printed.strip().splitlines()[0] == f"kernels: {TORCH} ({', '.join(PARTS)})"
