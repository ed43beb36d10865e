"""`entropy-flow` as a user runs it: on prompts that it answers first, in bf16, and what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_bupo.data.rollout_files import read_rollouts
from tests.parallel.launch import assert_passed, torchrun
from tests.parallel.test_generation import write_inputs

FIGURES = ("entropy_flow", "entropy_change", "residual_cosine", "agreement", "token_heatmap")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flow_command")
    write_inputs(folder)
    return folder


def entropy_flow(folder: Path, output: str, *flags: str, processes: int = 1) -> dict[str, Any]:
    words = ["-m", "megatron_bupo", "entropy-flow", "--hf-model", str(folder / "model")]
    assert_passed(torchrun(processes, *words, "--output", str(folder / output), *flags))
    flow: dict[str, Any] = json.loads((folder / output / "entropy_flow.json").read_text())
    return flow


def column(flow: dict[str, Any], name: str) -> np.ndarray:
    return np.array([layer[name] for layer in flow["layers"]])


def test_prompts_are_answered_and_measured(folder: Path) -> None:
    prompts = ["--prompt-data", str(folder / "prompts.jsonl"), "--num-prompts", "3", "--n-samples-per-prompt", "2"]
    prompts += ["--rollout-max-response-len", "9", "--seed", "5"]
    answered = entropy_flow(folder, "answered", *prompts, "--per-token", "--heatmap-response", "2", processes=2)
    rollouts = read_rollouts(folder / "answered" / "rollouts.jsonl")
    assert [rollout.group for rollout in rollouts] == [0, 0, 1, 1, 2, 2]
    lengths = [len(rollout.response_tokens) for rollout in rollouts]
    assert (answered["num_responses"], answered["num_tokens"]) == (6, sum(lengths))
    written = sorted(path.name for path in (folder / "answered").iterdir())
    figures = [f"{name}.{suffix}" for name in FIGURES for suffix in ("png", "pdf")]
    assert written == sorted(["entropy_flow.json", "entropy_flow.npz", "rollouts.jsonl", *figures])
    with np.load(folder / "answered" / "entropy_flow.npz") as tokens:
        assert tokens["response"].tolist() == np.repeat(np.arange(1, 7), lengths).tolist()
        assert tokens["token"].tolist() == [token for rollout in rollouts for token in rollout.response_tokens]
        assert abs(tokens["resid"].astype(float).mean(axis=1) - column(answered, "resid")).max() < 1e-6
    heatmap = answered["heatmap"]
    assert heatmap["response"] == 2
    assert heatmap["tokens"] == [f"w{t}" if t > 1 else ["<eos>", "<unk>"][t] for t in rollouts[1].response_tokens]
    again = entropy_flow(folder, "again", "--rollouts", str(folder / "answered" / "rollouts.jsonl"))
    for name in ("resid", "d_ffn", "kl_full", "se_resid"):
        assert abs(column(again, name) - column(answered, name)).max() < 1e-5, name
    assert "resid@norm" not in again["layers"][0]


def test_bf16_is_near_fp32(folder: Path) -> None:
    prompts = ["--prompt-data", str(folder / "prompts.jsonl"), "--rollout-max-response-len", "9"]
    full = entropy_flow(folder, "fp32", *prompts)
    half = entropy_flow(folder, "bf16", "--rollouts", str(folder / "fp32" / "rollouts.jsonl"), "--bf16")
    for name in ("resid", "attn", "ffn", "d_ffn", "cos_attn", "kl_full"):
        assert abs(column(half, name) - column(full, name)).max() < 0.02, name
    assert abs(column(half, "resid") - column(full, "resid")).max() > 0  # it did run in bf16
    assert abs(column(half, "resid_norm") / column(full, "resid_norm") - 1).max() < 0.01


def test_without_a_tokenizer_the_heatmap_has_ids(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / name).write_bytes((folder / "model" / name).read_bytes())
    foreign = {"group": 0, "prompt_tokens": [5], "response_tokens": [6, 6], "response_mask": [0, 0]}
    record = {"group": 0, "prompt_tokens": [5], "response_tokens": [7, 8, 9], "response_mask": [1, 0, 1]}
    (tmp_path / "rollouts.jsonl").write_text(f"{json.dumps(foreign)}\n{json.dumps(record)}\n")
    flow = entropy_flow(tmp_path, "flow", "--rollouts", str(tmp_path / "rollouts.jsonl"))
    assert (flow["heatmap"]["response"], flow["heatmap"]["tokens"]) == (2, ["7", "9"])
    assert flow["num_responses"] == 1
    assert flow["num_tokens"] == 2
    assert flow["selection"]["stable"] is False  # one response cannot be resampled
