"""The entropy flow of SmolLM2-135M: every number equals HuggingFace, whole, in two stages and on three ranks.

KL and norms go up to 1,000 here. The model's 9 heads cannot be divided by two: TP is 3.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_bupo.analysis.flow_file import METRICS, NORM_METRICS
from megatron_bupo.data.rollout_files import write_rollouts
from megatron_bupo.samples import Rollout
from tests.parallel.flow_reference import FACTORS, Flow, flow_of, problems, reference_flow
from tests.parallel.launch import assert_passed, torchrun
from tests.parallel.references import Float64

ANSWERS = {
    "What is 2+3?": "The answer is 5.",
    "Is 7 a prime number?": "Yes, 7 has no divisors but 1 and itself.",
}
# name: (processes, the kind of model parallelism)
LAYOUTS = {"one": (1, "pipeline"), "two": (2, "pipeline"), "three": (3, "tensor")}
NAMES = (*METRICS, *NORM_METRICS)


@pytest.fixture(scope="module")
def rollouts(smollm2: Path) -> list[Rollout]:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    written = []
    for group, (question, answer) in enumerate(ANSWERS.items()):
        message = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]
        written.append(Rollout(group, list(prompt), tokenizer.encode(answer, add_special_tokens=False)))
    return written


@pytest.fixture(scope="module")
def model(smollm2: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32, attn_implementation="eager").eval()


def written_flow(folder: Path) -> Flow:
    layers = json.loads((folder / "entropy_flow.json").read_text())["layers"]

    def columns(prefix: str) -> dict[str, Tensor]:
        return {name: torch.tensor([layer[prefix + name] for layer in layers], dtype=torch.float64) for name in NAMES}

    with np.load(folder / "entropy_flow.npz") as tokens:
        token = {name: torch.from_numpy(tokens[name].astype(np.float64)) for name in NAMES}
    return {"token": token, "mean": columns(""), "error": columns("se_")}


@pytest.fixture(scope="module")
def off(model: Any, rollouts: list[Rollout]) -> Callable[[Flow], list[str]]:
    """What is wrong with a flow."""
    in_fp32 = reference_flow(model, rollouts, torch.float32)
    with Float64():
        truth = flow_of(reference_flow(model.double(), rollouts))
    model.float()
    return lambda flow: problems(flow, truth, in_fp32)


def test_smollm2_equals_huggingface(
    smollm2: Path, rollouts: list[Rollout], off: Callable[[Flow], list[str]], tmp_path: Path
) -> None:
    write_rollouts(tmp_path / "rollouts.jsonl", rollouts)
    words = ["-m", "megatron_bupo", "entropy-flow", "--hf-model", smollm2, "--final-norm", "--per-token"]
    words += ["--rollouts", tmp_path / "rollouts.jsonl", "--heatmap-response", "2"]
    for name, (processes, kind) in LAYOUTS.items():
        layout = [f"--{kind}-model-parallel-size", processes]
        assert_passed(torchrun(processes, *words, *layout, "--output", tmp_path / name))
        assert off(written_flow(tmp_path / name)) == [], name
        flow = json.loads((tmp_path / name / "entropy_flow.json").read_text())
        assert flow["num_tokens"] == sum(len(rollout.response_tokens) for rollout in rollouts)
        assert flow["final_entropy"] == pytest.approx(flow["layers"][-1]["resid@norm"], rel=1e-5)
        assert "".join(flow["heatmap"]["tokens"]) == ANSWERS["Is 7 a prime number?"]
        for figure in ("entropy_flow", "entropy_change", "residual_cosine", "agreement", "token_heatmap"):
            assert (tmp_path / name / f"{figure}.png").stat().st_size > 10_000
            assert (tmp_path / name / f"{figure}.pdf").stat().st_size > 5_000


def test_a_layer_that_is_off_by_a_thousandth_is_found(
    model: Any, rollouts: list[Rollout], off: Callable[[Flow], list[str]]
) -> None:
    handle = model.model.layers[14].register_forward_hook(lambda layer, inputs, output: output * 1.001)
    try:
        lines = off(flow_of(reference_flow(model, rollouts, torch.float32)))
    finally:
        handle.remove()
    named = {line.partition(":")[0] for line in lines}
    continuous = {"resid", "attn", "ffn", "d_layer", "resid_norm", "kl_full", "resid@norm", "cos_ffn"}
    assert named >= {f"{kind} {name}" for kind in FACTORS for name in continuous}, lines
