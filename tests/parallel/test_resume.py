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
    torchrun,
)
from tests.parallel.resume_worker import STEPS, differences, stopped_after, timeless, train_words

DP2 = ["--use-distributed-optimizer"]


def torchrun_train(processes: int, words: list[str], run: Path, *flags: str) -> None:
    files = ["--save", str(run), "--save-hf", str(run / "out")]
    assert_passed(torchrun(processes, "-m", "megatron_bupo", *words, *files, *flags))


def test_one_process_stopped_after_every_step(train_cases: Path, tmp_path: Path) -> None:
    assert_passed(run_python("tests/parallel/resume_worker.py", train_cases, tmp_path))


@pytest.fixture(scope="module")
def distributed_run(train_cases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two data-parallel ranks that share the optimizer's state, a checkpoint after every step."""
    run = tmp_path_factory.mktemp("resume") / "whole"
    torchrun_train(2, train_words(train_cases, "layer:2x2,full"), run, *DP2, "--save-interval", "1")
    return run


@pytest.mark.parametrize("step", [1, 2])
def test_distributed_optimizer_resumes_to_the_bit(
    step: int, train_cases: Path, distributed_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    stopped_after(distributed_run, step, run)
    shutil.rmtree(run / "out")
    torchrun_train(2, train_words(train_cases, "layer:2x2,full"), run, *DP2, "--load", str(run))
    assert differences(distributed_run / "out", run / "out") == []
    assert timeless(run) == timeless(distributed_run)


@pytest.mark.parametrize("layout", ["TP2xPP2", "PP2xVPP2"])
def test_another_layout_goes_on(layout: str, train_cases: Path, distributed_run: Path, tmp_path: Path) -> None:
    processes, flags = LAYOUTS[layout]
    stopped = tmp_path / "stopped"
    stopped_after(distributed_run, 2, stopped)
    words = train_words(train_cases, "layer:2x2,full")
    torchrun_train(processes, words, tmp_path / "run", *flags, "--load", str(stopped))
    one, other = (load_file(folder / "out" / "model.safetensors") for folder in (distributed_run, tmp_path / "run"))
    worst = max(float((one[name] - other[name]).abs().max()) for name in one)
    assert worst < 1e-5
    assert [step["step"] for step in timeless(tmp_path / "run")] == [3, 4, 5]


def test_starts_from_a_converted_checkpoint(train_cases: Path, tmp_path: Path) -> None:
    """The same weights from either side train to the same bits, also after a resume that has to find them again."""
    words = train_words(train_cases, "layer:2x2,full")
    converted, hf_model = tmp_path / "converted", str(train_cases / "qwen3-tied")
    converter = ["checkpoint_converters/hf_to_megatron.py", "--hf-model", hf_model, "--output", str(converted)]
    assert_passed(torchrun(1, *converter))
    torchrun_train(1, words, tmp_path / "hf", "--seed", "1")
    first = tmp_path / "first"
    torchrun_train(1, words, first, "--seed", "1", "--load", str(converted), "--save-interval", "1")
    assert differences(tmp_path / "hf" / "out", first / "out") == []
    again = tmp_path / "again"
    stopped_after(first, 3, again)
    shutil.rmtree(again / "out")
    torchrun_train(1, words, again, "--seed", "1", "--load", str(again))
    assert timeless(again) == timeless(tmp_path / "hf")


@pytest.mark.parametrize("dtype", [[], ["--bf16"]], ids=["fp32", "bf16"])
def test_sigkill_and_the_same_command_again(dtype: list[str], train_cases: Path, tmp_path: Path) -> None:
    words = [*train_words(train_cases, "layer:2x2,full"), *DP2, *dtype]
    whole, run = tmp_path / "whole", tmp_path / "run"
    torchrun_train(2, words, whole)
    words += ["--save", str(run), "--load", str(run), "--save-interval", "1", "--keep", "2"]
    words += ["--save-hf", str(tmp_path / "out")]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    process = subprocess.Popen(
        [*launch, "megatron_bupo", *words],
        cwd=ROOT,
        env=child_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + HANG_S
    while not (run / "iter_0000002").is_dir() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    kill_tree(process)
    assert not (tmp_path / "out").exists(), "it was killed too late to test anything"
    assert_passed(torchrun(2, "-m", "megatron_bupo", *words))
    assert differences(whole / "out", tmp_path / "out") == []
    assert timeless(run) == timeless(whole)
    assert sorted(path.name for path in run.glob("iter_*")) == [f"iter_{STEPS - 1:07d}", f"iter_{STEPS:07d}"]
    assert not list(run.glob(".iter_*"))


def test_a_runs_folder_serves_the_export(distributed_run: Path, tmp_path: Path) -> None:
    """megatron_to_hf.py takes SAVE: the newest iteration, in the training dtype, equal to --save-hf."""
    exporter = ["checkpoint_converters/megatron_to_hf.py", "--checkpoint", str(distributed_run)]
    assert_passed(torchrun(1, *exporter, "--output", str(tmp_path / "export")))
    assert differences(distributed_run / "out", tmp_path / "export") == []
