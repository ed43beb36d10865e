"""Fake SGLang servers behind the interfaces of Servers and WeightSync, for the tests of the engine."""

from __future__ import annotations

import contextlib
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, cast

from megatron_bupo.rollout.engine import Generation, GenerationRequest, SamplingParams, make_requests
from megatron_bupo.rollout.sglang.client import ServerError, SGLangClient
from megatron_bupo.rollout.sglang.engine import SGLangEngine
from megatron_bupo.rollout.sglang.requests import sampling_seeds
from megatron_bupo.rollout.sglang.scheduling import Limits
from megatron_bupo.rollout.sglang.servers import ServersError
from megatron_bupo.rollout.sglang.weight_sync.calls import SyncError
from megatron_bupo.rollout.sglang.worker import Endpoint, Worker
from megatron_bupo.samples import Prompt
from tests.unit.fake_sglang import HALF, FakeServer

MODEL = cast(Any, object())  # the stand-in only hands it on
OWNED = cast(Any, SimpleNamespace(exit_status=lambda: None))  # the process of a server that the run launched
HANG_S = 900  # no test takes that long, whatever else the machine does: it hangs
PARAMS = SamplingParams(0.7, 0.9, 5, (), seed=3)


class StandIns:
    """Fake servers behind the interfaces of Servers and WeightSync.

    Attributes:
        unrecoverable: workers that cannot recover.
        thaw: a recovery continues the server, as SIGCONT does, instead of restarting it.
        router_is_lost: the router cannot recover either.
        broken_pushes: so many of the next pushes fail in the middle.
        refuses_pushes: workers at which every push fails.
        events: ("recover", "push" or "router", indices of the workers), in the order of time.
        since: of each push, the version since which changed tensors are sent.
    """

    def __init__(self, count: int) -> None:
        self.fakes = [FakeServer() for _ in range(count)]
        self.workers = [Worker(SGLangClient(fake.url), cast(Any, None), None, i) for i, fake in enumerate(self.fakes)]
        self.endpoints = [Endpoint([worker]) for worker in self.workers]
        self.unrecoverable: set[Worker] = set()
        self.thaw = False
        self.router_is_lost = False
        self.broken_pushes = 0
        self.refuses_pushes: set[Worker] = set()
        self.may_recover = threading.Event()
        self.may_recover.set()
        self.events: list[tuple[str, list[int]]] = []
        self.since: list[str | None] = []
        self.engines: list[SGLangEngine] = []

    def engine(
        self,
        *,
        concurrency: int = 4,
        attempts: int = 3,
        health_timeout_s: float = 30.0,
        request_timeout_s: float = HANG_S,
    ) -> SGLangEngine:
        limits = Limits(concurrency, attempts, request_timeout_s, health_timeout_s)
        engine = SGLangEngine(cast(Any, self), cast(Any, self), limits)
        self.engines.append(engine)
        return engine

    def recover(self, worker: Worker) -> None:
        self.events.append(("recover", [worker.index]))
        self.may_recover.wait()
        if worker in self.unrecoverable:
            raise ServersError(f"{worker.name} is gone for good")
        if self.thaw:
            self.fakes[worker.index].is_frozen = False
        else:
            self.fakes[worker.index].restart()
        worker.client = SGLangClient(self.fakes[worker.index].url)
        worker.version, worker.checked = None, False

    def await_router(self, endpoint: Endpoint) -> None:
        self.events.append(("router", []))
        assert endpoint.router is not None
        if self.router_is_lost:
            raise ServersError("the router is gone for good")
        (fake,) = (fake for fake in self.fakes if fake.url == endpoint.router.url)
        weights = fake.version
        fake.restart()
        fake.version, endpoint.router = weights, SGLangClient(fake.url)

    def push(self, workers: Sequence[Worker], model: Any, version: str, since: str | None) -> None:
        assert threading.current_thread() is threading.main_thread(), "the trainer's collectives are its own thread's"
        assert model is MODEL
        self.events.append(("push", [worker.index for worker in workers]))
        self.since.append(since)
        held = {self.fakes[worker.index].version.partition("-")[2] for worker in workers}
        assert since is None or held == {since}, "a server that lacks them would keep old weights"
        for worker in workers:
            worker.version = None
        for worker in workers:
            try:
                worker.client.get("/weights", timeout_s=10.0)
            except ServerError as error:
                raise SyncError(worker, str(error)) from error
            if self.broken_pushes or worker in self.refuses_pushes:
                self.broken_pushes -= worker not in self.refuses_pushes
                raise SyncError(worker, f"{worker.name}: bucket 2 did not arrive")
            self.fakes[worker.index].version = version
        for worker in workers:
            worker.version, worker.checked = version, True

    def close(self) -> None:
        for fake in self.fakes:
            fake.kill()


@contextlib.contextmanager
def made_stand_ins() -> Iterator[Callable[[int], StandIns]]:
    """Makes so many fake servers; they end with the test, which fails if it hangs."""
    made: list[StandIns] = []

    def build(count: int) -> StandIns:
        made.append(StandIns(count))
        return made[-1]

    def give_up(*_: Any) -> None:
        raise TimeoutError("the batch does not end")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(HANG_S)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield build
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        for one in made:
            one.may_recover.set()
            one.close()


def some_requests(prompts: int, samples: int = 4) -> list[GenerationRequest]:
    return make_requests([Prompt(i, [i + 1, 40, 41], "") for i in range(prompts)], step=2, num_samples=samples)


def check_answers(requests: list[GenerationRequest], answers: list[Generation], version: str = "1") -> None:
    """Each answer is that of its request: its seed and its prompt are in the tokens."""
    seeds = sampling_seeds(PARAMS.seed, requests)
    for request, seed, answer in zip(requests, seeds, answers, strict=True):
        assert answer.tokens[:3] == [seed % HALF, seed // HALF, HALF + sum(request.prompt.tokens)]
        assert (answer.finish_reason, answer.weight_version, len(answer.logprobs)) == ("length", version, 5)
