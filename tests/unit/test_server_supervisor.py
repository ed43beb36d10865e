"""The supervisor of a launched server, with real kills: nothing of the server is left, whoever died first."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_bupo.rollout.sglang.process import ServerProcess

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="servers are launched on Linux only")
ROOT = Path(__file__).parents[2]

# A server with a child and a grandchild in a session of its own; both ignore TERM. Writes all pids.
TREE = textwrap.dedent(
    """
    import os, signal, subprocess, sys, time
    ignore = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    below = ignore + f"import subprocess, sys; words = [sys.executable, '-c', {ignore + 'time.sleep(600)'!r}]; "
    below += "print(subprocess.Popen(words, start_new_session=True).pid, flush=True); time.sleep(600)"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as a stopped server it does not even hear it
    child = subprocess.Popen([sys.executable, "-c", below], stdout=subprocess.PIPE, text=True)
    grandchild = child.stdout.readline().strip()
    with open(sys.argv[1] + ".tmp", "w") as file:
        file.write(f"{os.getpid()} {child.pid} {grandchild}")
    os.rename(sys.argv[1] + ".tmp", sys.argv[1])
    time.sleep(float(sys.argv[2]))
    """
)
# A run that launches it, and has forked a child that holds every file of the run open, the supervisor's pipe too.
RUN = textwrap.dedent(
    f"""
    import os, sys, time
    from pathlib import Path
    from megatron_bupo.rollout.sglang.process import ServerProcess
    command = [sys.executable, "-c", {TREE!r}, sys.argv[1], "600"]
    process = ServerProcess(command, dict(os.environ), Path(sys.argv[2]), None)
    if os.fork() == 0:
        time.sleep(60)
        os._exit(0)
    time.sleep(600)
    """
)


HANG_S = 300.0
"""Only a hang takes this long, whatever else the machine does."""


def wait_for(what: Callable[[], Any], seconds: float = HANG_S) -> Any:
    """The first true value of `what`; fails when there is none in time."""
    deadline = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < deadline, "the condition was not met in time"
        time.sleep(0.05)
    return value


def pids_of(file: Path) -> list[int]:
    return [int(pid) for pid in wait_for(lambda: file.exists() and file.read_text()).split()]


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def pids(tmp_path: Path) -> Iterator[Path]:
    """Where a tree of processes writes its pids; ends them where the test did not."""
    file = tmp_path / "pids"
    yield file
    for pid in alive(pids_of(file)):
        os.kill(pid, signal.SIGKILL)


def start_tree(pids: Path, seconds: float = 600) -> ServerProcess:
    command = [sys.executable, "-c", TREE, str(pids), str(seconds)]
    return ServerProcess(command, dict(os.environ), pids.with_name("server_0.log"), None)


def test_a_killed_run_ends_all_processes_of_its_server(pids: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-c", RUN, str(pids), str(tmp_path / "server_0.log")]
    run = subprocess.Popen(words, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True)
    tree = pids_of(pids)
    assert alive(tree) == tree
    run.kill()
    run.wait()
    wait_for(lambda: not alive(tree))
    os.killpg(run.pid, signal.SIGKILL)  # the process that it had forked


def test_stop_ends_the_whole_tree(pids: Path) -> None:
    process = start_tree(pids)
    tree = pids_of(pids)
    process.begin_stop()
    process.wait()
    assert alive(tree) == []
    assert process.exit_status() == 128 + signal.SIGTERM


def test_kill_ends_a_stopped_server_at_once(pids: Path) -> None:
    process = start_tree(pids)
    tree = pids_of(pids)
    os.kill(tree[0], signal.SIGSTOP)
    process.kill()  # SIGTERM would wait in a stopped process
    assert alive(tree) == []
    assert process.exit_status() == 128 + signal.SIGKILL
    process.kill()  # once more does no harm


def test_what_a_dead_server_leaves_behind_is_ended(pids: Path) -> None:
    process = start_tree(pids)
    tree = pids_of(pids)
    os.kill(tree[0], signal.SIGKILL)
    assert wait_for(process.exit_status) == 128 + signal.SIGKILL
    assert alive(tree) == []


def test_a_killed_supervisor_ends_the_server(pids: Path) -> None:
    process = start_tree(pids)
    tree = pids_of(pids)
    os.kill(process.pid, signal.SIGKILL)
    wait_for(lambda: tree[0] not in alive(tree))


def test_a_server_that_ends_by_itself(pids: Path) -> None:
    process = start_tree(pids, seconds=0)
    process.wait()
    assert process.exit_status() == 0
    assert alive(pids_of(pids)) == []
