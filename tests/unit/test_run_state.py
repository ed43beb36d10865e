"""Which checkpoint is loaded, and which changes of a run are refused."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_bupo.config.command_line import flags_of, parse
from megatron_bupo.config.train import RunConfig, TrainConfig
from megatron_bupo.errors import UsageError
from megatron_bupo.samples import Rollout
from megatron_bupo.training.run_record import _UNNAMED, EarlierStart, changed_flags
from megatron_bupo.training.run_state import (
    RUN_STATE,
    RunIdentity,
    RunState,
    Start,
    cut_metrics,
    find_start,
    newest_checkpoint,
)
from megatron_bupo.training.watch import PhaseNumbers, PhaseWatch

IDENTITY = RunIdentity("m", "fp32", "d", (), 1, 4, 2, ("layer:2", "layer:2", "full"), "ppo-clip", "grpo", "math")
REPLAY = replace(IDENTITY, data="", replay=("a", "b", "c"))


def write_iteration(run: Path, step: int, identity: RunIdentity = IDENTITY) -> Path:
    folder = run / f"iter_{step:07d}"
    folder.mkdir(parents=True)
    (folder / RUN_STATE).write_text(RunState(step, identity, {"a": step}).to_json())
    return folder


def test_newest_whole_checkpoint(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    write_iteration(tmp_path, 9)
    newest = write_iteration(tmp_path, 10)
    (tmp_path / "iter_0000011").mkdir()  # without run_state.json
    write_iteration(tmp_path, 12).rename(tmp_path / ".iter_0000012.partial")
    assert newest_checkpoint(tmp_path) == newest


def test_start_goes_on_where_the_run_stopped(tmp_path: Path) -> None:
    folder = write_iteration(tmp_path, 2)
    start = find_start(RunConfig(load=str(tmp_path)), IDENTITY)
    assert start == Start(2, folder, RunState(2, IDENTITY, {"a": 2}))
    assert find_start(RunConfig(), IDENTITY) == Start()


def test_one_command_line_starts_and_restarts(tmp_path: Path) -> None:
    assert find_start(RunConfig(save=str(tmp_path), load=str(tmp_path)), IDENTITY) == Start()
    with pytest.raises(UsageError, match="has no latest_checkpointed_iteration"):
        find_start(RunConfig(save="elsewhere", load=str(tmp_path)), IDENTITY)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model": "n"}, "model: m then, n now"),
        ({"dtype": "bf16"}, "dtype: fp32 then, bf16 now"),
        ({"data": "e"}, "data: d then, e now"),
        ({"seed": 2}, "seed: 1 then, 2 now"),
        ({"loss": "a.py:f (sha256 1)"}, "loss: ppo-clip then, a.py:f (sha256 1) now"),
        ({"advantage_estimator": "rloo"}, "advantage_estimator: grpo then, rloo now"),
        ({"reward": "mine.py:f (sha256 1)"}, "reward: math then, mine.py:f (sha256 1) now"),
        ({"rollout_batch_size": 8}, "rollout_batch_size: 4 then, 8 now"),
        ({"phases": ("layer:2", "layer:2", "layer:2")}, "policy of step 3: full then, layer:2 now"),
        ({"phases": ("layer:2",)}, "steps: 2 taken, 1 wanted"),
    ],
)
def test_another_run_is_refused_with_the_difference(changed: dict[str, object], said: str, tmp_path: Path) -> None:
    write_iteration(tmp_path, 2)
    now = replace(IDENTITY, **changed)
    with pytest.raises(UsageError, match="--allow-changed-run") as refused:
        find_start(RunConfig(load=str(tmp_path)), now)
    assert said in str(refused.value)
    start = find_start(RunConfig(load=str(tmp_path), allow_changed_run=True), now)
    assert start.changes == (said,)


def test_a_replay_of_other_rollouts_is_refused(tmp_path: Path) -> None:
    write_iteration(tmp_path, 2, REPLAY)
    with pytest.raises(UsageError, match="replayed rollouts of step 2: others"):
        find_start(RunConfig(load=str(tmp_path)), replace(REPLAY, replay=("a", "x", "c")))
    with pytest.raises(UsageError, match="replayed rollouts of step 1"):
        find_start(RunConfig(load=str(tmp_path)), IDENTITY)
    assert find_start(RunConfig(load=str(tmp_path)), replace(REPLAY, replay=("a", "b", "c", "d"))).changes == ()


def test_a_run_keeps_the_converted_checkpoint_that_it_started_from(tmp_path: Path) -> None:
    folder = write_iteration(tmp_path / "run", 2)
    converted = tmp_path / "converted"
    (folder / RUN_STATE).write_text(RunState(2, IDENTITY, {}, str(converted)).to_json())
    with pytest.raises(UsageError, match="which is gone"):
        find_start(RunConfig(load=str(tmp_path / "run")), IDENTITY)
    converted.mkdir()
    assert find_start(RunConfig(load=str(tmp_path / "run")), IDENTITY).converted == converted


def test_more_steps_are_no_change(tmp_path: Path) -> None:
    write_iteration(tmp_path, 2)
    longer = replace(IDENTITY, phases=(*IDENTITY.phases, "full", "full"))
    assert find_start(RunConfig(load=str(tmp_path)), longer).changes == ()


def test_a_watched_phase_goes_on(tmp_path: Path) -> None:
    watch = PhaseWatch(PhaseNumbers(2, 0.1, 1 / 3, 0.7), [Rollout(0, [1], [2], rollout_logprobs=[-0.1])])
    folder = write_iteration(tmp_path, 2)
    (folder / RUN_STATE).write_text(RunState(2, IDENTITY, {}, ended=(1,), phase_start=watch.first).to_json())
    with pytest.raises(UsageError, match=r"watch_step_000002\.jsonl.*go on with --monitor-responses 0"):
        find_start(RunConfig(load=str(tmp_path)), IDENTITY)
    assert find_start(RunConfig(load=str(tmp_path)), IDENTITY, watched=False).watch is None
    watch.write(tmp_path)
    start = find_start(RunConfig(load=str(tmp_path)), IDENTITY)
    assert (start.ended, start.watch) == ((1,), watch)
    # The steps taken are of another schedule: what comes now is another phase, with a start of its own.
    other = replace(IDENTITY, phases=("full", "full", "layer:3"))
    assert find_start(RunConfig(load=str(tmp_path), allow_changed_run=True), other).watch is None


def test_what_ended_early_stays_so_unless_the_steps_taken_are_of_another_schedule(tmp_path: Path) -> None:
    folder = write_iteration(tmp_path, 2)
    (folder / RUN_STATE).write_text(RunState(2, IDENTITY, {}, ended=(2,)).to_json())
    changed = RunConfig(load=str(tmp_path), allow_changed_run=True)
    for phases, ended in (
        (("layer:2", "layer:2", "full", "full"), (2,)),
        (("layer:2", "layer:2", "layer:2", "full"), (2,)),
        (("layer:2", "full", "full"), ()),
        (("layer:2",), ()),
    ):
        assert find_start(changed, replace(IDENTITY, phases=phases)).ended == ended


def test_a_run_from_before_the_watch_and_before_losses_of_ones_own_is_read(tmp_path: Path) -> None:
    folder = write_iteration(tmp_path, 2)
    content = json.loads((folder / RUN_STATE).read_text())
    del (
        content["ended"],
        content["phase_start"],
        content["identity"]["loss"],
        content["identity"]["advantage_estimator"],
    )
    (folder / RUN_STATE).write_text(json.dumps(content))
    start = find_start(RunConfig(load=str(tmp_path)), IDENTITY)
    assert (start.done, start.ended, start.watch) == (2, (), None)


@pytest.mark.parametrize("content", ["", "{}", '{"schema": 2}', '{"schema": 1, "step": 1}', "[1]"])
def test_broken_run_state(content: str, tmp_path: Path) -> None:
    folder = write_iteration(tmp_path, 1)
    (folder / RUN_STATE).write_text(content)
    with pytest.raises(UsageError, match=r"run_state\.json"):
        find_start(RunConfig(load=str(tmp_path)), IDENTITY)


def test_cut_metrics_drops_later_and_half_lines(tmp_path: Path) -> None:
    cut_metrics(tmp_path, 1)  # nothing there
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    cut_metrics(tmp_path, 3)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'
    cut_metrics(tmp_path, 1)
    assert path.read_text() == '{"step": 1}\n'


def test_what_is_not_named_is_a_flag() -> None:
    assert {flag.name for flag in flags_of(TrainConfig)} >= _UNNAMED


def test_changed_flags_are_named(tmp_path: Path) -> None:
    """Those that shape the training, whatever group they were in; not those about places, lengths and machines."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "prompts.jsonl").write_text("")

    def config(*flags: str) -> TrainConfig:
        words = ["--hf-model", str(tmp_path), "--prompt-data", str(tmp_path / "prompts.jsonl"), "--train-iters", "5"]
        parsed = parse("train", [*words, *flags])
        assert isinstance(parsed, TrainConfig)
        return parsed

    phases = ["--internal-layer", "2", "--internal-steps", "2"]
    run = tmp_path / "run"
    run.mkdir()
    assert EarlierStart.read(run) == EarlierStart({}, ()), "no run.json"
    before = asdict(config("--internal-stop", "kl:0.1", "--lr", "1e-5", *phases))
    before["algorithm"]["dual_clip"] = before["algorithm"]["losses"]["ppo_clip"].pop("dual_clip")  # grouped otherwise
    (run / "run.json").write_text(json.dumps({"flags": before, "changes": ["after step 1: x"]}))
    earlier = EarlierStart.read(run)
    assert earlier.changes == ("after step 1: x",)
    assert changed_flags(config(), {}) == [], "nothing is known"
    free = [
        "--save",
        str(tmp_path / "x"),
        "--keep",
        "2",
        "--save-interval",
        "1",
        "--recompute-granularity",
        "selective",
        "--entropy-flow-interval",
        "2",
        "--norms-interval",
        "0",
    ]
    assert changed_flags(config("--internal-stop", "kl:0.1", "--lr", "1e-5", *phases, *free), earlier.flags) == []
    assert changed_flags(config("--dual-clip", "3", "--rollout-temperature", "0.7"), earlier.flags) == [
        "--lr: 1e-05 then, 1e-06 now",
        "--dual-clip: 10.0 then, 3.0 now",
        "--rollout-temperature: 1.0 then, 0.7 now",
        "--internal-stop: kl:0.1 then, None now",
    ]
