"""The entropy flow of SmolLM2-135M: every number equals HuggingFace, whole, in two stages and on three ranks.

Its 9 heads cannot be divided by two: TP is 3.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_bupo.analysis.flow_file import METRICS, NORM_METRICS
from megatron_bupo.data.rollout_files import write_rollouts
from megatron_bupo.samples import Rollout
from tests.parallel.flow_reference import reference_flow, summarise
from tests.parallel.launch import assert_passed, torchrun

ANSWERS = {
    "What is 2+3?": "The answer is 5.",
    "Is 7 a prime number?": "Yes, 7 has no divisors but 1 and itself.",
}


@pytest.fixture(scope="module")
def rollouts(smollm2: Path) -> list[Rollout]:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    written = []
    for group, (question, answer) in enumerate(ANSWERS.items()):
        message = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]
        written.append(Rollout(group, list(prompt), tokenizer.encode(answer, add_special_tokens=False)))
    return written


def test_smollm2_equals_huggingface(smollm2: Path, rollouts: list[Rollout], tmp_path: Path) -> None:
    write_rollouts(tmp_path / "rollouts.jsonl", rollouts)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32, attn_implementation="eager").eval()
    values = reference_flow(model, rollouts)
    means, errors = summarise(values)
    del model
    words = ["-m", "megatron_bupo", "entropy-flow", "--hf-model", str(smollm2), "--final-norm", "--per-token"]
    words += ["--rollouts", str(tmp_path / "rollouts.jsonl"), "--heatmap-response", "2"]
    layouts = {"one": (1, "pipeline"), "two": (2, "pipeline"), "three": (3, "tensor")}
    for name, (processes, kind) in layouts.items():
        layout = [f"--{kind}-model-parallel-size", str(processes)]
        assert_passed(torchrun(processes, *words, *layout, "--output", str(tmp_path / name)))
        flow = json.loads((tmp_path / name / "entropy_flow.json").read_text())
        assert flow["num_tokens"] == sum(len(rollout.response_tokens) for rollout in rollouts)
        assert abs(flow["final_entropy"] - float(means["full"])) < 1e-3
        with np.load(tmp_path / name / "entropy_flow.npz") as tokens:
            for metric in (*METRICS, *NORM_METRICS):
                mean = torch.tensor([layer[metric] for layer in flow["layers"]], dtype=torch.float64)
                error = torch.tensor([layer[f"se_{metric}"] for layer in flow["layers"]], dtype=torch.float64)
                assert (mean - means[metric]).abs().max() < 1e-3, metric
                assert (error - errors[metric]).abs().max() < 1e-3, metric
                single = torch.from_numpy(tokens[metric].astype(np.float64))
                # KL and norms of single tokens go up to 1,000, in fp32.
                assert ((single - values[metric]).abs() < 1e-3 + 1e-5 * values[metric].abs()).all(), metric
        assert "".join(flow["heatmap"]["tokens"]) == ANSWERS["Is 7 a prime number?"]
        for figure in ("entropy_flow", "entropy_change", "residual_cosine", "agreement", "token_heatmap"):
            assert (tmp_path / name / f"{figure}.png").stat().st_size > 10_000
            assert (tmp_path / name / f"{figure}.pdf").stat().st_size > 5_000
