"""Who is asked for what next: the wanted responses of a batch, and the endpoints that they are spread over."""

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
    """What a batch may do: `concurrency` requests at each server, `attempts` for each response, seconds."""

    concurrency: int
    attempts: int
    request_timeout_s: float
    health_timeout_s: float

    @property
    def probe_interval_s(self) -> float:
        return min(self.health_timeout_s / 4, 15.0)


@dataclass(eq=False)
class Job:
    """One response that is wanted, and what became of it so far: `failures` are the attempts it has used up."""

    request: GenerationRequest
    seed: int
    generation: Generation | None = None
    failures: list[str] = field(default_factory=list)
    failed_at: list[Lane] = field(default_factory=list)


class Lane:
    """An endpoint during one batch.

    Attributes:
        is_open: it can be asked. Closed for a moment after a failure; `is_down` until it was repaired.
        asked: what it works at.
        failed: requests that failed there, and how; they wait for the verdict on the lane.
        alarm: set when that verdict is due.
        strikes, repairs: times in a row that something failed, or that it was repaired, with no response between them.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.http: httpx2.AsyncClient | None = None
        self.is_open, self.is_down, self.is_lost = False, True, False
        self.asked: dict[asyncio.Task[None], Job] = {}
        self.failed: list[tuple[Job, str]] = []
        self.alarm = asyncio.Event()
        self.strikes, self.repairs = 0, 0

    @property
    def workers(self) -> list[Worker]:
        return self.endpoint.workers

    def load(self) -> float:
        """Requests for each of its servers."""
        return len(self.asked) / len(self.workers)


def next_share(
    queue: deque[Job], lanes: list[Lane], num_unanswered: int, concurrency: int
) -> tuple[Lane, list[Job]] | None:
    """Take requests out of the queue for the least loaded of the open lanes. None: nothing can be asked now.

    They are of one prompt, which a server then computes once. What failed at a lane is for another, if one is up.
    """
    is_open, is_up = [lane for lane in lanes if lane.is_open], [lane for lane in lanes if not lane.is_down]
    # More than its share of what is left would leave nothing for the others, in a batch that is small.
    share = math.ceil(num_unanswered / max(sum(len(lane.workers) for lane in is_open), 1))
    for lane in sorted(is_open, key=Lane.load):
        room = min(concurrency, share) * len(lane.workers) - len(lane.asked)
        taken: list[Job] = []
        for job in queue:
            if lane in job.failed_at and not all(one in job.failed_at for one in is_up):
                continue
            if len(taken) >= room or (taken and job.request.prompt.tokens != taken[0].request.prompt.tokens):
                break
            taken.append(job)
        for job in taken:
            queue.remove(job)
        if taken:
            return lane, taken
    return None
