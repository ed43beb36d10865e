"""The watch over an internal phase: bounds by hand, the probe on disk, and what the flags refuse."""

from __future__ import annotations

import json
import math
import random
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_bupo.config.command_line import parse
from megatron_bupo.config.stop_bounds import StopBound
from megatron_bupo.errors import UsageError
from megatron_bupo.samples import Rollout
from megatron_bupo.training.tracker import Tracker
from megatron_bupo.training.watch import PhaseNumbers, PhaseWatch

FIRST = PhaseNumbers(step=5, entropy_full=1.5, response_len_mean=200.0, accuracy=0.5)
WATCH = PhaseWatch(FIRST, [Rollout(0, [1], [2], rollout_logprobs=[-0.5])])


@pytest.mark.parametrize(
    ("bound", "inside", "outside", "reason"),
    [
        ("kl:0.1", {"kl_start": 0.1}, {"kl_start": 0.31}, "kl_start 0.31 above 0.1 (kl:0.1)"),
        (
            "entropy:0.5",
            {"entropy_full": 2.0},
            {"entropy_full": 2.25},
            "entropy_full 2.25, 0.75 nats from the 1.5 of step 5 (entropy:0.5)",
        ),
        (
            "entropy:0.5",
            {"entropy_full": 1.0},
            {"entropy_full": 0.75},
            "entropy_full 0.75, 0.75 nats from the 1.5 of step 5 (entropy:0.5)",
        ),
        (
            "length:2",
            {"response_len_mean": 400.0},
            {"response_len_mean": 500.0},
            "response_len_mean 500, 2.5 times the 200 of step 5 (length:2)",
        ),
        (
            "length:2",
            {"response_len_mean": 100.0},
            {"response_len_mean": 80.0},
            "response_len_mean 80, 1/2.5 of the 200 of step 5 (length:2)",
        ),
        (
            "accuracy:0.25",
            {"accuracy": 0.25},
            {"accuracy": 0.125},
            "accuracy 0.125, 0.375 below the 0.5 of step 5 (accuracy:0.25)",
        ),
        ("accuracy:0.25", {"accuracy": 1.0}, {"accuracy": 0.0}, "accuracy 0, 0.5 below the 0.5 of step 5"),
    ],
)
def test_a_bound_is_crossed_when_it_is_exceeded(
    bound: str, inside: dict[str, float], outside: dict[str, float], reason: str
) -> None:
    bounds = [StopBound.parse(bound)]
    assert WATCH.crossed(FIRST, bounds) is None
    assert WATCH.crossed(replace(FIRST, step=6, **inside), bounds) is None, "on the bound is not over it"
    assert str(WATCH.crossed(replace(FIRST, step=6, **outside), bounds)).startswith(reason)


def test_every_crossed_bound_is_named() -> None:
    now = replace(FIRST, step=7, kl_start=0.5, response_len_mean=1000.0)
    bounds = [StopBound.parse(text) for text in ("kl:0.25", "entropy:1", "length:2", "accuracy:0.1")]
    expected = "kl_start 0.5 above 0.25 (kl:0.25); response_len_mean 1000, 5 times the 200 of step 5 (length:2)"
    assert WATCH.crossed(now, bounds) == expected
    assert WATCH.crossed(now, []) is None, "without bounds nothing ends"


@pytest.mark.parametrize(("name", "bound"), [("kl_start", "kl:1"), ("entropy_full", "entropy:1")])
def test_what_is_no_number_crosses_every_bound(name: str, bound: str) -> None:
    assert WATCH.crossed(replace(FIRST, **{name: math.nan}), [StopBound.parse(bound)]) is not None


def test_the_probe_comes_back_to_the_bit(tmp_path: Path) -> None:
    rng = random.Random(0)
    # What a trainer has: float32, read as Python's float64.
    floats = [
        struct.unpack("f", struct.pack("f", -rng.expovariate(1.0) * 10 ** rng.randint(-9, 1)))[0] for _ in "a" * 99
    ]
    probe = [
        Rollout(0, [5, 6], list(range(99)), reward=1.0, response_mask=[1, 0, 1] * 33, rollout_logprobs=floats),
        Rollout(1, [7], [2], rollout_logprobs=[-0.0]),
    ]
    PhaseWatch(FIRST, probe).write(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["watch_step_000005.jsonl"]
    assert PhaseWatch.read(tmp_path / "run", FIRST) == PhaseWatch(FIRST, probe)
    with pytest.raises(UsageError, match=r"watch_step_000006\.jsonl: cannot be read"):
        PhaseWatch.read(tmp_path / "run", replace(FIRST, step=6))


def test_the_reason_is_logged_as_text(tmp_path: Path) -> None:
    tracker = Tracker(str(tmp_path), None)
    tracker.log({"step": 1, "phase": "layer:2", "kl_start": 0.0})
    tracker.log({"step": 2, "phase": "full", "kl_start": 0.5, "internal_stop": "kl_start 0.5 above 0.1 (kl:0.1)"})
    tracker.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])["internal_stop"].startswith("kl_start")
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    (event,) = board.Tensors("internal_stop/text_summary")
    assert (event.step, event.tensor_proto.string_val[0]) == (2, b"kl_start 0.5 above 0.1 (kl:0.1)")
    assert [event.value for event in board.Scalars("kl_start")] == [0.0, 0.5]


def refusal(tmp_path: Path, *flags: str) -> str:
    """What a run of 5 steps with these flags is refused with; '' if it is not."""
    (tmp_path / "config.json").write_text("{}")
    words = ["--hf-model", str(tmp_path), "--load-rollouts", str(tmp_path), "--train-iters", "5", *flags]
    try:
        parse("train", words)
    except UsageError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--internal-layer", "2", "--internal-steps", "4", "--monitor-responses", "0"], "nothing is watched"),
        ([], "there must be an internal phase"),
        (["--internal-layer", "2", "--internal-steps", "5"], "fewer than --train-iters 5"),
        (["--internal-layer", "auto", "--internal-steps", "5"], "fewer than --train-iters 5"),
        (["--policy-schedule", "full"], "the schedule fullx5 has no internal phase"),
        (["--policy-schedule", "layer:2"], "ends with layer:2, with nothing to go on with"),
        (["--policy-schedule", "layer:2x1,fullx1,attn:2x3"], "ends with attn:2"),
        (["--internal-layer", "2", "--internal-steps", "4"], ""),
        (["--internal-layer", "auto", "--internal-steps", "4"], ""),
        (["--policy-schedule", "layer:2x1,attn:2x2,full"], ""),
    ],
)
def test_a_stop_needs_a_watch_a_phase_and_something_to_go_on_with(flags: list[str], said: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, *flags) == "", "without --internal-stop"
    told = refusal(tmp_path, *flags, "--internal-stop", "kl:0.1", "length:2")
    assert "\n" not in told
    assert said in told if said else told == ""
    assert told.startswith("--internal-stop") or not said
