"""The rollout engine on SGLang servers: requests responses, hands over weights, and recovers from faults of servers.

It runs in one process. An event loop in a second thread sends the requests. Work that concerns the trainer (weights for
a server that came back, progress) is queued as tasks for the thread that called `generate`, which does them meanwhile.

Left out, with room for it: more requests than are needed (over-sampling), going on with what was begun under older
weights (partial rollouts), one step ahead, and truncated importance sampling. What a response needs for them is known:
each one carries its log-probs and the version of its weights.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import secrets
import warnings
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import replace
from queue import SimpleQueue

from megatron_bupo.rollout.engine import (
    Generation,
    GenerationRequest,
    Progress,
    RolloutEngine,
    SamplingParams,
    TrainedModel,
)
from megatron_bupo.rollout.sglang.dispatch import Batch
from megatron_bupo.rollout.sglang.recovery import EngineError, Recovery, in_thread
from megatron_bupo.rollout.sglang.scheduling import Limits
from megatron_bupo.rollout.sglang.servers import Servers
from megatron_bupo.rollout.sglang.weight_sync.calls import SyncError
from megatron_bupo.rollout.sglang.weight_sync.sync import WeightSync
from megatron_bupo.rollout.sglang.worker import Worker

MAX_UPDATE_ATTEMPTS = 3
"""How often the weights are sent before the run ends. Failures of servers that were left out do not count."""
MAX_FAILURES_PER_UPDATE = 2
"""Failures of one server in one update after which the others do not wait for it any more."""
OTHER_FILES = 256
"""Open files that are left to all else than the requests: probes, weights, logs, data."""
STOP_S = 15.0


class SGLangEngine(RolloutEngine):
    """Generates with the full policy on SGLang servers. It owns `servers` and `sync`, and closes them."""

    def __init__(self, servers: Servers, sync: WeightSync, limits: Limits) -> None:
        self._servers, self._sync = servers, sync
        self._limits = replace(limits, concurrency=_within_open_files(limits.concurrency, len(servers.workers)))
        self._recovery = Recovery(servers, limits.health_timeout_s)
        # Another run may have left weights of the same step on these servers: what they hold is named by both.
        self._token = secrets.token_hex(4)
        self._version = ""
        self._weights: tuple[TrainedModel, str] | None = None

    def generate(
        self, requests: list[GenerationRequest], params: SamplingParams, progress: Progress | None = None
    ) -> list[Generation]:
        """See `RolloutEngine.generate`. Servers that fail are brought back and given the current weights meanwhile.

        Raises:
            UsageError: a server refuses a request, or is set up so that its answers cannot be right.
            EngineError: a response failed too often, or no server is left.
        """
        assert self._weights is not None, "the servers have no weights of this run yet: update_weights comes first"
        assert len({request.identity for request in requests}) == len(requests), "two requests are the same"
        if not requests:
            return []
        tasks: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        batch = Batch(
            self._servers.endpoints,
            requests,
            params,
            self._weights[1],
            self._limits,
            self._recovery,
            push=lambda workers: self._request_push(workers, tasks),
            report=lambda number: tasks.put(lambda: progress(number) if progress is not None else None),
        )
        outcome = in_thread(lambda: asyncio.run(batch.run()))
        outcome.add_done_callback(lambda _: tasks.put(None))
        try:
            while (task := tasks.get()) is not None:
                task()
        except BaseException:
            batch.stop()
            wait([outcome], timeout=STOP_S)
            raise
        return [replace(generation, weight_version=self._version) for generation in outcome.result()]

    def update_weights(self, model: TrainedModel, version: str) -> None:
        """See `RolloutEngine.update_weights`. A server that failed is brought back meanwhile, and gets them later.

        Raises:
            EngineError: no server is left, or the weights did not arrive in several attempts.
        """
        self._version, self._weights = version, (model, f"{self._token}-{version}")
        failures: list[SyncError] = []
        left_out: set[Worker] = set()
        while sum(failure.worker not in left_out for failure in failures) < MAX_UPDATE_ATTEMPTS:
            workers = self._recovery.ready(thoroughly=bool(failures), without=left_out)
            try:
                self._push(workers)
                return
            except SyncError as error:
                warnings.warn(f"weights {version} are sent again: {error}", stacklevel=1)
                failures.append(error)
                if sum(failure.worker is error.worker for failure in failures) == MAX_FAILURES_PER_UPDATE:
                    self._leave_out(error, left_out)
        what = "; ".join(map(str, failures))
        raise EngineError(f"the servers did not take weights {version} in {len(failures)} attempts: {what}")

    def close(self) -> None:
        try:
            self._sync.close()
        finally:
            self._servers.close()

    def _push(self, workers: list[Worker]) -> None:
        """Give some servers the current weights, as far as they differ from those that all of them hold.

        Raises:
            SyncError: see WeightSync.push.
        """
        assert self._weights is not None
        held = {worker.version if worker.checked else None for worker in workers}
        token, _, version = (held.pop() or "").partition("-")
        since = version if not held and token == self._token else None
        self._sync.push(workers, *self._weights, since=since)

    def _leave_out(self, error: SyncError, left_out: set[Worker]) -> None:
        """Leave a server that keeps failing out of an update, unless it is the last: restarted if it is ours."""
        worker = error.worker
        if any(one is not worker and one not in left_out for one in self._recovery.not_lost()):
            left_out.add(worker)
        if worker.process is not None:
            self._recovery.recover(worker, str(error))
        elif worker in left_out:
            self._recovery.give_up(worker, f"it failed {MAX_FAILURES_PER_UPDATE} times in one update, at last: {error}")

    def _request_push(self, workers: list[Worker], tasks: SimpleQueue[Callable[[], object] | None]) -> Future[None]:
        """Have the thread that called `generate` give the current weights to some servers: all ranks take part."""
        pushed: Future[None] = Future()

        def push() -> None:
            if not pushed.set_running_or_notify_cancel():
                return  # the batch ended without them
            try:
                self._push(workers)
            except SyncError as error:
                pushed.set_exception(error)
            else:
                pushed.set_result(None)

        tasks.put(push)
        return pushed


def _within_open_files(concurrency: int, num_workers: int) -> int:
    """The requests that each server can have at once, a socket for each, after raising this process's limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # a system that allows less than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return concurrency
    room = max((limit - OTHER_FILES - 1) // num_workers, 1)
    if concurrency > room:
        warnings.warn(
            f"--sglang-concurrency {concurrency}: lowered to {room}; this process may open {limit} files (ulimit -n)",
            stacklevel=1,
        )
    return min(concurrency, room)
