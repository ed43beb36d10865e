"""Servers that fail: what is wrong with one, and bringing it back while the others go on."""

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
"""So many connections in a row that are refused or cut, not late, mean a dead server."""
LOST_S = 5.0
"""Seconds that a server which was lost has to answer; the others wait for it at every update."""
NOBODY_BEHIND = frozenset({None, 502, 504})
"""No whole answer, or that of a gateway that reaches nobody."""

_Result = TypeVar("_Result")


class EngineError(RuntimeError):
    """The servers cannot go on. Names them and their reasons."""


@dataclass(frozen=True)
class Ailment:
    """What is wrong with a server; `needs_revival` unless the right weights are all that it lacks.

    `revival` is one that was under way: a second one would end the server that has just come back.
    """

    what: str
    needs_revival: bool = True
    revival: Future[None] | None = None


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

    def not_lost(self) -> list[Worker]:
        return [worker for worker in self._servers.workers if worker not in self._lost]

    def examine(self, worker: Worker, version: str | None, *, timeout_s: float | None = None) -> Ailment | None:
        """None where a server is healthy and holds `version` (None: any). Blocks, at most for the health timeout."""
        revival = self._revivals.get(worker)
        if revival is not None:
            return Ailment("it is being brought back", revival=revival)
        try:
            held = _probe(worker, timeout_s or self._health_timeout_s)
        except ServerError as error:
            return Ailment(_ended(worker) or str(error))
        if version is not None and held != version:
            return Ailment(f"it holds weights {held!r}, not {version!r}", needs_revival=False)
        return None

    def examine_router(self, endpoint: Endpoint) -> str | None:
        """Why the router of an endpoint cannot be asked; None where it answers, or there is none. Blocks."""
        router = endpoint.router
        if router is None:
            return None

        def ask(left_s: Callable[[], float]) -> None:
            try:
                router.get("/health", timeout_s=left_s())
            except ServerError as error:
                if error.status in NOBODY_BEHIND:
                    raise
                # One that says that something is wrong lives: some say so when it is a worker that ails.

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

    def revive(self, worker: Worker, why: str) -> Future[None]:
        """Start to bring a server back, unless that is under way. The future has ServersError if it is lost."""
        with self._lock:
            if worker not in self._revivals:
                worker.version = None  # now, and not when the thread begins: a batch must not ask it any more
                self._revivals[worker] = in_thread(lambda: self._revive(worker, why))
            return self._revivals[worker]

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
        doubtful = {worker for worker in workers if self._lost.pop(worker, None) is not None}
        checks = [in_thread(self._check, worker, thoroughly, worker in doubtful) for worker in workers]
        revivals = {worker: check.result() for worker, check in zip(workers, checks, strict=True)}
        back = [worker for worker, revival in revivals.items() if revival is None]
        pending = {revival for revival in revivals.values() if revival is not None}
        while pending and not back:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            back = [worker for worker, revival in revivals.items() if revival in done and revival.exception() is None]
        if not back:
            raise self.none_left()
        return back

    def none_left(self) -> EngineError:
        behind, being = "in order, but behind a router with one that is not", "it is being brought back"
        reasons = "; ".join(
            f"{worker.name}: {self._lost.get(worker, being if worker in self._revivals else behind)}"
            for worker in self._servers.workers
        )
        return EngineError(
            f"no SGLang server is left: {reasons}; --sglang-restarts and --sglang-start-timeout bound what is done to "
            "bring one back"
        )

    def _check(self, worker: Worker, thoroughly: bool, is_doubtful: bool) -> Future[None] | None:
        """None where a server is healthy, otherwise its revival."""
        revival = self._revivals.get(worker)
        if revival is not None:
            return revival
        if not thoroughly and not is_doubtful and self._answers(worker):
            return None
        timeout_s = min(LOST_S, self._health_timeout_s) if is_doubtful else None
        ailment = self.examine(worker, version=None, timeout_s=timeout_s)
        if ailment is None:
            if thoroughly or is_doubtful:
                worker.checked = False  # it failed: it may have been started anew since
            return None
        return ailment.revival or self.revive(worker, ailment.what)

    def _answers(self, worker: Worker) -> bool:
        try:
            held = _held_version(worker, self._health_timeout_s)
        except ServerError:
            return False
        if worker.version is not None and held != worker.version:
            worker.checked = False  # started anew by somebody
        return True

    def _revive(self, worker: Worker, why: str) -> None:
        name = worker.name
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

    def ask(left_s: Callable[[], float]) -> object:
        worker.client.get("/health", timeout_s=left_s())
        return _held_version(worker, left_s())

    return _try_several(ask, timeout_s)


def _try_several(ask: Callable[[Callable[[], float]], _Result], timeout_s: float) -> _Result:
    """The result of `ask`, called with what says how many seconds are left. Raises the last ServerError."""
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
