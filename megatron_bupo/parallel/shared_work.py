"""Work whose result or error all processes get: of the first process alone, or of every one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_bupo.errors import UsageError
from megatron_bupo.parallel.setup import Processes

_Answer = TypeVar("_Answer")


class RankFailed(RuntimeError):
    """The error of one rank, raised on the other ranks with its message."""


def on_first_rank(state: Processes, work: Callable[[], _Answer]) -> _Answer:
    """What `work` returns on the first rank, on every rank. Collective; an error of it is raised everywhere.

    A UsageError stays one; any other is itself on the first rank and a RankFailed elsewhere.
    """
    answer, error = _tried(work) if state.rank == 0 else (None, None)
    sent: list[Any] = [answer, _for_others(error)]
    dist.broadcast_object_list(sent, src=0, group=state.host_group)
    if error or sent[1]:
        raise error or sent[1]
    result: _Answer = sent[0]
    return result


def on_every_rank(work: Callable[[], _Answer], group: dist.ProcessGroup | None = None) -> list[_Answer]:
    """What `work` returns on each rank of `group` (None: all), on every rank. Collective, so a barrier too.

    Errors are raised everywhere, as by `on_first_rank`; of several ranks' that of the lowest rank.
    """
    answer, error = _tried(work)
    sent: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(sent, (answer, _for_others(error)), group=group)
    for rank, (_, failed) in enumerate(sent):
        if failed is not None:
            raise error if error is not None and rank == dist.get_rank(group) else failed
    return [result for result, _ in sent]


def _tried(work: Callable[[], _Answer]) -> tuple[_Answer | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:  # sent to every rank: without an answer they would wait for ever
        return None, error


def _for_others(error: Exception | None) -> Exception | None:
    """The error as the other ranks raise it."""
    if error is None:
        return None
    if isinstance(error, UsageError):
        return UsageError(str(error))
    return RankFailed(f"{type(error).__name__}: {error}")
