"""Fake SGLang servers behind the interfaces of Servers and WeightSync, for the tests of the engine."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, cast

from megatron_bupo.rollout.sglang.client import ServerError, SGLangClient
from megatron_bupo.rollout.sglang.engine import SGLangEngine
from megatron_bupo.rollout.sglang.servers import Endpoint, ServersError, Worker
from megatron_bupo.rollout.weight_sync.sync import SyncError
from tests.unit.fake_sglang import FakeServer

MODEL = cast(Any, object())  # the stand-in only hands it on


class StandIns:
    """Fake servers behind the interfaces of Servers and WeightSync.

    Attributes:
        unrevivable: workers that are gone for good.
        thaw: a revival is a SIGCONT by somebody, not a restart.
        broken_pushes: so many of the next pushes fail in the middle.
        events: ("revive" or "push", indices of the workers), in the order of time.
    """

    def __init__(self, count: int) -> None:
        self.fakes = [FakeServer() for _ in range(count)]
        self.workers = [Worker(SGLangClient(fake.url), cast(Any, None), None, i) for i, fake in enumerate(self.fakes)]
        self.endpoints = [Endpoint([worker]) for worker in self.workers]
        self.unrevivable: set[Worker] = set()
        self.thaw = False
        self.broken_pushes = 0
        self.may_revive = threading.Event()
        self.may_revive.set()
        self.events: list[tuple[str, list[int]]] = []
        self.engines: list[SGLangEngine] = []

    def engine(self, *, concurrency: int = 4, attempts: int = 3, health_timeout_s: float = 2.0) -> SGLangEngine:
        engine = SGLangEngine(
            cast(Any, self),
            cast(Any, self),
            concurrency=concurrency,
            request_timeout_s=30.0,
            health_timeout_s=health_timeout_s,
            attempts=attempts,
        )
        self.engines.append(engine)
        return engine

    def revive(self, worker: Worker) -> None:
        self.events.append(("revive", [worker.index]))
        self.may_revive.wait()
        if worker in self.unrevivable:
            raise ServersError(f"{worker.name} is gone for good")
        if self.thaw:
            self.fakes[worker.index].is_frozen = False
        else:
            self.fakes[worker.index].restart()
        worker.client = SGLangClient(self.fakes[worker.index].url)
        worker.version, worker.checked = None, False

    def push(self, workers: Sequence[Worker], model: Any, version: str) -> None:
        assert threading.current_thread() is threading.main_thread(), "the trainer's collectives are its own thread's"
        assert model is MODEL
        self.events.append(("push", [worker.index for worker in workers]))
        for worker in workers:
            worker.version = None
        for worker in workers:
            try:
                worker.client.get("/weights", timeout_s=0.5)
            except ServerError as error:
                raise SyncError(worker, str(error)) from error
            if self.broken_pushes:
                self.broken_pushes -= 1
                raise SyncError(worker, f"{worker.name}: bucket 2 did not arrive")
            self.fakes[worker.index].version = version
        for worker in workers:
            worker.version, worker.checked = version, True

    def close(self) -> None:
        for fake in self.fakes:
            fake.kill()
