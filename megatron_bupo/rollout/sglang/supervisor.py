"""A small process between a run and a server that it launched: however the run ends, the server ends with it.

Run as a file, by any Python on Linux: it imports the standard library only. Its input is a pipe from the run. The first
line is JSON: {"command": [...], "run_pid": pid, "api_key": text or null, "grace_s": seconds}. Later bytes: `e` ends the
server (TERM, the grace, KILL), `k` kills it at once. The end of the pipe, a signal to the supervisor, or the end of the
run (the parent is another process then) are like `e`. When the supervisor has ended, no process of the server is left.

An API key goes to the server in a private file (sglang's --config), never on a command line, and is masked in what the
server prints: sglang logs all its arguments.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

POLL_S = 0.25
MASK = b"********"
LONGEST_LINE = 1 << 20
# Of Linux's prctl.
_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36


class Supervisor:
    """Starts the server, waits for a reason to end it, ends it. `run` gives the server's exit status as in a shell."""

    def __init__(self, order: dict[str, Any]) -> None:
        self._run_pid, self._grace_s = int(order["run_pid"]), float(order["grace_s"])
        self._secret = (order["api_key"] or "").encode()
        self._status: int | None = None
        self._ending: str | None = None  # "grace" or "kill", once there is a reason
        self._orders_open = True
        self._unwritten = b""  # the line that the server has begun: masked when it is whole
        self._config_dir: str | None = None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        _prctl(_SET_CHILD_SUBREAPER, 1)  # a grandchild whose parent dies becomes the supervisor's child, not init's
        command = list(order["command"])
        if self._secret:
            command += ["--config", self._write_config(order["api_key"])]
        self._server = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if self._secret else None,
            stderr=subprocess.STDOUT if self._secret else None,
            preexec_fn=_die_with_parent,
            start_new_session=True,
        )
        self._output = self._server.stdout.fileno() if self._server.stdout is not None else None

    def run(self) -> int:
        try:
            while self._status is None and self._ending is None:
                self._look()
            if self._status is None and self._ending == "grace":
                _kill(self._server.pid, signal.SIGTERM)
                deadline = time.monotonic() + self._grace_s
                while self._status is None and self._ending == "grace" and time.monotonic() < deadline:
                    self._look()
        finally:
            self._kill_all()
            if self._config_dir is not None:
                shutil.rmtree(self._config_dir, ignore_errors=True)
        return 1 if self._status is None else self._status

    def _look(self) -> None:
        """Wait a moment for an order, for output, for the end of the server or of the run."""
        watched = [0] if self._orders_open else []
        if self._output is not None:
            watched.append(self._output)
        ready = select.select(watched, [], [], POLL_S)[0]
        if 0 in ready:
            order = os.read(0, 1)
            self._orders_open = bool(order)
            self._ending = "kill" if order == b"k" else self._ending or "grace"
        if self._output in ready:
            self._pass_on()
        if os.getppid() != self._run_pid:  # the pipe may live on in a process that the run forked
            self._ending = self._ending or "grace"
        self._collect()

    def _collect(self) -> None:
        """Take the exit statuses of children that have ended."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._server.pid:
                code = os.waitstatus_to_exitcode(status)
                self._status = code if code >= 0 else 128 - code

    def _kill_all(self) -> None:
        """KILL everything below the supervisor until nothing is left: new ones may come while the old ones go."""
        while pids := _descendants(os.getpid()):
            for pid in pids:
                _kill(pid, signal.SIGKILL)
            self._collect()
            time.sleep(0.02)
        while self._output is not None:
            self._pass_on()

    def _pass_on(self) -> None:
        """Write what the server printed, in whole lines and masked."""
        assert self._output is not None
        piece = os.read(self._output, 65536)
        text = self._unwritten + piece
        end = text.rfind(b"\n") + 1
        if not piece or len(text) - end > LONGEST_LINE:
            end = len(text)
        self._unwritten = text[end:]
        _write(text[:end].replace(self._secret, MASK))
        if not piece:
            self._output = None

    def _on_signal(self, _number: int, _frame: Any) -> None:
        self._ending = self._ending or "grace"

    def _write_config(self, api_key: str) -> str:
        self._config_dir = tempfile.mkdtemp(prefix="bupo-sglang-")  # mode 0700
        path = os.path.join(self._config_dir, "key.yaml")
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(f"api-key: {json.dumps(api_key)}\n")  # a text in JSON is one in YAML
        return path


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def _die_with_parent() -> None:
    """Runs in the new process: if the supervisor is killed, the kernel kills the server."""
    _prctl(_SET_PDEATHSIG, signal.SIGKILL)


def _kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return  # it was quicker


def _descendants(root: int) -> list[int]:
    """Pids below `root`, zombies included, children before grandchildren."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    parent = int(file.read().rpartition(b")")[2].split()[1])
            except OSError:
                continue  # ended while we looked
            children.setdefault(parent, []).append(int(name))
    found = list(children.get(root, ()))
    for pid in found:
        found += children.get(pid, ())
    return found


def _write(data: bytes) -> None:
    try:
        while data:
            data = data[os.write(1, data) :]
    except OSError:
        return  # a full disk: the server matters more than its log


def _read_order() -> dict[str, Any]:
    """The first line of the pipe, byte by byte: what follows is for later."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            sys.exit("the run ended before it said what to start")
        line += byte
    return json.loads(line)


if __name__ == "__main__":
    sys.exit(Supervisor(_read_order()).run())
