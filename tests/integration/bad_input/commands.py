"""Command lines that run on intact files, and what is left of them when the files are broken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

PREFIX = "megatron-bupo: error: "
WEIGHTS = "model.safetensors"
COMMANDS = ("train", "replay", "score", "generate", "evaluate", "entropy-flow")
GOOD_ROW = '{"prompt": "w2 w3", "answer": 1}\n'


def words_of(command: str, case: Path, *flags: str) -> list[str]:
    """A command line that runs, but for `flags` (given again, a flag wins) and what was broken in `case`."""
    model = ["--hf-model", str(case / "model")]
    if command == "score":
        files = ["--rollouts", str(case / "rollouts" / "step_000001.jsonl"), "--output", str(case / "out" / "scores")]
        return ["score", *model, *files, *flags]
    if command == "entropy-flow":
        files = ["--rollouts", str(case / "rollouts" / "step_000001.jsonl"), "--output", str(case / "out" / "flow")]
        return ["entropy-flow", *model, *files, *flags]
    if command == "generate":
        files = ["--prompt-data", str(case / "prompts.jsonl"), "--output", str(case / "out" / "generated")]
        return ["generate", *model, *files, "--rollout-max-response-len", "4", *flags]
    if command == "evaluate":
        files = ["--prompt-data", str(case / "prompts.jsonl"), "--output", str(case / "out" / "evaluation")]
        return ["evaluate", *model, *files, "--rollout-max-response-len", "4", *flags]
    source = ["--load-rollouts", str(case / "rollouts")]
    if command == "train":
        source = ["--prompt-data", str(case / "prompts.jsonl"), "--reward", f"{case / 'reward.py'}:half"]
        source += ["--save-rollouts", str(case / "out" / "rollouts"), "--rollout-max-response-len", "4"]
    sizes = ["--train-iters", "2", "--rollout-batch-size", "2", "--n-samples-per-prompt", "2"]
    outputs = ["--save", str(case / "out" / "save"), "--save-hf", str(case / "out" / "hf")]
    return ["train", *model, *source, *sizes, *outputs, *flags]


def error_line(stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if line.startswith(PREFIX)]
    assert len(lines) == 1, stderr
    return lines[0].removeprefix(PREFIX)


def rewrite(model: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(model / WEIGHTS)
    change(tensors)
    save_file(tensors, model / WEIGHTS)
