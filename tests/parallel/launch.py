"""Start a script of this folder under torchrun, as a user would, with one thread a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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


def torchrun(
    processes: int, *command: str, timeout: float = 900, on_gpu: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run `python -m torch.distributed.run ... command` and return what it printed; without `on_gpu` on the CPU."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}
    if not on_gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={processes}",
            *command,
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def assert_passed(result: subprocess.CompletedProcess[str]) -> None:
    """Fail with what the ranks printed, without torchrun's banner."""
    lines = (result.stdout + result.stderr).splitlines()
    told = [line for line in lines if line.startswith(("[rank", "off:", "megatron-bupo"))][-60:]
    assert result.returncode == 0, "\n".join(told)
