"""What is known of a run before it starts: what changed since it was started last, and what its outputs may not be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_bupo.config.command_line import parse
from megatron_bupo.config.train import TrainConfig
from megatron_bupo.data.rollout_files import step_file, write_rollouts
from megatron_bupo.errors import UsageError
from megatron_bupo.training.prepare import PreparedRun, prepare
from megatron_bupo.training.run_record import describe_run
from megatron_bupo.training.run_state import RUN_STATE, RunState
from tests.parallel.references import configs, random_rollouts, write_model


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and the rollouts of 3 steps of 4 x 2 responses."""
    folder = tmp_path_factory.mktemp("prepare")
    write_model(configs()["qwen3-tied"], folder / "model")
    for step in (1, 2, 3):
        write_rollouts(step_file(folder / "rollouts", step), random_rollouts(8, seed=step, longest=9))
    return folder


def read_config(case: Path, *flags: str) -> TrainConfig:
    words = ["--hf-model", str(case / "model"), "--load-rollouts", str(case / "rollouts"), "--train-iters", "3"]
    words += ["--rollout-batch-size", "4", "--n-samples-per-prompt", "2"]
    config = parse("train", [*words, *flags])
    assert isinstance(config, TrainConfig)
    return config


def stopped(run: PreparedRun, step: int, save: Path) -> None:
    """What a run that starts as `run` has in its folder after a step."""
    folder = save / f"iter_{step:07d}"
    folder.mkdir(parents=True)
    (folder / RUN_STATE).write_text(RunState(step, run.identity, {}).to_json())
    content = describe_run(run.config, run.describe_phases(), run.identity, run.start.changes, {})
    (save / "run.json").write_text(json.dumps(content))


def test_what_changed_is_printed_once_and_kept(
    case: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save = tmp_path / "run"
    stopped(prepare(read_config(case, "--lr", "1e-5")), 1, save)
    again = ["--load", str(save)]
    assert prepare(read_config(case, "--lr", "1e-5", *again)).start.changes == ()
    assert capsys.readouterr().out == ""
    flags = ["--lr", "2e-5", "--rollout-temperature", "0.7"]
    changed = prepare(read_config(case, *flags, *again))
    said = ["--lr: 1e-05 then, 2e-05 now", "--rollout-temperature: 1.0 then, 0.7 now"]
    assert capsys.readouterr().out == f"{save}/iter_0000001: goes on with changes ({'; '.join(said)})\n"
    assert list(changed.start.changes) == [f"after step 1: {change}" for change in said]
    # The next start with the same flags has nothing to say; that with other ones adds to what is known.
    stopped(changed, 2, save)
    assert prepare(read_config(case, *flags, *again)).start.changes == changed.start.changes
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "1")
    last = prepare(read_config(case, *flags, *again, "--seed", "5", "--allow-changed-run"))
    assert last.start.changes == (*changed.start.changes, "after step 2: seed: 1234 then, 5 now")
    assert capsys.readouterr().out == "", "the first rank speaks"


def test_a_layer_that_is_open_stands_as_auto(case: Path) -> None:
    run = prepare(read_config(case, "--internal-layer", "auto", "--internal-steps", "2"))
    assert run.layer_is_open
    assert run.describe_phases() == "steps 1-2 layer:auto, step 3 full"


@pytest.mark.parametrize(
    ("export", "said"),
    [
        ("", "exists; give the name of a new folder"),
        ("run/hf", "checkpoints keep config and tokenizer there"),
        ("run", "--save .*/run lies there"),
        ("board", "--tensorboard-dir .*/board/tb lies there"),
        ("run/out", None),
    ],
)
def test_an_export_has_a_folder_of_its_own(export: str, said: str | None, case: Path, tmp_path: Path) -> None:
    flags = ["--save", str(tmp_path / "run"), "--tensorboard-dir", str(tmp_path / "board" / "tb")]
    flags += ["--save-hf", str(tmp_path / export)]
    if said is None:
        read_config(case, *flags)
    else:
        with pytest.raises(UsageError, match=f"--save-hf .*{said}"):
            read_config(case, *flags)
