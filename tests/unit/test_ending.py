"""How a program ends that uses the parallel groups: quietly, also where their context is left open."""

import subprocess
import sys

import pytest

LEFT_OPEN = """
from contextlib import ExitStack
from megatron_bupo.config.train import ParallelConfig
from megatron_bupo.parallel.setup import parallel_state

open_context = ExitStack()
state = open_context.enter_context(parallel_state(ParallelConfig(), seed=0))
print(state.world_size)
"""


@pytest.mark.parametrize("ending", ["", "import sys; sys.exit(0)", "open_context.close()"])
def test_groups_end_before_torch_does(ending: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LEFT_OPEN + ending], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "1\n")
    assert "Exception" not in done.stderr
    assert "TypeError" not in done.stderr


CYCLE = """
import gc

import megatron_bupo.config.program

class Cycle:
    def __init__(self):
        self.me = self

    def __del__(self):
        print("found")

gc.disable()
Cycle()
"""


@pytest.mark.parametrize(("program", "printed"), [(CYCLE, ""), (CYCLE + "gc.collect()", "found\n")])
def test_python_ends_without_a_search_for_cycles(program: str, printed: str) -> None:
    """It takes seconds where torch and transformers were imported."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, printed), done.stderr


def test_triton_reports_no_leaks() -> None:
    """A GPU's kernels import it; its report would be the last that every run prints, and the last of `make test`."""
    pytest.importorskip("triton", reason="triton has no wheel for this platform")
    program = "import triton, megatron_bupo.config.program"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
