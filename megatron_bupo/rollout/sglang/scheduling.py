"""Which backend is asked for what next: the requests of a batch, and the endpoints that they are spread over."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from megatron_bupo.rollout.engine import Generation, GenerationRequest
from megatron_bupo.rollout.sglang.worker import Endpoint, Worker

if TYPE_CHECKING:
    import httpx2


@dataclass(frozen=True)
class Limits:
    """What a batch may do.

    Args:
        concurrency: requests that each server has at once.
        attempts: how often one response is asked for. A server that dies or hangs uses up no attempt of its requests.
        request_timeout_s: seconds that one response may take.
        health_timeout_s: seconds without an answer until a server counts as hung.
    """

    concurrency: int
    attempts: int
    request_timeout_s: float
    health_timeout_s: float

    @property
    def probe_interval_s(self) -> float:
        return min(self.health_timeout_s / 4, 15.0)


@dataclass(eq=False)
class Job:
    """One requested response, with the answer once there is one; `failures` are the attempts that it has used up."""

    request: GenerationRequest
    seed: int
    generation: Generation | None = None
    failures: list[str] = field(default_factory=list)
    failed_at: list[Backend] = field(default_factory=list)


class Backend:
    """An endpoint during one batch.

    Attributes:
        is_open: it takes requests. Not after a failure, until it was diagnosed; `is_down` until it has recovered.
        asked: the requests that it works on.
        failed: requests that failed there, with the reason, until the backend is diagnosed.
        alarm: set when it is to be diagnosed.
        consecutive_failures, consecutive_recoveries: in a row, with no response between them.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.http: httpx2.AsyncClient | None = None
        self.is_open, self.is_down, self.is_lost = False, True, False
        self.asked: dict[asyncio.Task[None], Job] = {}
        self.failed: list[tuple[Job, str]] = []
        self.alarm = asyncio.Event()
        self.consecutive_failures, self.consecutive_recoveries = 0, 0

    @property
    def workers(self) -> list[Worker]:
        return self.endpoint.workers

    def load(self) -> float:
        """Requests for each of its servers."""
        return len(self.asked) / len(self.workers)


def next_share(
    queue: deque[Job], backends: list[Backend], num_unanswered: int, concurrency: int
) -> tuple[Backend, list[Job]] | None:
    """Take requests out of the queue for the least loaded open backend. None: no request can be sent now.

    They have one prompt, which the server then computes once. What failed at a backend goes to another, if one is up.
    """
    is_open = [backend for backend in backends if backend.is_open]
    is_up = [backend for backend in backends if not backend.is_down]
    # In a small batch, more than its share of what is left would leave nothing for the others.
    share = math.ceil(num_unanswered / max(sum(len(backend.workers) for backend in is_open), 1))
    for backend in sorted(is_open, key=Backend.load):
        room = min(concurrency, share) * len(backend.workers) - len(backend.asked)
        taken: list[Job] = []
        for job in queue:
            if backend in job.failed_at and not all(one in job.failed_at for one in is_up):
                continue
            if len(taken) >= room or (taken and job.request.prompt.tokens != taken[0].request.prompt.tokens):
                break
            taken.append(job)
        for job in taken:
            queue.remove(job)
        if taken:
            return backend, taken
    return None
