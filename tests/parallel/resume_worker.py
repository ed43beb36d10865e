"""In one process: stop a run after every step, go on, and end where the run that never stopped ended.

Arguments: CASES (from conftest's train_cases) and a scratch folder. Exits 1 if anything is off.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from megatron_bupo.__main__ import main as command
from megatron_bupo.analysis.plots import read_metrics
from tests.parallel.train_worker import LR

STEPS = 5
# name: (schedule, further flags); step 2 is the last of phase 1.
RUNS = {
    "fp32": ("layer:2x2,full", []),
    "bf16": ("layer:2x2,full", ["--bf16"]),
    "back to an internal policy": ("fullx2,attn:3x2,full", []),
}


def train_words(cases: Path, schedule: str) -> list[str]:
    words = ["train", "--hf-model", str(cases / "qwen3-tied"), "--load-rollouts", str(cases / "rollouts")]
    words += ["--policy-schedule", schedule, "--train-iters", str(STEPS), "--rollout-batch-size", "4"]
    words += ["--n-samples-per-prompt", "2", "--global-batch-size", "4", "--lr", str(LR), "--adam-eps", "1e-3"]
    return [*words, "--lr-decay-style", "cosine", "--kl-loss-coef", "0.1"]


def timeless(run: Path) -> list[dict[str, object]]:
    """A run's metrics without what a clock says."""
    return [
        {key: value for key, value in step.items() if not key.startswith("time/") and key != "tokens_per_s"}
        for step in read_metrics(run)
    ]


def differences(first: Path, second: Path) -> list[str]:
    """Tensors of two exports that are not the same to the bit."""
    one, other = (load_file(folder / "model.safetensors") for folder in (first, second))
    return [name for name in one | other if not torch.equal(one[name], other[name])]


def stopped_after(run: Path, step: int, copy: Path) -> None:
    """The folder as a kill after `step` leaves it: with a checkpoint half written, and lines of a later step."""
    shutil.copytree(run, copy)
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(copy / f"iter_{later:07d}")
    (copy / f".iter_{step + 1:07d}.partial").mkdir()
    (copy / "latest_checkpointed_iteration.txt").write_text(f"{step}\n")
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(lines[: step + 1]) + '{"step": ')


def main() -> None:
    cases, scratch = Path(sys.argv[1]), Path(sys.argv[2])
    problems = []
    for name, (schedule, flags) in RUNS.items():
        words = [*train_words(cases, schedule), *flags]
        whole = scratch / name
        assert command([*words, "--save", str(whole), "--save-interval", "1", "--save-hf", str(whole / "out")]) == 0
        for step in range(1, STEPS):
            run = scratch / f"{name} {step}"
            stopped_after(whole, step, run)
            shutil.rmtree(run / "out")
            again = ["--save", str(run), "--load", str(run), "--save-hf", str(run / "out")]
            assert command([*words, *again]) == 0
            problems += [f"{name}, after step {step}: {tensor}" for tensor in differences(whole / "out", run / "out")]
            if timeless(whole) != timeless(run):
                problems.append(f"{name}, after step {step}: other metrics")
    if problems:
        sys.exit("\n".join(f"off: {problem}" for problem in problems))


if __name__ == "__main__":
    main()
