"""Rewards in worker processes that can be killed: a deadline for every response, a count of those that missed it.

The workers come from a fork server, never from a fork of the trainer (whose threads would not survive it). They import
neither torch nor this project's model code, and live as long as the runner or its process, whichever ends first.
"""

from __future__ import annotations

import functools
import math
import multiprocessing
import numbers
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import RLock as LockOfProcesses
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pebble import ProcessExpired, ProcessPool

from megatron_bupo.errors import UsageError
from megatron_bupo.user_code import UserFunction, one_line

if TYPE_CHECKING:  # samples imports torch, which the workers (they import this file) must not pay for
    from megatron_bupo.samples import Rollout

MATH = "math"
START_UP_S = 120.0
"""Seconds a worker may take to load the reward function."""


@dataclass(frozen=True)
class RewardResult:
    """One reward per response, in order, and whether it is 0.0 because no verdict came within the deadline."""

    rewards: list[float]
    timed_out: list[bool]

    @property
    def timeouts(self) -> int:
        """How many responses had no verdict in time."""
        return sum(self.timed_out)


class _LockKeepingContext(ForkServerContext):
    """Fork-server context whose locks live as long as it does.

    pebble drops its locks before it ends its workers; one that is just starting would then miss them and print a
    traceback at the end of a good run.
    """

    def __init__(self) -> None:
        super().__init__()
        self._locks: list[LockOfProcesses] = []

    def RLock(self) -> LockOfProcesses:
        self._locks.append(super().RLock())
        return self._locks[-1]


class RewardRunner:
    """Scores responses in `num_workers` processes, each response within `timeout_s` seconds of work.

    `spec` is ``math`` (megatron_bupo.rewards.math) or ``FILE.py:function``. The user's function is called as
    ``function(record)`` with one line of a rollout file as a dict: `group`, `prompt_tokens`, `response_tokens` and,
    where known, `prompt`, `response`, `answer`, `data_source`, ...; it returns a finite number. (One dict, not several
    arguments: the format is documented already, may grow, and needs nothing of this project to be imported.) The folder
    of the file is importable for it. Loading the file has a deadline of its own, START_UP_S.

    A response that misses the deadline gets 0.0 and counts in `timeouts`; its worker is killed and replaced. So does
    one whose math worker dies, from the memory that sympy took for instance.

    Raises:
        UsageError: a bad spec, here; from `score`, a function that cannot be loaded, raises, ends its
            process or returns no finite number.
    """

    def __init__(self, spec: str = "math", *, timeout_s: float = 10.0, num_workers: int = 1) -> None:
        assert timeout_s > 0 and num_workers >= 1, (timeout_s, num_workers)
        self._function = None if spec == MATH else UserFunction.parse("--reward", spec, "record", (MATH,))
        self._spec = spec
        self._timeout_s = timeout_s
        context = _LockKeepingContext()
        if self._function is None:
            # Loaded once in the fork server, so a worker that replaces a killed one starts at once.
            context.set_forkserver_preload(["math_verify"])
        self._pool = ProcessPool(num_workers, initializer=_start_worker, initargs=(self._function,), context=context)
        self._load_error = self._pool.schedule(_load_error, args=(self._function,))

    def score(self, rollouts: list[Rollout], progress: Callable[[int], None] | None = None) -> RewardResult:
        """Rewards of `rollouts`, in their order; `progress` is called with the number that is done."""
        records = [self._record(rollout, number) for number, rollout in enumerate(rollouts, start=1)]
        self.wait_until_loaded()
        futures = [self._pool.schedule(_call, (self._function, record), timeout=self._timeout_s) for record in records]
        rewards: list[float | None] = []
        try:
            for number, future in enumerate(futures, start=1):
                try:
                    reward = future.result()
                except FutureTimeoutError:
                    reward = None
                except ProcessExpired as error:
                    if self._function is not None:
                        raise self._failed(number, f"it ended its process (exit code {error.exitcode})") from error
                    reward = None
                except BrokenProcessPool as error:
                    raise self._failed(number, "the worker processes died (out of memory?)") from error
                if isinstance(reward, str):
                    raise self._failed(number, reward)
                rewards.append(reward)
                if progress is not None:
                    progress(number)
        finally:
            for future in futures:
                future.cancel()
        return RewardResult([reward or 0.0 for reward in rewards], [reward is None for reward in rewards])

    def close(self) -> None:
        """End the workers, at once and whatever they do. Closing twice is harmless."""
        self._pool.stop()
        self._pool.join()

    def __enter__(self) -> RewardRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _record(self, rollout: Rollout, number: int) -> dict[str, Any]:
        if self._function is not None:
            return {key: value for key, value in vars(rollout).items() if value is not None}
        for key in ("response", "answer"):
            if getattr(rollout, key) is None:
                raise UsageError(f"--reward math: record {number} has no '{key}'; it needs 'response' and 'answer'")
        return {"response": rollout.response, "answer": rollout.answer}

    def wait_until_loaded(self) -> None:
        """Raise UsageError if the function cannot be loaded; `score` does so too, but only then."""
        try:
            error = self._load_error.result(timeout=START_UP_S)
        except FutureTimeoutError:
            error = f"it was not loaded within {START_UP_S:.0f} s"
        except (BrokenProcessPool, ProcessExpired):
            error = "its process died while loading it"
        if error is not None:
            raise UsageError(f"--reward '{self._spec}': {error}")

    def _failed(self, number: int, reason: str) -> UsageError:
        return UsageError(f"--reward '{self._spec}' failed on record {number}: {reason}")


def _start_worker(function: UserFunction | None) -> None:
    """Runs first in every worker, outside any deadline."""
    trainer = multiprocessing.parent_process()
    assert trainer is not None, "a worker is started by multiprocessing"
    threading.Thread(target=_end_with, args=(trainer,), daemon=True).start()
    # pebble's handler runs between two bytecodes: a worker deep in one big multiplication would live 3 s longer.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _load(function)


def _end_with(trainer: BaseProcess) -> None:
    """A trainer that was killed cannot end its workers, and one that hangs in a response would stay for ever."""
    trainer.join()
    os._exit(1)


@functools.cache
def _load(function: UserFunction | None) -> Callable[[dict[str, Any]], Any] | str:
    """The function itself, or one line that says why it could not be loaded."""
    if function is None:
        from megatron_bupo.rewards.math import score  # 0.4 s of sympy that only the workers need

        return lambda record: score(record["response"], record["answer"])
    try:
        return function.load()
    except UsageError as error:
        return str(error)


def _load_error(function: UserFunction | None) -> str | None:
    loaded = _load(function)
    return loaded if isinstance(loaded, str) else None


def _call(function: UserFunction | None, record: dict[str, Any]) -> float | str:
    """The reward of one record, or one line on what went wrong: text, so that nothing of the user's is unpickled."""
    loaded = _load(function)
    if isinstance(loaded, str):
        return loaded
    try:
        reward = loaded(record)
    except (Exception, SystemExit) as error:
        return f"it raised {one_line(error)}"
    if not isinstance(reward, numbers.Real) or not math.isfinite(reward):
        return f"it returned {one_line(repr(reward))}; a reward must be a finite number"
    return float(reward)
