"""Servers that fail: what is wrong with one, and bringing it back while the others go on."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from megatron_bupo.rollout.sglang.client import ServerError
from megatron_bupo.rollout.sglang.servers import Servers, ServersError, Worker

PROBE_PAUSE_S = 0.3
REFUSALS = 3
"""So many connections in a row that are refused or cut, not late, mean a dead server."""

_Result = TypeVar("_Result")


class EngineError(RuntimeError):
    """The servers cannot go on. Names them and their reasons."""


@dataclass(frozen=True)
class Ailment:
    """What is wrong with a server; `needs_revival` unless the right weights are all that it lacks."""

    what: str
    needs_revival: bool = True


class Repairs:
    """The state of health of the servers, over the whole run. Its methods can be called from any thread.

    A revival has a thread of its own, which goes on when the batch in which the server failed has ended: the training
    step covers it. What could not be revived is lost until the next update of the weights.
    """

    def __init__(self, servers: Servers, health_timeout_s: float) -> None:
        self._servers, self._health_timeout_s = servers, health_timeout_s
        self._revivals: dict[Worker, Future[None]] = {}
        self._lost: dict[Worker, str] = {}
        self._lock = threading.Lock()

    def is_lost(self, worker: Worker) -> bool:
        return worker in self._lost

    def examine(self, worker: Worker, version: str | None) -> Ailment | None:
        """None where a server is healthy and holds `version` (None: any). Blocks, at most for the health timeout."""
        if worker in self._revivals:
            return Ailment("it is being brought back")
        try:
            held = _probe(worker, self._health_timeout_s)
        except ServerError as error:
            return Ailment(_ended(worker) or str(error))
        if version is not None and held != version:
            return Ailment(f"it holds weights {held!r}, not {version!r}", needs_revival=False)
        return None

    def revive(self, worker: Worker, why: str) -> Future[None]:
        """Start to bring a server back, unless that is under way. The future has ServersError if it is lost."""
        with self._lock:
            if worker not in self._revivals:
                self._revivals[worker] = in_thread(lambda: self._revive(worker, why))
            return self._revivals[worker]

    def give_up(self, worker: Worker, why: str) -> None:
        """Leave a server out until the next update of the weights."""
        worker.version = None
        self._lost[worker] = why
        warnings.warn(f"server {worker.name} is left out: {why}", stacklevel=1)

    def ready(self, *, thoroughly: bool) -> list[Worker]:
        """The servers that can be given weights, after bringing back those that failed. Blocks.

        Args:
            thoroughly: have them generate a token (a second); otherwise it is enough that they answer at all.

        Raises:
            EngineError: none is left.
        """
        doubtful = set(self._lost)
        self._lost.clear()
        workers = self._servers.workers
        checks = [in_thread(self._bring_back, worker, thoroughly or worker in doubtful) for worker in workers]
        back = [worker for worker, check in zip(workers, checks, strict=True) if check.result()]
        if not back:
            raise self.none_left()
        return back

    def none_left(self) -> EngineError:
        behind = "in order, but behind a router with one that is not"
        reasons = "; ".join(f"{worker.name}: {self._lost.get(worker, behind)}" for worker in self._servers.workers)
        return EngineError(
            f"no SGLang server is left: {reasons}; --sglang-restarts and --sglang-start-timeout bound what is done to "
            "bring one back"
        )

    def _bring_back(self, worker: Worker, thoroughly: bool) -> bool:
        """Whether a server is healthy now, if need be after a revival."""
        revival = self._revivals.get(worker)
        if revival is None:
            if not thoroughly and self._answers(worker):
                return True
            ailment = self.examine(worker, version=None)
            if ailment is None:
                worker.checked = worker.checked and not thoroughly  # it failed: it may have been started anew since
                return True
            revival = self.revive(worker, ailment.what)
        return revival.exception() is None

    def _answers(self, worker: Worker) -> bool:
        try:
            held = _held_version(worker, self._health_timeout_s)
        except ServerError:
            return False
        if worker.version is not None and held != worker.version:
            worker.checked = False  # started anew by somebody
        return True

    def _revive(self, worker: Worker, why: str) -> None:
        name, worker.version = worker.name, None
        try:
            self._servers.revive(worker)
        except Exception as error:
            self.give_up(worker, f"{error} (it had failed: {why})")
            raise ServersError(str(error)) from error
        finally:
            with self._lock:
                del self._revivals[worker]
        how = f"was restarted as {worker.name}" if worker.process is not None else "answers again"
        warnings.warn(f"server {name} {how}: it had failed: {why}", stacklevel=1)


def in_thread(function: Callable[..., _Result], *args: Any) -> Future[_Result]:
    """Run a function in a thread that holds up neither the end of a batch nor that of the process."""
    future: Future[_Result] = Future()
    future.set_running_or_notify_cancel()  # from now on it cannot be cancelled

    def run() -> None:
        try:
            result = function(*args)
        except BaseException as error:  # whoever waits for the future is told
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, daemon=True).start()
    return future


def _ended(worker: Worker) -> str | None:
    """What is known of the end of a server that the run launched; None if it runs, or is not ours."""
    if worker.process is None or (status := worker.process.exit_status()) is None:
        return None
    return f"it ended (exit status {status}, log {worker.process.log})"


def _probe(worker: Worker, timeout_s: float) -> object:
    """The version of the weights of a server that generates. Raises ServerError: the last failure of several tries."""
    deadline = time.monotonic() + timeout_s
    refused = 0
    while True:
        try:
            worker.client.get("/health", timeout_s=max(deadline - time.monotonic(), PROBE_PAUSE_S))
            return _held_version(worker, max(deadline - time.monotonic(), PROBE_PAUSE_S))
        except ServerError as error:
            refused = refused + 1 if error.status is None else 0
            # A server that says 503 may have much to do: it has until the deadline.
            if refused == REFUSALS or time.monotonic() + PROBE_PAUSE_S > deadline:
                raise
        time.sleep(PROBE_PAUSE_S)


def _held_version(worker: Worker, timeout_s: float) -> object:
    info = worker.client.get("/model_info", timeout_s=timeout_s)
    return info.get("weight_version") if isinstance(info, dict) else None
