"""The first rank leads and the others follow: for what one process does, and all must hear the end of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from megatron_bupo.errors import UsageError
from megatron_bupo.parallel.setup import ParallelState
from megatron_bupo.rollout.engine import TrainedModel

_Answer = TypeVar("_Answer")


class FirstRankFailed(RuntimeError):
    """What the first rank failed with, told to the others: its message."""


def on_first_rank(state: ParallelState, work: Callable[[], _Answer]) -> _Answer:
    """What `work` returns on the first rank, on every rank. Collective; an error of it is raised everywhere.

    A UsageError stays one; any other is itself on the first rank and a FirstRankFailed elsewhere.
    """
    outcome: list[Any] = [None, None]
    error: Exception | None = None
    if state.rank == 0:
        try:
            outcome[0] = work()
        except Exception as raised:  # told to every rank: they would wait for ever
            error = raised
            message = f"{type(raised).__name__}: {raised}"
            outcome[1] = UsageError(str(raised)) if isinstance(raised, UsageError) else FirstRankFailed(message)
    dist.broadcast_object_list(outcome, src=0, group=state.host_group)
    if error is not None:
        raise error
    if outcome[1] is not None:
        raise outcome[1]
    answer: _Answer = outcome[0]
    return answer


class LedModel:
    """A TrainedModel for work that runs on the first rank alone.

    Each call is announced to the other ranks, which wait inside `run` and take part. One thread calls at a time; it
    may be another than the one of `run`, which must not return before.
    """

    def __init__(self, model: TrainedModel, state: ParallelState) -> None:
        self._model, self._state = model, state
        self._stream: Iterator[tuple[str, Tensor]] | None = None

    def hf_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See TrainedModel. Who stops in the middle need not care: the rest is drawn before the next announcement."""
        self._announce("hf_tensors")
        self._stream = iter(self._model.hf_tensors())
        return self._stream

    def logprobs(self, tokens: list[int]) -> list[float]:
        """See TrainedModel."""
        self._announce("logprobs", tokens)
        return self._model.logprobs(tokens)

    def run(self, work: Callable[[], _Answer]) -> _Answer:
        """Like `on_first_rank`; meanwhile the other ranks take part in what the work asks of the model. Collective."""

        def led() -> _Answer:
            try:
                return work()
            finally:
                self._announce("done")

        if self._state.rank > 0:
            self._follow()
        return on_first_rank(self._state, led)

    def _announce(self, call: str, argument: Any = None) -> None:
        # The other ranks are in the middle of gathering a stream that was left early.
        for _ in self._stream or ():
            continue
        self._stream = None
        dist.broadcast_object_list([call, argument], src=0, group=self._state.host_group)

    def _follow(self) -> None:
        while True:
            message: list[Any] = [None, None]
            dist.broadcast_object_list(message, src=0, group=self._state.host_group)
            call, argument = message
            if call == "done":
                return
            if call == "logprobs":
                self._model.logprobs(argument)
            else:
                for _ in self._model.hf_tensors():
                    continue
