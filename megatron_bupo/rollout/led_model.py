"""The model in training for work that runs on the first rank alone: the first rank asks, the others take part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from megatron_bupo.parallel.setup import Processes
from megatron_bupo.parallel.shared_work import on_first_rank
from megatron_bupo.rollout.engine import TrainedModel

_Answer = TypeVar("_Answer")


class LedModel:
    """A TrainedModel for work that runs on the first rank alone.

    Each call is announced to the other ranks, which wait inside `run` and take part. One thread calls at a time, and
    before `run` returns; it may be another thread than that of `run`.
    """

    def __init__(self, model: TrainedModel, state: Processes) -> None:
        self._model, self._state = model, state
        self._stream: Iterator[tuple[str, Tensor]] | None = None

    def hf_tensors(self, since: str | None = None) -> Iterator[tuple[str, Tensor]]:
        """See TrainedModel. A caller may stop in the middle: the rest is drawn before the next announcement."""
        self._announce("hf_tensors", since)
        self._stream = iter(self._model.hf_tensors(since))
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
                for _ in self._model.hf_tensors(argument):
                    continue
