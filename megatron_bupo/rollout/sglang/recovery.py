"""Servers that fail: the diagnosis of one, and its recovery while the others go on."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Collection
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any, TypeVar

from megatron_bupo.rollout.sglang.client import ServerError
from megatron_bupo.rollout.sglang.servers import Servers, ServersError
from megatron_bupo.rollout.sglang.worker import Endpoint, Worker

PROBE_PAUSE_S = 0.3
MAX_REFUSED = 3
"""A server is dead after this many connections in a row that were refused or cut (not late)."""
LOST_S = 5.0
"""Seconds that a server which was given up has to answer at an update, for which the others wait."""
UNREACHABLE_STATUSES = frozenset({None, 502, 504})
"""HTTP statuses of a gateway that reaches no server; None: no whole answer."""

_Result = TypeVar("_Result")


class EngineError(RuntimeError):
    """No server can answer, or one request failed too often. Names the servers and the reasons."""


@dataclass(frozen=True)
class Fault:
    """What is wrong with a server. `needs_recovery` is False where it only lacks the right weights.

    `under_way` is a recovery that has begun: a second one would end the server that has just come back.
    """

    what: str
    needs_recovery: bool = True
    under_way: Future[None] | None = None


class Recovery:
    """Diagnoses servers and brings failed ones back, over the whole run. Its methods can be called from any thread.

    Each server recovers in its own thread, which may outlive the batch in which the server failed: it goes on while the
    trainer updates. A server that could not recover is lost until the next update of the weights.
    """

    def __init__(self, servers: Servers, health_timeout_s: float) -> None:
        self._servers, self._health_timeout_s = servers, health_timeout_s
        self._recoveries: dict[Worker, Future[None]] = {}
        self._lost: dict[Worker, str] = {}
        self._lock = threading.Lock()

    def is_lost(self, worker: Worker) -> bool:
        return worker in self._lost

    def not_lost(self) -> list[Worker]:
        return [worker for worker in self._servers.workers if worker not in self._lost]

    def diagnose(self, worker: Worker, version: str | None, *, timeout_s: float | None = None) -> Fault | None:
        """None where a server is healthy and holds `version` (None: any). Blocks, at most for the health timeout."""
        recovery = self._recoveries.get(worker)
        if recovery is not None:
            return Fault("it is being brought back", under_way=recovery)
        try:
            held = _probe(worker, timeout_s or self._health_timeout_s)
        except ServerError as error:
            return Fault(_ended(worker) or str(error))
        if version is not None and held != version:
            return Fault(f"it holds weights {held!r}, not {version!r}", needs_recovery=False)
        return None

    def diagnose_router(self, endpoint: Endpoint) -> str | None:
        """Why the router of an endpoint cannot be asked; None where it answers, or there is none. Blocks."""
        router = endpoint.router
        if router is None:
            return None

        def ask(left_s: Callable[[], float]) -> None:
            try:
                router.get("/health", timeout_s=left_s())
            except ServerError as error:
                if error.status in UNREACHABLE_STATUSES:
                    raise
                # A router that answers with an error is alive: some do so when one of their workers fails.

        try:
            _try_several(ask, self._health_timeout_s)
        except ServerError as error:
            return str(error)
        return None

    def await_router(self, endpoint: Endpoint, why: str) -> None:
        """Wait for a router that failed. Blocks. Raises ServersError after giving its servers up."""
        assert endpoint.router is not None
        try:
            self._servers.await_router(endpoint)
        except ServersError as error:
            for worker in endpoint.workers:
                self.give_up(worker, f"{error} (it had failed: {why})")
            raise
        warnings.warn(f"router {endpoint.router.url} answers again: it had failed: {why}", stacklevel=1)

    def recover(self, worker: Worker, why: str) -> Future[None]:
        """Start to bring a server back, unless that is under way. The future has ServersError if it is lost."""
        with self._lock:
            if worker not in self._recoveries:
                worker.version = None  # before the thread begins: a batch must not ask it any more
                self._recoveries[worker] = in_thread(lambda: self._recover(worker, why))
            return self._recoveries[worker]

    def give_up(self, worker: Worker, why: str) -> None:
        """Leave a server out until the next update of the weights."""
        worker.version = None
        self._lost[worker] = why
        warnings.warn(f"server {worker.name} is left out: {why}", stacklevel=1)

    def ready(self, *, thoroughly: bool, without: Collection[Worker] = ()) -> list[Worker]:
        """The servers that can be given weights now. Blocks.

        Those that failed are brought back meanwhile, and are waited for only where there is no other.

        Args:
            thoroughly: have them generate a token (a second); otherwise it is enough that they answer at all.
            without: left out.

        Raises:
            EngineError: none is left.
        """
        workers = [worker for worker in self._servers.workers if worker not in without]
        given_up = {worker for worker in workers if self._lost.pop(worker, None) is not None}
        checks = [in_thread(self._check, worker, thoroughly, worker in given_up) for worker in workers]
        recoveries = {worker: check.result() for worker, check in zip(workers, checks, strict=True)}
        back = [worker for worker, recovery in recoveries.items() if recovery is None]
        pending = {recovery for recovery in recoveries.values() if recovery is not None}
        while pending and not back:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            back = [
                worker for worker, recovery in recoveries.items() if recovery in done and recovery.exception() is None
            ]
        if not back:
            raise self.none_left()
        return back

    def none_left(self) -> EngineError:
        behind, being = "healthy, but behind a router with one that is not", "it is being brought back"
        reasons = "; ".join(
            f"{worker.name}: {self._lost.get(worker, being if worker in self._recoveries else behind)}"
            for worker in self._servers.workers
        )
        return EngineError(
            f"no SGLang server is left: {reasons}; --sglang-restarts and --sglang-start-timeout bound what is done to "
            "bring one back"
        )

    def _check(self, worker: Worker, thoroughly: bool, was_given_up: bool) -> Future[None] | None:
        """None where a server is healthy, otherwise its recovery."""
        recovery = self._recoveries.get(worker)
        if recovery is not None:
            return recovery
        if not thoroughly and not was_given_up and self._answers(worker):
            return None
        timeout_s = min(LOST_S, self._health_timeout_s) if was_given_up else None
        fault = self.diagnose(worker, version=None, timeout_s=timeout_s)
        if fault is None:
            if thoroughly or was_given_up:
                worker.checked = False  # it failed: somebody may have restarted it since
            return None
        return fault.under_way or self.recover(worker, fault.what)

    def _answers(self, worker: Worker) -> bool:
        try:
            held = _held_version(worker, self._health_timeout_s)
        except ServerError:
            return False
        if worker.version is not None and held != worker.version:
            worker.checked = False  # another process may have restarted it
        return True

    def _recover(self, worker: Worker, why: str) -> None:
        name = worker.name
        try:
            self._servers.recover(worker)
        except Exception as error:
            self.give_up(worker, f"{error} (it had failed: {why})")
            raise ServersError(str(error)) from error
        finally:
            with self._lock:
                del self._recoveries[worker]
        how = f"was restarted as {worker.name}" if worker.process is not None else "answers again"
        warnings.warn(f"server {name} {how}: it had failed: {why}", stacklevel=1)


def in_thread(function: Callable[..., _Result], *args: Any) -> Future[_Result]:
    """Run a function in a thread for which neither a batch nor the process waits at its end."""
    future: Future[_Result] = Future()
    future.set_running_or_notify_cancel()  # from now on it cannot be cancelled

    def run() -> None:
        try:
            result = function(*args)
        except BaseException as error:  # it is set on the future, which another thread waits for
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, daemon=True).start()
    return future


def _ended(worker: Worker) -> str | None:
    """How a server that the run launched ended; None if it runs, or if the run did not launch it."""
    if worker.process is None or (status := worker.process.exit_status()) is None:
        return None
    return f"it ended (exit status {status}, log {worker.process.log})"


def _probe(worker: Worker, timeout_s: float) -> object:
    """The weight version of a server that can generate. Raises ServerError: the last failure of several tries."""

    def ask(left_s: Callable[[], float]) -> object:
        worker.client.get("/health", timeout_s=left_s())
        return _held_version(worker, left_s())

    return _try_several(ask, timeout_s)


def _try_several(ask: Callable[[Callable[[], float]], _Result], timeout_s: float) -> _Result:
    """The result of `ask`, which is given a function that returns the seconds left. Raises the last ServerError."""
    deadline = time.monotonic() + timeout_s
    refused = 0
    while True:
        try:
            return ask(lambda: max(deadline - time.monotonic(), PROBE_PAUSE_S))
        except ServerError as error:
            refused = refused + 1 if error.status is None else 0
            # A server that says 503 may have much to do: it has until the deadline.
            if refused == MAX_REFUSED or time.monotonic() + PROBE_PAUSE_S > deadline:
                raise
        time.sleep(PROBE_PAUSE_S)


def _held_version(worker: Worker, timeout_s: float) -> object:
    info = worker.client.get("/model_info", timeout_s=timeout_s)
    return info.get("weight_version") if isinstance(info, dict) else None
