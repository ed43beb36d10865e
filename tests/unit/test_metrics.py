"""The numbers of a step, and the files that hold them, on numbers made by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from megatron_bupo.parallel.reduce import combine
from megatron_bupo.samples import Rollout
from megatron_bupo.training.actor import UpdateResult
from megatron_bupo.training.board import FIRST_PAGE, samples
from megatron_bupo.training.metrics import (
    MAXIMA,
    console_line,
    engine_alarm,
    loss_metrics,
    means,
    observe,
    rollout_metrics,
)
from megatron_bupo.training.tracker import Tracker


@pytest.mark.parametrize(
    ("mean", "bound", "is_raised"),
    [(0.2, 0.1, True), (0.1, 0.1, False), (0.2, 0.0, False), (math.nan, 0.1, True), (None, 0.1, False)],
)
def test_the_alarm_for_an_engine_that_drifts(mean: float | None, bound: float, is_raised: bool) -> None:
    metrics = {} if mean is None else {"logprob_diff_mean": mean, "logprob_diff_max": 3.0}
    told = engine_alarm(metrics, bound)
    assert (told is not None) == is_raised
    assert told is None or f"above --logprob-diff-alarm {bound}" in told


def observed(
    mask: list[float], engine: list[float] | None, logprobs: list[float], entropy: list[float]
) -> dict[str, Tensor]:
    columns = [torch.tensor(column) for column in (logprobs, entropy, mask)]
    return observe(*columns, None if engine is None else torch.tensor(engine))


def added(*seen: dict[str, Tensor]) -> dict[str, float]:
    """Of several micro-batches: sums, and the largest of the maxima."""
    total: dict[str, float] = {}
    for values in seen:
        combine(total, {name: float(value) for name, value in values.items()}, MAXIMA)
    return total


# --- metrics.py


def test_what_is_observed_of_a_policy_are_means_over_trained_tokens() -> None:
    """Two micro-batches of 3 and 1 trained tokens: a mean of means would give 4.0 for the entropy, not 3.0."""
    seen = [
        observed([1, 1, 0, 1], [-1.0, -2.0, -3.0, -4.0], [-1.1, -2.0, -9.0, -3.8], [1.0, 2.0, 100.0, 3.0]),
        observed([0, 1], [-5.0, -1.0], [-5.0, -1.1], [50.0, 6.0]),
    ]
    found = means(added(*seen))
    k3 = (2 * (math.exp(-0.1) + 0.1 - 1) + (math.exp(0.2) - 0.2 - 1)) / 4
    assert found == pytest.approx(
        {"entropy": 3.0, "logprob_diff_mean": 0.1, "logprob_diff_max": 0.2, "logprob_diff_k3": k3}, rel=1e-5
    )


def test_without_the_engines_logprobs_nothing_is_compared() -> None:
    seen = observed([1, 1], None, [-1.0, -2.0], [0.5, 1.5])
    assert means(added(seen)) == {"entropy": 1.0}


def test_only_tokens_with_known_engine_logprobs_are_compared() -> None:
    known = observed([1, 1], [-1.0, -2.0], [-1.5, -2.0], [1.0, 1.0])
    unknown = observed([1, 1], None, [-9.0, -9.0], [3.0, 3.0])
    found = means(added(known, unknown))
    assert found["entropy"] == 2.0
    assert found["logprob_diff_mean"] == pytest.approx(0.25), "over the two tokens that could be compared"


def test_no_trained_token_at_all() -> None:
    seen = observed([0, 0], [-1.0, -1.0], [-2.0, -2.0], [1.0, 1.0])
    assert means(added(seen)) == {"entropy": 0.0}


def test_what_the_responses_say() -> None:
    def rollout(group: int, prompt: int, response: int, reward: float, finish: str | None) -> Rollout:
        return Rollout(group, [1] * prompt, [2] * response, reward=reward, finish_reason=finish)

    rollouts = [
        rollout(0, 2, 3, 1.0, "stop"),
        rollout(0, 2, 5, 0.0, "length"),
        rollout(1, 4, 1, 0.5, None),
        rollout(1, 4, 3, 0.5, "length"),
        rollout(2, 1, 7, 2.0, "stop"),
        rollout(2, 1, 5, 1.5, "stop"),
    ]
    found = rollout_metrics(rollouts, timeouts=2, seconds={"generate": 1.5, "step": 4.0})
    assert found == {
        "reward_mean": 5.5 / 6,
        "accuracy": 3 / 6,
        "response_len_mean": 4.0,
        "truncated_frac": 2 / 6,
        "zero_spread_groups": 1,
        "reward_timeouts": 2,
        "num_tokens": 38,
        "tokens_per_s": 9.5,
        "time/generate": 1.5,
        "time/step": 4.0,
    }


def test_what_the_loss_reports_is_averaged_over_the_tokens_of_all_updates() -> None:
    first = UpdateResult(0.5, 2.0, {"clip_frac": 1.0, "clip_frac_dual": 0.0, "ratio_mean": 10.5, "num_tokens": 10.0})
    second = UpdateResult(-0.1, 3.0, {"clip_frac": 6.0, "clip_frac_dual": 3.0, "ratio_mean": 28.5, "num_tokens": 30.0})
    assert loss_metrics([first, second]) == {"clip_frac": 7 / 40, "clip_frac_dual": 3 / 40, "ratio_mean": 39 / 40}
    with_kl = [
        UpdateResult(part.loss, part.grad_norm, {**part.sums, "kl": kl}) for part, kl in ((first, 0.5), (second, 1.5))
    ]
    assert loss_metrics(with_kl)["kl"] == 2 / 40
    assert loss_metrics([first, with_kl[1]])["kl"] == 1.5 / 40, "a metric that one of the updates has"


def test_a_step_on_the_console() -> None:
    metrics = {"step": 12, "phase": "full", "reward_mean": 0.25, "loss": [0.2, 0.4], "grad_norm": [1.0, 3.0]}
    metrics |= {"entropy": 2.0, "response_len_mean": 80.25, "tokens_per_s": 99.6, "time/step": 61.04}
    assert console_line(metrics, 300) == (
        "step  12/300  full      reward 0.250  loss 0.3000  grad 2.000  entropy 2.000  length 80.2  "
        "61.0 s, 100 tokens/s"
    )


# --- tracker.py


def raw_events(run: Path) -> bytes:
    [file] = (run / "tensorboard").iterdir()
    return file.read_bytes()


def test_a_run_leaves_lines_and_the_same_numbers_in_tensorboard(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"step": step, "phase": phase, "loss": [1.0 * step, 3.0 * step], "lr": 0.5, "reward_timeouts": step}
        for step, phase in ((1, "layer:2"), (2, "full"))
    ]
    tracker = Tracker(str(tmp_path / "runs" / "one"), None)
    tracker.write_run(run := {"schema": 1, "flags": {"optimizer": {"lr": 0.5}, "rollout": {"seeds": [1, 2]}}})
    rollouts = [
        Rollout(0, [1], [2, 3], reward=reward, prompt="*3 + 5*?", response=f"<b>{reward}</b>\n8", answer="8")
        for reward in (0.5, 1.0, 0.0)
    ]
    tracker.log_samples(rollouts, 1)
    tracker.log(lines[0])
    written = tmp_path / "runs" / "one" / "metrics.jsonl"
    assert len(written.read_text().splitlines()) == 1, "a line is on disk as soon as its step is done"
    tracker.log(lines[1])
    tracker.close()
    assert [json.loads(line) for line in written.read_text().splitlines()] == lines
    assert json.loads((tmp_path / "runs" / "one" / "run.json").read_text()) == run
    assert {path.name for path in written.parent.iterdir()} == {"run.json", "metrics.jsonl", "tensorboard"}

    board = EventAccumulator(str(tmp_path / "runs" / "one" / "tensorboard"))
    board.Reload()
    assert set(board.Tags()["scalars"]) == {"loss", "lr", "reward_timeouts", "trained_layer"}
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(1, 2.0), (2, 4.0)]
    assert [event.value for event in board.Scalars("reward_timeouts")] == [1.0, 2.0]
    assert [event.value for event in board.Scalars("trained_layer")] == [2.0, 0.0]
    best, worst = (
        board.Tensors(f"rollouts/{name}/text_summary")[0].tensor_proto.string_val[0] for name in ("best", "worst")
    )
    assert best == b"reward 1.0, 2 tokens, answer 8\n\n    *3 + 5*?\n\n    <b>1.0</b>\n    8"
    assert worst.startswith(b"reward 0.0") and b"_hparams_/session_start_info" in raw_events(written.parent)
    texts = board.Tensors("phase/text_summary")
    assert [event.tensor_proto.string_val[0] for event in texts] == [b"layer:2", b"full"]


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tracker = Tracker(None, None)
    tracker.write_run({"flags": {}})
    tracker.log({"step": 1, "phase": "full"})
    tracker.close()
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_elsewhere(tmp_path: Path) -> None:
    tracker = Tracker(str(tmp_path / "run"), str(tmp_path / "board"))
    tracker.log({"step": 1, "phase": "full", "lr": 1.0})
    tracker.close()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]
    assert list((tmp_path / "board").iterdir())


def test_the_first_page_names_what_a_run_writes(tmp_path: Path) -> None:
    """Charts whose metrics have other names would stay empty."""
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    for tags in FIRST_PAGE.values():
        for tag in tags:
            assert tag.rstrip("$").replace(".*", "NAME") in page


def test_long_samples_are_cut_and_the_random_one_depends_on_the_step() -> None:
    rollouts = [Rollout(0, [1], [2], reward=1.0, response="x" * length) for length in (10_000, 20_000, 30_000)]
    texts = dict(samples(rollouts, 3))
    assert "[... 4000 characters ...]" in texts["rollouts/worst"] and len(texts["rollouts/worst"]) < 7000
    drawn = [dict(samples(rollouts, step))["rollouts/random"] for step in range(1, 30)]
    assert len(set(drawn)) == 3
    assert drawn == [dict(samples(rollouts, step))["rollouts/random"] for step in range(1, 30)]
