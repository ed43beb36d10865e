"""Start Python programs as a user would, alone or under torchrun, with one thread a process."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

from tests.parallel.several import MARK

ROOT = Path(__file__).resolve().parents[2]

# name -> (processes, flags); every proof runs in each of them.
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "TP1": (1, []),
    "TP2": (2, ["--tensor-model-parallel-size", "2"]),
    "PP2": (2, ["--pipeline-model-parallel-size", "2"]),
    "TP2xPP2": (4, ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]),
    "PP2xVPP2": (
        2,
        ["--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2"],
    ),
    "TP2+SP": (2, ["--tensor-model-parallel-size", "2", "--sequence-parallel"]),
    "DP2": (2, []),
}


def recompute_flags(layout_flags: list[str]) -> list[str]:
    """Full recompute in pieces as large as a stage of the four layers, so that a truncated stage is a remainder."""
    pieces = "1" if "--num-virtual-stages-per-pipeline-rank" in layout_flags else "2"
    return ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", pieces]


# No command takes that long, whatever else the machine does: it hangs.
HANG_S = 1800.0
MOST_CHARACTERS = 6000


def child_environment(on_gpu: bool = False, project: Path = ROOT) -> dict[str, str]:
    """This process's environment for a Python of a test: it finds the project, whose folder need not be installed.

    What PYTHONPATH holds stays behind the project's folder: packages may be installed there.
    """
    path = os.pathsep.join(filter(None, (str(project), os.environ.get("PYTHONPATH"))))
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment = kept | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": path}
    return environment if on_gpu else environment | {"CUDA_VISIBLE_DEVICES": ""}


def run_python(*command: object, on_gpu: bool = False, project: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run `python command` in the project's folder and return what it printed; without `on_gpu` on the CPU.

    No process of it is left behind where a test is interrupted or the command hangs.
    """
    words, environment = [sys.executable, *map(str, command)], child_environment(on_gpu, project)
    started = subprocess.Popen(
        words, cwd=project, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with started:
        try:
            out, err = started.communicate(timeout=HANG_S)
        except BaseException:
            kill_tree(started)
            raise
    return subprocess.CompletedProcess(words, started.returncode, out, err)


def kill_tree(process: subprocess.Popen[str]) -> None:
    """SIGKILL for a process and all that it started; torchrun's workers are in sessions of their own."""
    for victim in [*psutil.Process(process.pid).children(recursive=True), process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
    process.wait()


def torchrun(processes: int, *command: object, on_gpu: bool = False) -> subprocess.CompletedProcess[str]:
    """`run_python` of `command` in several processes, as a user starts them."""
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")
    return run_python(*launcher, *command, on_gpu=on_gpu)


def run_several(processes: int, *commands: Sequence[object]) -> list[str]:
    """Run commands one after the other in the same processes, see several.py; what each printed to stdout.

    For commands that prove nothing by being a process of their own. AssertionError where one fails.
    """
    words = ["tests/parallel/several.py", json.dumps([[*map(str, command)] for command in commands])]
    result = run_python(*words) if processes == 1 else torchrun(processes, *words)
    assert_passed(result)
    return result.stdout.split(MARK)[1:]


def assert_passed(result: subprocess.CompletedProcess[str]) -> None:
    """Fail with the end of what the command printed, tracebacks of its processes included.

    torchrun's own report, the 40 lines after the one with the exit code of a process, is left out.
    """
    before, exit_code, after = result.stderr.partition("] failed (exitcode: ")
    errors = before + exit_code + after.partition("\n")[0]
    assert result.returncode == 0, f"exit code {result.returncode}\n{_end(result.stdout)}\n{_end(errors)}"


def _end(text: str) -> str:
    """The end of a text, MOST_CHARACTERS at most."""
    return text if len(text) <= MOST_CHARACTERS else f"[...]{text[-MOST_CHARACTERS:]}"
