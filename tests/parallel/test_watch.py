"""The watch over an internal phase: its KL is HuggingFace's, it ends the phase in time, and a restart remembers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_bupo.data.rollout_files import read_rollouts, step_file
from megatron_bupo.policy_spec import PolicySpec
from tests.parallel.launch import LAYOUTS, run_several
from tests.parallel.references import configs, reference_scores, write_model
from tests.parallel.resume_worker import STEPS, differences, stopped_after, timeless
from tests.parallel.train_reference import ADAM_EPS, LR, TEMPERATURE, train_reference

MONITORED = 5  # of 8 responses; two of them have a mask
STOPPED = ["--policy-schedule", "layer:2x4,full", "--internal-stop", "kl:0.07", "length:9"]
EXPLICIT = ["--policy-schedule", "layer:2x2,full"]  # the KL of 0.07 is crossed when step 3 begins


@pytest.fixture(scope="module")
def kl_start(train_cases: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """KL(start || now) when the steps 1, 2, ... begin: the model trained by HuggingFace and AdamW, on the probe."""
    start: Any = write_model(configs()["qwen3-tied"], tmp_path_factory.mktemp("start"))
    steps = [read_rollouts(step_file(train_cases / "rollouts", step)) for step in range(1, 4)]
    probe = steps[0][:MONITORED]

    def logprobs(model: Any) -> list[Tensor]:
        with torch.no_grad():
            return [reference_scores(model, rollout, PolicySpec(), TEMPERATURE)[0].double() for rollout in probe]

    found = []
    for taken in range(3):
        model = copy.deepcopy(start)
        train_reference(model, ["layer:2"] * taken, steps[:taken], mini_batch=4)
        total = 0.0
        for rollout, now, then in zip(probe, logprobs(model), logprobs(start), strict=True):
            total += sum(
                float(now[i].sub(then[i]).exp() - now[i] + then[i] - 1) for i, m in enumerate(rollout.mask) if m
            )
        found.append(total / sum(sum(rollout.mask) for rollout in probe))
    assert found[0] == 0
    assert found[1] < 0.06 < 0.08 < found[2], "the bound lies between, with room for rounding"
    return found


def train_words(cases: Path, layout: str, run: Path, *flags: str) -> list[str]:
    """A replay of all steps in a layout, with a checkpoint after every step."""
    words = [
        "-m",
        "megatron_bupo",
        "train",
        "--hf-model",
        str(cases / "qwen3-tied"),
        "--load-rollouts",
        str(cases / "rollouts"),
    ]
    words += ["--train-iters", str(STEPS), "--rollout-batch-size", "4", "--n-samples-per-prompt", "2"]
    words += ["--global-batch-size", "4", "--lr", str(LR), "--adam-eps", str(ADAM_EPS)]
    words += ["--rollout-temperature", str(TEMPERATURE), "--max-tokens-per-micro-batch", "45"]
    words += ["--monitor-responses", str(MONITORED), "--save-interval", "1"]
    return [*words, *LAYOUTS[layout][1], "--save", str(run), "--save-hf", str(run / "out"), *flags]


@pytest.fixture(scope="module")
def stopped_runs(train_cases: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """In two layouts, a run whose phase is ended: its folder, and what it printed. "explicit" has no watch."""
    folder = tmp_path_factory.mktemp("watch")
    commands = [train_words(train_cases, layout, folder / layout, *STOPPED) for layout in ("DP2", "PP2")]
    commands.append(train_words(train_cases, "DP2", folder / "explicit", *EXPLICIT))
    names = ("DP2", "PP2", "explicit")
    return {name: (folder / name, printed) for name, printed in zip(names, run_several(2, *commands), strict=True)}


@pytest.mark.parametrize("layout", ["DP2", "PP2"])
def test_the_phase_ends_where_the_kl_crosses_its_bound(
    layout: str, stopped_runs: dict[str, tuple[Path, str]], kl_start: list[float]
) -> None:
    run, printed = stopped_runs[layout]
    metrics = timeless(run)
    assert [step["phase"] for step in metrics] == ["layer:2"] * 2 + ["full"] * 3
    assert [step["kl_start"] for step in metrics[:3]] == pytest.approx(kl_start, abs=1e-5)
    assert metrics[0]["kl_start"] == 0
    reason = metrics[2]["internal_stop"]
    assert reason == f"kl_start {metrics[2]['kl_start']:.4g} above 0.07 (kl:0.07)"
    assert f"the internal phase ended before step 3: {reason}" in printed


def test_the_rest_is_a_run_with_the_shorter_phase(stopped_runs: dict[str, tuple[Path, str]]) -> None:
    run, explicit = stopped_runs["DP2"][0], stopped_runs["explicit"][0]
    assert differences(run / "out", explicit / "out") == []
    metrics = timeless(run)
    del metrics[2]["internal_stop"], metrics[2]["kl_start"]
    assert metrics == timeless(explicit)


def test_a_restart_goes_on_with_the_watch(
    train_cases: Path, stopped_runs: dict[str, tuple[Path, str]], tmp_path: Path
) -> None:
    """In the phase with its first numbers and the probe; after it with where it ended. Here into another folder."""
    run, _ = stopped_runs["PP2"]
    commands = []
    for step in (1, 3):
        stopped_after(run, step, tmp_path / f"stopped {step}")
        load = ["--load", str(tmp_path / f"stopped {step}")]
        commands.append(train_words(train_cases, "PP2", tmp_path / f"again {step}", *STOPPED, *load))
    run_several(2, *commands)
    for step in (1, 3):
        again = tmp_path / f"again {step}"
        assert differences(run / "out", again / "out") == []
        assert timeless(again) == timeless(run)[step:]
        probe = again / "watch_step_000001.jsonl"
        assert probe.is_file() == (step == 1), "a second restart in the phase needs it"
