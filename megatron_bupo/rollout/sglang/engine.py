"""The engine behind SGLang servers: it asks them for the responses, gives them the weights, and stands their faults.

It lives in one process. An event loop in a thread of its own does the asking; what concerns the trainer (weights for a
server that came back, the progress) is done by the thread that called `generate`, while it waits.

Left out, with room for it: more requests than are needed (over-sampling), going on with what was begun under older
weights (partial rollouts), one step ahead, and truncated importance sampling. What a response needs for them is known:
each one carries its log-probs and the version of its weights.
"""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable
from concurrent.futures import Future, wait
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
from megatron_bupo.rollout.sglang.lanes import Limits
from megatron_bupo.rollout.sglang.repair import EngineError, Repairs, in_thread
from megatron_bupo.rollout.sglang.servers import Servers, Worker
from megatron_bupo.rollout.weight_sync.sync import SyncError, WeightSync

UPDATES = 3
"""How often the weights are sent to all servers before the run ends."""
STOP_S = 15.0


class SGLangEngine(RolloutEngine):
    """Generates with the full policy on SGLang servers. It owns `servers` and `sync`, and closes them.

    Args:
        concurrency: requests that each server has at once.
        request_timeout_s: seconds that one response may take.
        health_timeout_s: seconds without an answer until a server counts as hung.
        attempts: how often one response is asked for. What a server takes down with it costs none.
    """

    def __init__(
        self,
        servers: Servers,
        sync: WeightSync,
        *,
        concurrency: int,
        request_timeout_s: float,
        health_timeout_s: float,
        attempts: int,
    ) -> None:
        self._servers, self._sync = servers, sync
        self._limits = Limits(concurrency, attempts, request_timeout_s, health_timeout_s)
        self._repairs = Repairs(servers, health_timeout_s)
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
        errands: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        batch = Batch(
            self._servers.endpoints,
            requests,
            params,
            self._weights[1],
            self._limits,
            self._repairs,
            push=lambda workers: self._order_push(workers, errands),
            report=lambda number: errands.put(lambda: progress(number) if progress is not None else None),
        )
        outcome = in_thread(lambda: asyncio.run(batch.run()))
        outcome.add_done_callback(lambda _: errands.put(None))
        try:
            while (errand := errands.get()) is not None:
                errand()
        except BaseException:
            batch.stop()
            wait([outcome], timeout=STOP_S)
            raise
        return outcome.result()

    def update_weights(self, model: TrainedModel, version: str) -> None:
        """See `RolloutEngine.update_weights`. What failed is brought back first; who cannot come back is left out.

        Raises:
            EngineError: no server is left, or the weights did not arrive in several attempts.
        """
        self._weights = model, version
        failures: list[str] = []
        while len(failures) < UPDATES:
            try:
                self._sync.push(self._repairs.ready(thoroughly=bool(failures)), model, version)
                return
            except SyncError as error:
                failures.append(str(error))
                warnings.warn(f"weights {version} are sent again: {error}", stacklevel=1)
        raise EngineError(f"the servers did not take weights {version} in {UPDATES} attempts: " + "; ".join(failures))

    def close(self) -> None:
        try:
            self._sync.close()
        finally:
            self._servers.close()

    def _order_push(self, workers: list[Worker], errands: SimpleQueue[Callable[[], object] | None]) -> Future[None]:
        """Have the thread that called `generate` give the current weights to some servers: all ranks take part."""
        pushed: Future[None] = Future()

        def push() -> None:
            assert self._weights is not None
            if not pushed.set_running_or_notify_cancel():
                return  # the batch ended without them
            try:
                self._sync.push(workers, *self._weights)
            except SyncError as error:
                pushed.set_exception(error)
            else:
                pushed.set_result(None)

        errands.put(push)
        return pushed
