"""One batch of requests over the SGLang servers: who is asked for what, and what happens when a server fails.

Every endpoint (a server, or a router with its servers) is a lane. A request is always in exactly one place: in the
queue, asked of one lane, or failed there and waiting for the verdict on the lane; so none is lost and none answered
twice. Each lane has a keeper, which probes it from time to time and at once after a failure:

    healthy        the requests that failed have used up an attempt and are queued again, first, for another lane
                   if there is one
    behind a router that is down
                   all that was asked of it is queued again, at no cost; the router is waited for, its servers stay
    hung or dead   all that was asked of it is queued again, at no cost to the requests; it is brought back, given the
                   weights, and goes on
    lost           the others do the rest; without any other the batch ends

A lane that fails over and over, though it seems healthy, counts as dead.
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
from megatron_bupo.rollout.sglang.recovery import Ailment, EngineError, Repairs, in_thread
from megatron_bupo.rollout.sglang.requests import BadAnswer, generate_body, name_of, read_answer, sampling_seeds
from megatron_bupo.rollout.sglang.scheduling import Job, Lane, Limits, next_share
from megatron_bupo.rollout.sglang.servers import ServersError
from megatron_bupo.rollout.sglang.weight_sync.calls import SyncError
from megatron_bupo.rollout.sglang.worker import Endpoint, Worker

STRIKES = 3
"""Failures in a row, with no response between them, after which a lane that seems healthy counts as dead."""
PUSHES = 3
"""How often the weights are sent to a lane that comes back, before it is lost."""
REPAIRS = 5
"""Repairs in a row, with no response between them, after which a lane is lost."""
ABORT_TIMEOUT_S = 5.0
REFUSALS = frozenset({400, 401, 403, 404, 405, 413, 422})
"""HTTP statuses that say that the request is wrong; asking again would not help."""


class Batch:
    """The requests of one `generate`; `run` is the event loop's, `stop` any thread's.

    Args:
        version: of the weights that every answer must come from.
        push: gives servers the current weights, elsewhere; the future has SyncError if that fails.
        report: called with 1 for every response.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        requests: Sequence[GenerationRequest],
        params: SamplingParams,
        version: str,
        limits: Limits,
        repairs: Repairs,
        push: Callable[[list[Worker]], Future[None]],
        report: Callable[[int], object],
    ) -> None:
        self._endpoints, self._params, self._version = endpoints, params, version
        self._limits, self._repairs, self._push, self._report = limits, repairs, push, report
        seeds = sampling_seeds(params.seed, requests)
        self._jobs = [Job(request, seed) for request, seed in zip(requests, seeds, strict=True)]
        self._queue = deque(self._jobs)
        self._unanswered = len(self._jobs)
        self._lanes: list[Lane] = []
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
        self._lanes = [Lane(endpoint) for endpoint in self._endpoints]
        try:
            for lane in self._lanes:
                if all(worker.version == self._version for worker in lane.workers):
                    await self._open(lane)
            self._fill()  # now that all are open: the first would take more than its share
            for lane in self._lanes:
                self._spawn(self._keep(lane))
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
        """Ask the open lanes for what is in the queue, as far as they have room."""
        concurrency = self._limits.concurrency
        while (share := next_share(self._queue, self._lanes, self._unanswered, concurrency)) is not None:
            lane, jobs = share
            lane.asked.update({self._spawn(self._answer(lane, job)): job for job in jobs})

    async def _answer(self, lane: Lane, job: Job) -> None:
        """Ask for one response, and deliver it or report the failure."""
        assert lane.http is not None
        client, rid = lane.endpoint.client, f"{'-'.join(map(str, job.request.identity))}-{uuid.uuid4().hex}"
        body = generate_body(job.request, self._params, job.seed, rid)
        failure = None
        try:
            answer = await client.ask(lane.http, "/generate", body, timeout_s=self._limits.request_timeout_s)
            generation = read_answer(answer, job.request, self._params, rid, self._version, client.url)
        except ServerError as error:
            if error.status in REFUSALS:
                raise UsageError(f"{name_of(job.request)} is refused: {error}") from error
            failure = str(error)
        except BadAnswer as error:
            failure = str(error)
        task = asyncio.current_task()
        assert task is not None
        if lane.asked.pop(task, None) is None:
            return  # too late: the request is back in the queue
        if failure is not None:
            lane.is_open = False
            lane.failed.append((job, failure))
            lane.alarm.set()
            return
        job.generation, lane.strikes, lane.repairs = generation, 0, 0
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

    async def _keep(self, lane: Lane) -> None:
        """Watch over one lane until the batch ends or the lane is lost. Raises EngineError with the last one."""
        is_well = not lane.is_down or await self._restore(lane, await self._examine(lane, self._version))
        while is_well:
            timer = asyncio.get_running_loop().call_later(self._limits.probe_interval_s, lane.alarm.set)
            await lane.alarm.wait()
            timer.cancel()
            lane.alarm.clear()
            failed, lane.failed = lane.failed, []
            blame = await asyncio.wrap_future(in_thread(self._repairs.examine_router, lane.endpoint))
            if blame is not None:
                self._take_back(lane, failed)
                failed = []
                if not await self._await_router(lane, blame):
                    break
            ailing = await self._examine(lane, self._version)
            lane.strikes += bool(failed)
            if lane.strikes == STRIKES and not ailing:
                what = f"it failed {STRIKES} times in a row, at last: {failed[-1][1]}"
                ailing = {worker: Ailment(what) for worker in lane.workers}
            if ailing:
                self._take_back(lane, failed)
                is_well = await self._restore(lane, ailing)
            else:
                if lane.is_down:  # its router is back
                    await self._open(lane)
                self._count(lane, failed)
                lane.is_open = not lane.failed
                self._fill()
        lane.is_lost = True
        if all(other.is_lost for other in self._lanes):
            raise self._repairs.none_left()

    def _count(self, lane: Lane, failed: list[tuple[Job, str]]) -> None:
        """Queue again what failed at a lane that is well, as an attempt used up. Raises EngineError after the last."""
        for job, failure in reversed(failed):
            job.failures.append(failure)
            job.failed_at.append(lane)
            if len(job.failures) >= self._limits.attempts:
                raise EngineError(
                    f"{name_of(job.request)}: no usable answer in {len(job.failures)} attempts (--sglang-attempts): "
                    + "; ".join(dict.fromkeys(job.failures))
                )
            self._queue.appendleft(job)

    def _take_back(self, lane: Lane, failed: list[tuple[Job, str]]) -> None:
        """Queue again all that a lane was asked for; it is no fault of the requests."""
        lane.is_open, lane.is_down = False, True
        for task in lane.asked:
            task.cancel()
        jobs = [*lane.asked.values(), *(job for job, _ in failed), *(job for job, _ in lane.failed)]
        lane.asked.clear()
        lane.failed.clear()
        self._queue.extendleft(reversed(jobs))
        self._fill()

    async def _examine(self, lane: Lane, version: str | None) -> dict[Worker, Ailment]:
        """The servers of a lane that ail, and how. They are asked at once."""
        probes = [in_thread(self._repairs.examine, worker, version) for worker in lane.workers]
        found = await asyncio.gather(*map(asyncio.wrap_future, probes))
        return {worker: ailment for worker, ailment in zip(lane.workers, found, strict=True) if ailment is not None}

    async def _await_router(self, lane: Lane, why: str) -> bool:
        """Whether the router of a lane is back. Its servers are left as they are: it was not their fault."""
        lane.repairs += 1
        if lane.repairs > REPAIRS:
            for worker in lane.workers:
                self._repairs.give_up(worker, f"its router fails again after {REPAIRS} waits for it: {why}")
            return False
        try:
            await asyncio.wrap_future(in_thread(self._repairs.await_router, lane.endpoint, why))
        except ServersError:
            return False
        return True

    async def _restore(self, lane: Lane, ailing: dict[Worker, Ailment]) -> bool:
        """Whether a lane can go on, after its servers were brought back and given the weights."""
        if any(self._repairs.is_lost(worker) for worker in lane.workers):
            return False
        lane.repairs += 1
        failure = f"it fails again after {REPAIRS} repairs: {'; '.join(ill.what for ill in ailing.values())}"
        for _ in range(PUSHES if lane.repairs <= REPAIRS else 0):
            for worker in ailing:
                worker.version, worker.checked = None, False
            revivals = [
                ill.revival or self._repairs.revive(worker, ill.what)
                for worker, ill in ailing.items()
                if ill.needs_revival
            ]
            try:
                await asyncio.gather(*map(asyncio.wrap_future, revivals))
                await asyncio.wrap_future(self._push([w for w in lane.workers if w.version != self._version]))
            except ServersError:
                return False
            except SyncError as error:
                failure = str(error)
                ailing = await self._examine(lane, None)
                continue
            for worker, ill in ailing.items():
                if not ill.needs_revival:
                    warnings.warn(f"server {worker.name} was given the weights again: {ill.what}", stacklevel=1)
            lane.strikes = 0
            await self._open(lane)
            self._fill()
            return True
        for worker in ailing or lane.workers:
            self._repairs.give_up(worker, failure)
        return False

    async def _open(self, lane: Lane) -> None:
        if lane.http is not None:
            await lane.http.aclose()
        lane.http = lane.endpoint.client.for_event_loop(self._limits.concurrency * len(lane.workers))
        lane.is_open, lane.is_down = True, False

    # Ending

    async def _end_tasks(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for lane in self._lanes:
            if lane.http is not None:
                await lane.http.aclose()

    async def _abort_rest(self) -> None:
        """Have the servers stop what nobody waits for any more, as far as they answer."""

        async def abort(worker: Worker) -> None:
            async with worker.client.for_event_loop(1) as http:
                await worker.client.ask(http, "/abort_request", {"abort_all": True}, timeout_s=ABORT_TIMEOUT_S)

        workers = [worker for lane in self._lanes if not lane.is_lost for worker in lane.workers]
        await asyncio.gather(*map(abort, workers), return_exceptions=True)
