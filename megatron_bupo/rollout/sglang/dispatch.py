"""One batch of requests over the SGLang servers: which server is asked for what, and what follows when one fails.

Every endpoint (a server, or a router with its servers) is a backend. Each request has exactly one state: queued, asked
of one backend, or failed there until that backend was diagnosed. So no request is lost and none is answered twice. A
task for each backend probes it at intervals, and at once after a failure. What it finds decides:

    healthy         the failed requests have used up an attempt; they are queued again at the front, for another backend
                    if there is one
    router down     all requests asked of it are queued again without using up an attempt; the run waits for the router,
                    its servers stay as they are
    hung or dead    all requests asked of it are queued again without using up an attempt; the server is restarted (or
                    waited for, if the run did not start it), gets the weights and serves again
    lost            the other backends do the rest; without any other the batch ends

A backend that fails several times in a row counts as dead even if it seems healthy.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any

from megatron_bupo.errors import UsageError
from megatron_bupo.rollout.engine import Generation, GenerationRequest, SamplingParams
from megatron_bupo.rollout.sglang.client import ServerError
from megatron_bupo.rollout.sglang.recovery import EngineError, Fault, Recovery, in_thread
from megatron_bupo.rollout.sglang.requests import BadAnswer, generate_body, name_of, read_answer, sampling_seeds
from megatron_bupo.rollout.sglang.scheduling import Backend, Job, Limits, next_share
from megatron_bupo.rollout.sglang.servers import ServersError
from megatron_bupo.rollout.sglang.weight_sync.calls import SyncError
from megatron_bupo.rollout.sglang.worker import Endpoint, Worker

MAX_CONSECUTIVE_FAILURES = 3
"""Failures in a row, with no response between them, after which a backend that seems healthy counts as dead."""
MAX_PUSHES = 3
"""How often the weights are sent to a backend that comes back, before it is lost."""
MAX_CONSECUTIVE_RECOVERIES = 5
"""Recoveries in a row, with no response between them, after which a backend is lost."""
ABORT_TIMEOUT_S = 5.0
REFUSED_STATUSES = frozenset({400, 401, 403, 404, 405, 413, 422})
"""HTTP statuses that say that the request is wrong; asking again would not help."""


class Batch:
    """The requests of one `generate`; `run` is the event loop's, `stop` any thread's.

    Args:
        version: of the weights that every answer must come from.
        push: gives servers the current weights, in another thread; the future has SyncError if that fails.
        report: called with 1 for every response.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        requests: Sequence[GenerationRequest],
        params: SamplingParams,
        version: str,
        limits: Limits,
        recovery: Recovery,
        push: Callable[[list[Worker]], Future[None]],
        report: Callable[[int], object],
    ) -> None:
        self._endpoints, self._params, self._version = endpoints, params, version
        self._limits, self._recovery, self._push, self._report = limits, recovery, push, report
        seeds = sampling_seeds(params.seed, requests)
        self._jobs = [Job(request, seed) for request, seed in zip(requests, seeds, strict=True)]
        self._queue = deque(self._jobs)
        self._unanswered = len(self._jobs)
        self._backends: list[Backend] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._cancel: Callable[[], object] | None = None
        self._is_stopped = False

    async def run(self) -> list[Generation]:
        """The responses, in the order of the requests.

        Raises:
            UsageError: a server refuses a request, or is set up wrongly.
            EngineError: a response failed too often, or no server is left.
        """
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        self._cancel = lambda: loop.call_soon_threadsafe(task.cancel)
        if self._is_stopped:
            raise asyncio.CancelledError
        self._over: asyncio.Future[None] = loop.create_future()
        self._backends = [Backend(endpoint) for endpoint in self._endpoints]
        try:
            for backend in self._backends:
                if all(worker.version == self._version for worker in backend.workers):
                    await self._open(backend)
            self._fill()  # after all are open: else the first would take more than its share
            for backend in self._backends:
                self._spawn(self._monitor(backend))
            await self._over
        except BaseException:
            await self._end_tasks()
            await self._abort_rest()
            raise
        await self._end_tasks()
        generations = [job.generation for job in self._jobs if job.generation is not None]
        assert len(generations) == len(self._jobs), "a request was lost"
        return generations

    def stop(self) -> None:
        """Have `run` raise CancelledError, after it has told the servers to stop."""
        self._is_stopped = True
        if self._cancel is not None:
            with contextlib.suppress(RuntimeError):  # the loop has just ended
                self._cancel()

    # Sending

    def _fill(self) -> None:
        """Ask the open backends for what is in the queue, as far as they have room."""
        concurrency = self._limits.concurrency
        while (share := next_share(self._queue, self._backends, self._unanswered, concurrency)) is not None:
            backend, jobs = share
            backend.asked.update({self._spawn(self._answer(backend, job)): job for job in jobs})

    async def _answer(self, backend: Backend, job: Job) -> None:
        """Ask for one response, and deliver it or report the failure."""
        assert backend.http is not None
        client, rid = backend.endpoint.client, f"{'-'.join(map(str, job.request.identity))}-{uuid.uuid4().hex}"
        body = generate_body(job.request, self._params, job.seed, rid)
        failure = None
        try:
            answer = await client.ask(backend.http, "/generate", body, timeout_s=self._limits.request_timeout_s)
            generation = read_answer(answer, job.request, self._params, rid, self._version, client.url)
        except ServerError as error:
            if error.status in REFUSED_STATUSES:
                raise UsageError(f"{name_of(job.request)} is refused: {error}") from error
            failure = str(error)
        except BadAnswer as error:
            failure = str(error)
        task = asyncio.current_task()
        assert task is not None
        if backend.asked.pop(task, None) is None:
            return  # too late: the request is back in the queue
        if failure is not None:
            backend.is_open = False
            backend.failed.append((job, failure))
            backend.alarm.set()
            return
        job.generation, backend.consecutive_failures, backend.consecutive_recoveries = generation, 0, 0
        self._unanswered -= 1
        self._report(1)
        if self._unanswered == 0 and not self._over.done():
            self._over.set_result(None)
        self._fill()

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task whose error ends the batch."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)
        return task

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not self._over.done():
            self._over.set_exception(error)

    # Keeping

    async def _monitor(self, backend: Backend) -> None:
        """Probe one backend until the batch ends or the backend is lost. Raises EngineError when the last one is."""
        is_healthy = not backend.is_down or await self._restore(backend, await self._diagnose(backend, self._version))
        while is_healthy:
            timer = asyncio.get_running_loop().call_later(self._limits.probe_interval_s, backend.alarm.set)
            await backend.alarm.wait()
            timer.cancel()
            backend.alarm.clear()
            failed, backend.failed = backend.failed, []
            reason = await asyncio.wrap_future(in_thread(self._recovery.diagnose_router, backend.endpoint))
            if reason is not None:
                self._take_back(backend, failed)
                failed = []
                if not await self._await_router(backend, reason):
                    break
            faults = await self._diagnose(backend, self._version)
            backend.consecutive_failures += bool(failed)
            if backend.consecutive_failures == MAX_CONSECUTIVE_FAILURES and not faults:
                what = f"it failed {MAX_CONSECUTIVE_FAILURES} times in a row, at last: {failed[-1][1]}"
                faults = {worker: Fault(what) for worker in backend.workers}
            if faults:
                self._take_back(backend, failed)
                is_healthy = await self._restore(backend, faults)
            else:
                if backend.is_down:  # its router is back
                    await self._open(backend)
                self._count(backend, failed)
                backend.is_open = not backend.failed
                self._fill()
        backend.is_lost = True
        if all(other.is_lost for other in self._backends):
            raise self._recovery.none_left()

    def _count(self, backend: Backend, failed: list[tuple[Job, str]]) -> None:
        """Queue again what failed at a healthy backend; it uses up an attempt. Raises EngineError after the last."""
        for job, failure in reversed(failed):
            job.failures.append(failure)
            job.failed_at.append(backend)
            if len(job.failures) >= self._limits.attempts:
                raise EngineError(
                    f"{name_of(job.request)}: no usable answer in {len(job.failures)} attempts (--sglang-attempts): "
                    + "; ".join(dict.fromkeys(job.failures))
                )
            self._queue.appendleft(job)

    def _take_back(self, backend: Backend, failed: list[tuple[Job, str]]) -> None:
        """Queue again all that a backend was asked for; the requests use up no attempt."""
        backend.is_open, backend.is_down = False, True
        for task in backend.asked:
            task.cancel()
        jobs = [*backend.asked.values(), *(job for job, _ in failed), *(job for job, _ in backend.failed)]
        backend.asked.clear()
        backend.failed.clear()
        self._queue.extendleft(reversed(jobs))
        self._fill()

    async def _diagnose(self, backend: Backend, version: str | None) -> dict[Worker, Fault]:
        """The faults of the servers of a backend, which are all asked at the same time."""
        probes = [in_thread(self._recovery.diagnose, worker, version) for worker in backend.workers]
        found = await asyncio.gather(*map(asyncio.wrap_future, probes))
        return {worker: fault for worker, fault in zip(backend.workers, found, strict=True) if fault is not None}

    async def _await_router(self, backend: Backend, why: str) -> bool:
        """Whether the router of a backend is back. Its servers are left as they are: it was not their fault."""
        backend.consecutive_recoveries += 1
        if backend.consecutive_recoveries > MAX_CONSECUTIVE_RECOVERIES:
            for worker in backend.workers:
                self._recovery.give_up(
                    worker, f"its router fails again after {MAX_CONSECUTIVE_RECOVERIES} waits for it: {why}"
                )
            return False
        try:
            await asyncio.wrap_future(in_thread(self._recovery.await_router, backend.endpoint, why))
        except ServersError:
            return False
        return True

    async def _restore(self, backend: Backend, faults: dict[Worker, Fault]) -> bool:
        """Whether a backend can go on, after its servers were brought back and given the weights."""
        if any(self._recovery.is_lost(worker) for worker in backend.workers):
            return False
        backend.consecutive_recoveries += 1
        what = "; ".join(fault.what for fault in faults.values())
        failure = f"it fails again after {MAX_CONSECUTIVE_RECOVERIES} recoveries: {what}"
        for _ in range(MAX_PUSHES if backend.consecutive_recoveries <= MAX_CONSECUTIVE_RECOVERIES else 0):
            for worker in faults:
                worker.version, worker.checked = None, False
            recoveries = [
                fault.under_way or self._recovery.recover(worker, fault.what)
                for worker, fault in faults.items()
                if fault.needs_recovery
            ]
            try:
                await asyncio.gather(*map(asyncio.wrap_future, recoveries))
                await asyncio.wrap_future(self._push([w for w in backend.workers if w.version != self._version]))
            except ServersError:
                return False
            except SyncError as error:
                failure = str(error)
                faults = await self._diagnose(backend, None)
                continue
            for worker, fault in faults.items():
                if not fault.needs_recovery:
                    warnings.warn(f"server {worker.name} was given the weights again: {fault.what}", stacklevel=1)
            backend.consecutive_failures = 0
            await self._open(backend)
            self._fill()
            return True
        for worker in faults or backend.workers:
            self._recovery.give_up(worker, failure)
        return False

    async def _open(self, backend: Backend) -> None:
        if backend.http is not None:
            await backend.http.aclose()
        backend.http = backend.endpoint.client.for_event_loop(self._limits.concurrency * len(backend.workers))
        backend.is_open, backend.is_down = True, False

    # Ending

    async def _end_tasks(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for backend in self._backends:
            if backend.http is not None:
                await backend.http.aclose()

    async def _abort_rest(self) -> None:
        """Have the servers abort the requests that are left, as far as they answer."""

        async def abort(worker: Worker) -> None:
            async with worker.client.for_event_loop(1) as http:
                await worker.client.ask(http, "/abort_request", {"abort_all": True}, timeout_s=ABORT_TIMEOUT_S)

        workers = [worker for backend in self._backends if not backend.is_lost for worker in backend.workers]
        await asyncio.gather(*map(abort, workers), return_exceptions=True)
