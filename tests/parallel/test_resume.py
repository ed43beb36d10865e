"""A run that was stopped and started again ends as one that never stopped."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.parallel.launch import (
    HANG_S,
    LAYOUTS,
    ROOT,
    assert_passed,
    child_environment,
    kill_tree,
    run_python,
    run_several,
    torchrun,
)
from tests.parallel.resume_worker import STEPS, differences, stopped_after, timeless, train_words
from tests.unit.converting import assert_same_files

DP2 = ["--use-distributed-optimizer"]


def train(cases: Path, run: Path, *flags: str) -> list[str]:
    words = ["-m", "megatron_bupo", *train_words(cases, "layer:2x2,full")]
    return [*words, "--save", str(run), "--save-hf", str(run / "out"), *flags]


def test_one_process_stopped_after_every_step(train_cases: Path, tmp_path: Path) -> None:
    assert_passed(run_python("tests/parallel/resume_worker.py", train_cases, tmp_path))


def test_an_optimizer_that_counts_steps_by_group(train_cases: Path, tmp_path: Path) -> None:
    assert_passed(run_python("tests/parallel/group_adam_worker.py", train_cases, tmp_path))


@pytest.fixture(scope="module")
def whole_runs(train_cases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of fp32 and bf16: two data-parallel ranks that share the optimizer's state, a checkpoint a step."""
    folder = tmp_path_factory.mktemp("resume")
    flags = [*DP2, "--save-interval", "1"]
    run_several(2, train(train_cases, folder / "fp32", *flags), train(train_cases, folder / "bf16", *flags, "--bf16"))
    return folder


@pytest.fixture(scope="module")
def resumed_runs(train_cases: Path, whole_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of runs that went on: "1" and "2" after that step in their own folder, PP2xVPP2 after 2 in another."""
    folder = tmp_path_factory.mktemp("resumed")
    commands = []
    for step in (1, 2):
        run = folder / str(step)
        stopped_after(whole_runs / "fp32", step, run)
        shutil.rmtree(run / "out")
        commands.append(train(train_cases, run, *DP2, "--load", str(run)))
    stopped_after(whole_runs / "fp32", 2, folder / "stopped")
    flags = LAYOUTS["PP2xVPP2"][1]
    commands.append(train(train_cases, folder / "PP2xVPP2", *flags, "--load", str(folder / "stopped")))
    run_several(2, *commands)
    return folder


@pytest.mark.parametrize("step", [1, 2])
def test_distributed_optimizer_resumes_to_the_bit(step: int, whole_runs: Path, resumed_runs: Path) -> None:
    whole, run = whole_runs / "fp32", resumed_runs / str(step)
    assert differences(whole / "out", run / "out") == []
    assert timeless(run) == timeless(whole)


@pytest.mark.parametrize("layout", ["TP2xPP2", "PP2xVPP2"])
def test_another_layout_goes_on(layout: str, train_cases: Path, whole_runs: Path, resumed_runs: Path) -> None:
    run = resumed_runs / layout
    if not run.exists():
        processes, flags = LAYOUTS[layout]
        load = ["--load", str(resumed_runs / "stopped")]
        assert_passed(torchrun(processes, *train(train_cases, run, *flags, *load)))
    one, other = (load_file(folder / "out" / "model.safetensors") for folder in (whole_runs / "fp32", run))
    worst = max(float((one[name] - other[name]).abs().max()) for name in one)
    assert worst < 1e-5
    assert [step["step"] for step in timeless(run)] == [3, 4, 5]


def test_starts_from_a_converted_checkpoint(train_cases: Path, tmp_path: Path) -> None:
    """The same weights from either side train to the same bits, also after a resume that has to find them again."""
    converted, first, again = tmp_path / "converted", tmp_path / "first", tmp_path / "again"
    converter = ["checkpoint_converters/hf_to_megatron.py", "--hf-model", str(train_cases / "qwen3-tied")]
    run_several(
        1,
        [*converter, "--output", converted],
        train(train_cases, tmp_path / "hf", "--seed", "1"),
        train(train_cases, first, "--seed", "1", "--load", str(converted), "--save-interval", "1"),
    )
    assert differences(tmp_path / "hf" / "out", first / "out") == []
    stopped_after(first, 3, again)
    shutil.rmtree(again / "out")
    assert_passed(run_python(*train(train_cases, again, "--seed", "1", "--load", str(again))))
    assert timeless(again) == timeless(tmp_path / "hf")


def test_sigkill_and_the_same_command_again(train_cases: Path, whole_runs: Path, tmp_path: Path) -> None:
    """In bf16, so that the fp32 masters have to be in what was saved."""
    run = tmp_path / "run"
    words = train(train_cases, run, *DP2, "--bf16", "--load", str(run), "--save-interval", "1", "--keep", "2")
    words += ["--save-hf", str(tmp_path / "out")]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = subprocess.Popen(
        [*launch, *words],
        cwd=ROOT,
        env=child_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    deadline = time.monotonic() + HANG_S
    while not (run / "iter_0000002").is_dir() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    kill_tree(process)
    assert not (tmp_path / "out").exists(), "it was killed too late to test anything"
    assert_passed(torchrun(2, *words))
    assert differences(whole_runs / "bf16" / "out", tmp_path / "out") == []
    assert timeless(run) == timeless(whole_runs / "bf16")
    assert sorted(path.name for path in run.glob("iter_*")) == [f"iter_{STEPS - 1:07d}", f"iter_{STEPS:07d}"]
    assert not list(run.glob(".iter_*"))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_runs_folder_serves_the_export(whole_runs: Path, tmp_path: Path, dtype: str) -> None:
    """megatron_to_hf.py takes SAVE: the newest iteration, in the training dtype, byte for byte as --save-hf."""
    exporter = ["checkpoint_converters/megatron_to_hf.py", "--checkpoint", str(whole_runs / dtype)]
    assert_passed(run_python(*exporter, "--output", tmp_path / "export"))
    assert_same_files(whole_runs / dtype / "out", tmp_path / "export")
