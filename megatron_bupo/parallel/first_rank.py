"""Work that the first process does alone, and whose result or error all processes get."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_bupo.errors import UsageError
from megatron_bupo.parallel.setup import ParallelState

_Answer = TypeVar("_Answer")


class FirstRankFailed(RuntimeError):
    """The error of the first rank, raised on the other ranks with its message."""


def on_first_rank(state: ParallelState, work: Callable[[], _Answer]) -> _Answer:
    """What `work` returns on the first rank, on every rank. Collective; an error of it is raised everywhere.

    A UsageError stays one; any other is itself on the first rank and a FirstRankFailed elsewhere.
    """
    outcome: list[Any] = [None, None]
    error: Exception | None = None
    if state.rank == 0:
        try:
            outcome[0] = work()
        except Exception as raised:  # sent to every rank: without an answer they would wait for ever
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
