"""The entropy flow of SmolLM2-135M: every number equals HuggingFace, whole, in two stages and on three ranks.

The truth is HuggingFace in float64. How far fp32 is from it depends on the CPU, and KL and norms go up to 1,000: so the
bound is the error of HuggingFace's own fp32 on the same machine, times a factor. The model's 9 heads cannot be divided
by two: TP is 3.
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
from tests.parallel.flow_reference import reference_flow, summarise
from tests.parallel.launch import assert_passed, torchrun
from tests.parallel.references import Float64

ANSWERS = {
    "What is 2+3?": "The answer is 5.",
    "Is 7 a prime number?": "Yes, 7 has no divisors but 1 and itself.",
}
# name: (processes, the kind of model parallelism)
LAYOUTS = {"one": (1, "pipeline"), "two": (2, "pipeline"), "three": (3, "tensor")}
NAMES = (*METRICS, *NORM_METRICS)
# Times the largest error of HuggingFace's fp32 at a single token. Seen with six kinds of rounding: 4.0, 0.3 and 0.2.
FACTORS = {"token": 10.0, "mean": 3.0, "error": 3.0}
FLOOR = 1e-6

Flow = dict[str, dict[str, Tensor]]
"""A metric's single tokens [L, T], mean [L] and standard error [L], as flow["token"], ["mean"], ["error"][metric]."""


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


def flow_of(values: dict[str, Tensor]) -> Flow:
    means, errors = summarise(values)
    return {"token": values, "mean": means, "error": errors}


def written_flow(folder: Path) -> Flow:
    layers = json.loads((folder / "entropy_flow.json").read_text())["layers"]

    def columns(prefix: str) -> dict[str, Tensor]:
        return {name: torch.tensor([layer[prefix + name] for layer in layers], dtype=torch.float64) for name in NAMES}

    with np.load(folder / "entropy_flow.npz") as tokens:
        token = {name: torch.from_numpy(tokens[name].astype(np.float64)) for name in NAMES}
    return {"token": token, "mean": columns(""), "error": columns("se_")}


def largest_error(numbers: Tensor, truth: Tensor, size: Tensor) -> float:
    """Of [L] or [L, T] numbers, relative to the size [L] of a layer's."""
    return float(((numbers.double() - truth).abs().T / size).max())


@pytest.fixture(scope="module")
def problems(model: Any, rollouts: list[Rollout]) -> Callable[[Flow], list[str]]:
    """Names the numbers of a flow that are farther from the truth than fp32 explains."""
    in_fp32 = reference_flow(model, rollouts, torch.float32)
    with Float64():
        truth = flow_of(reference_flow(model.double(), rollouts))
    model.float()
    sizes = {name: 1 + truth["token"][name].abs().amax(-1) for name in NAMES}
    own_error = {name: largest_error(in_fp32[name], truth["token"][name], sizes[name]) for name in NAMES}

    def found(flow: Flow) -> list[str]:
        off = []
        for kind, factor in FACTORS.items():
            for name in set(NAMES) - {"top1_full"}:
                error = largest_error(flow[kind][name], truth[kind][name], sizes[name])
                if not error <= factor * own_error[name] + FLOOR:
                    off.append(f"{kind} {name}: {error:.1e} off, HuggingFace's fp32 {own_error[name]:.1e}")
        # Whether the first choices agree is yes or no: in fp32 a near tie falls either way.
        agreement = flow["token"]["top1_full"]
        if not (agreement == truth["token"]["top1_full"]).double().mean() >= 0.99:
            off.append("token top1_full")
        if not (flow["mean"]["top1_full"] - agreement.double().mean(-1)).abs().max() <= FLOOR:
            off.append("mean top1_full")
        return sorted(off)

    return found


def test_smollm2_equals_huggingface(
    smollm2: Path, rollouts: list[Rollout], problems: Callable[[Flow], list[str]], tmp_path: Path
) -> None:
    write_rollouts(tmp_path / "rollouts.jsonl", rollouts)
    words = ["-m", "megatron_bupo", "entropy-flow", "--hf-model", smollm2, "--final-norm", "--per-token"]
    words += ["--rollouts", tmp_path / "rollouts.jsonl", "--heatmap-response", "2"]
    for name, (processes, kind) in LAYOUTS.items():
        layout = [f"--{kind}-model-parallel-size", processes]
        assert_passed(torchrun(processes, *words, *layout, "--output", tmp_path / name))
        assert problems(written_flow(tmp_path / name)) == [], name
        flow = json.loads((tmp_path / name / "entropy_flow.json").read_text())
        assert flow["num_tokens"] == sum(len(rollout.response_tokens) for rollout in rollouts)
        assert flow["final_entropy"] == pytest.approx(flow["layers"][-1]["resid@norm"], rel=1e-6)
        assert "".join(flow["heatmap"]["tokens"]) == ANSWERS["Is 7 a prime number?"]
        for figure in ("entropy_flow", "entropy_change", "residual_cosine", "agreement", "token_heatmap"):
            assert (tmp_path / name / f"{figure}.png").stat().st_size > 10_000
            assert (tmp_path / name / f"{figure}.pdf").stat().st_size > 5_000


def test_a_layer_that_is_off_by_a_thousandth_is_found(
    model: Any, rollouts: list[Rollout], problems: Callable[[Flow], list[str]]
) -> None:
    handle = model.model.layers[14].register_forward_hook(lambda layer, inputs, output: output * 1.001)
    try:
        off = problems(flow_of(reference_flow(model, rollouts, torch.float32)))
    finally:
        handle.remove()
    named = {line.partition(":")[0] for line in off}
    continuous = {"resid", "attn", "ffn", "d_layer", "resid_norm", "kl_full", "resid@norm", "cos_ffn"}
    assert named >= {f"{kind} {name}" for kind in FACTORS for name in continuous}, off
