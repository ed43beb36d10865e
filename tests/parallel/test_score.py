"""Log-probs and entropies equal HuggingFace fp32 (eager) for every family and policy, in every layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_bupo.data.rollout_files import write_rollouts
from megatron_bupo.policy_spec import PolicySpec
from tests.parallel.launch import LAYOUTS, assert_passed, recompute_flags, torchrun
from tests.parallel.references import SPECS, TEMPERATURES, configs, random_rollouts, reference_scores, write_model


@pytest.fixture(scope="session")
def score_cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("score")
    rollouts = random_rollouts(7)
    write_rollouts(folder / "rollouts.jsonl", rollouts)
    reference: dict[str, dict[str, list[tuple[torch.Tensor, torch.Tensor]]]] = {}
    for name, config in configs().items():
        model = write_model(config, folder / name)
        with torch.no_grad():
            reference[name] = {
                f"{spec} {temperature}": [
                    reference_scores(model, rollout, PolicySpec.parse(spec), temperature) for rollout in rollouts
                ]
                for spec in SPECS
                for temperature in TEMPERATURES
            }
    torch.save(reference, folder / "reference.pt")
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_policy_equals_huggingface(layout: str, score_cases: Path) -> None:
    processes, flags = LAYOUTS[layout]
    result = torchrun(processes, "tests/parallel/score_worker.py", str(score_cases), *flags)
    assert_passed(result)


def test_recompute_changes_nothing_in_scores(score_cases: Path) -> None:
    processes, flags = LAYOUTS["TP2"]
    result = torchrun(processes, "tests/parallel/score_worker.py", str(score_cases), *flags, *recompute_flags(flags))
    assert_passed(result)
