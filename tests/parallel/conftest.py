"""The proofs' cases are written once, by whichever layout asks first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_bupo.data.rollout_files import step_file, write_rollouts
from megatron_bupo.policy_spec import PolicySpec
from tests.parallel.flow_reference import flow_of, reference_flow, token_counts
from tests.parallel.references import (
    SPECS,
    TEMPERATURES,
    Float64,
    configs,
    random_rollouts,
    reference_scores,
    write_model,
)
from tests.parallel.train_reference import train_reference

# name: (model, schedule, the policy of each step). Every module, tied and untied, and a schedule that goes back.
TRAIN_CASES = {
    "layer": ("qwen3-tied", "layer:2x2,full", ["layer:2"] * 2 + ["full"] * 3),
    "attn": ("qwen2-untied", "attn:3x2,full", ["attn:3"] * 2 + ["full"] * 3),
    "ffn": ("llama-tied", "ffn:2x2,full", ["ffn:2"] * 2 + ["full"] * 3),
    "full first": ("qwen3-untied", "fullx2,layer:2@normx1,attn:1", ["full"] * 2 + ["layer:2@norm"] + ["attn:1"] * 2),
}


@pytest.fixture(scope="session")
def score_cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the six models, rollouts.jsonl and reference.pt: by model, "truth" (float64) and "in_fp32", then by
    policy and temperature, HuggingFace's log-probs and entropies of each response.
    """
    folder = tmp_path_factory.mktemp("score")
    rollouts = random_rollouts(7)
    write_rollouts(folder / "rollouts.jsonl", rollouts)
    policies = [(PolicySpec.parse(spec), temperature) for spec in SPECS for temperature in TEMPERATURES]

    @torch.no_grad()
    def scores(model: Any) -> dict[str, list[tuple[torch.Tensor, torch.Tensor]]]:
        return {
            f"{spec} {temperature}": [reference_scores(model, rollout, spec, temperature) for rollout in rollouts]
            for spec, temperature in policies
        }

    reference: dict[str, dict[str, Any]] = {}
    for name, config in configs().items():
        model = write_model(config, folder / name)
        in_fp32 = scores(model)
        with Float64():
            reference[name] = {"truth": scores(model.double()), "in_fp32": in_fp32}
    torch.save(reference, folder / "reference.pt")
    return folder


@pytest.fixture(scope="session")
def flow_cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the six models, rollouts.jsonl and reference.pt.

    The untied models have sharp policies (entropies from 0 to 4.5 nats and KL up to 9), the tied ones nearly flat ones.
    reference.pt has for each model, by tests/parallel/flow_reference.py: truth (a Flow), in_fp32 (dict of tensors) and
    num_tokens (int64, one a response).
    """
    folder = tmp_path_factory.mktemp("flow")
    rollouts = random_rollouts(7)
    write_rollouts(folder / "rollouts.jsonl", rollouts)
    reference: dict[str, dict[str, Any]] = {}
    for name, config in configs().items():
        model: Any = write_model(config, folder / name)
        if not config.tie_word_embeddings:
            model.lm_head.weight.data.mul_(10)
            model.save_pretrained(folder / name)
        in_fp32 = reference_flow(model, rollouts, torch.float32)
        with Float64():
            truth = flow_of(reference_flow(model.double(), rollouts))
        reference[name] = {"truth": truth, "in_fp32": in_fp32, "num_tokens": torch.tensor(token_counts(rollouts))}
    torch.save(reference, folder / "reference.pt")
    return folder


@pytest.fixture(scope="session")
def train_cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    steps = [random_rollouts(8, seed=step, longest=25) for step in range(1, 6)]
    for step, rollouts in enumerate(steps, start=1):
        write_rollouts(step_file(folder / "rollouts", step), rollouts)
    reference: dict[str, dict[str, Any]] = {}
    for name, (model_name, schedule, phases) in TRAIN_CASES.items():
        config = configs()[model_name]
        trained = train_reference(write_model(config, folder / model_name), phases, steps, mini_batch=4)
        reference[name] = vars(trained) | {
            "model": model_name,
            "schedule": schedule,
            "tied": config.tie_word_embeddings,
            "internal_first": not schedule.startswith("full"),
        }
    torch.save(reference, folder / "reference.pt")
    return folder
