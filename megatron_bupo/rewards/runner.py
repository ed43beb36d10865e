"""Rewards in worker processes that can be killed: a deadline for every response, a count of those that missed it.

The workers come from a fork server, never from a fork of the trainer (whose threads would not survive it). They import
neither torch nor this project's model code, and live as long as the runner or its process, whichever ends first.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import multiprocessing
import numbers
import os
import signal
import symtable
import sys
import threading
from collections.abc import Callable
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import RLock as LockOfProcesses
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from pebble import ProcessExpired, ProcessPool

from megatron_bupo.errors import UsageError
from megatron_bupo.rewards.gold import gold_text

if TYPE_CHECKING:  # samples imports torch, which the workers (they import this file) must not pay for
    from megatron_bupo.samples import Rollout

START_UP_S = 120.0
"""Seconds a worker may take to load the reward function."""


class RewardFunction(NamedTuple):
    """Where a reward comes from: the built-in `math` (path None), or a function in a file of the user's."""

    path: str | None
    name: str

    @classmethod
    def parse(cls, spec: str) -> RewardFunction:
        """Read ``math`` or ``FILE.py:function``. The file is compiled to look for the name, but not run.

        Raises:
            UsageError: another spelling, a missing file, one that is no Python, or one without that function.
        """
        if spec == "math":
            return cls(None, "math")
        file, _, name = spec.rpartition(":")
        if not file.endswith(".py") or not name.isidentifier():
            raise UsageError(f"--reward '{spec}': give 'math' or FILE.py:function, such as my_reward.py:score")
        try:
            source = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--reward '{spec}': cannot read the file '{file}' ({_one_line(error)})") from error
        try:
            module = symtable.symtable(source, file, "exec")
        except (SyntaxError, ValueError) as error:
            raise UsageError(f"--reward '{spec}': '{file}' is not valid Python ({_one_line(error)})") from error
        symbol = module.lookup(name) if name in module.get_identifiers() else None
        if symbol is None or not (symbol.is_assigned() or symbol.is_imported()):
            raise UsageError(f"--reward '{spec}': '{file}' defines no '{name}'; write `def {name}(record): ...` there")
        return cls(str(Path(file).resolve()), name)

    def __str__(self) -> str:
        return self.name if self.path is None else f"{self.path}:{self.name}"


@dataclass(frozen=True)
class RewardResult:
    """One reward per response, in order, and how many got 0.0 because no verdict came within the deadline."""

    rewards: list[float]
    timeouts: int


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
        UsageError: a bad spec or bad numbers, here; from `score`, a function that cannot be loaded, raises, ends its
            process or returns no finite number.
    """

    def __init__(self, spec: str = "math", *, timeout_s: float = 10.0, num_workers: int = 1) -> None:
        self._function = RewardFunction.parse(spec)
        if not (timeout_s > 0 and math.isfinite(timeout_s)):
            raise UsageError(f"reward timeout {timeout_s}: give a finite number of seconds above 0")
        if num_workers < 1:
            raise UsageError(f"reward workers {num_workers}: give 1 or more")
        self._spec = spec
        self._timeout_s = timeout_s
        context = _LockKeepingContext()
        if self._function.path is None:
            # Loaded once in the fork server, so a worker that replaces a killed one starts at once.
            context.set_forkserver_preload(["math_verify"])
        self._pool = ProcessPool(num_workers, initializer=_start_worker, initargs=(self._function,), context=context)
        self._load_error = self._pool.schedule(_load_error, args=(self._function,))

    def score(self, rollouts: list[Rollout], progress: Callable[[int], None] | None = None) -> RewardResult:
        """Rewards of `rollouts`, in their order; `progress` is called with the number that is done."""
        records = [self._record(rollout, number) for number, rollout in enumerate(rollouts, start=1)]
        self.wait_until_loaded()
        futures = [self._pool.schedule(_call, (self._function, record), timeout=self._timeout_s) for record in records]
        rewards: list[float] = []
        timeouts = 0
        try:
            for number, future in enumerate(futures, start=1):
                try:
                    reward = future.result()
                except FutureTimeoutError:
                    reward = None
                except ProcessExpired as error:
                    if self._function.path is not None:
                        raise self._failed(number, f"it ended its process (exit code {error.exitcode})") from error
                    reward = None
                except BrokenProcessPool as error:
                    raise self._failed(number, "the worker processes died (out of memory?)") from error
                if isinstance(reward, str):
                    raise self._failed(number, reward)
                timeouts += reward is None
                rewards.append(0.0 if reward is None else reward)
                if progress is not None:
                    progress(number)
        finally:
            for future in futures:
                future.cancel()
        return RewardResult(rewards, timeouts)

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
        if self._function.path is not None:
            return {key: value for key, value in vars(rollout).items() if value is not None}
        for key in ("response", "answer"):
            if getattr(rollout, key) is None:
                raise UsageError(f"--reward math: record {number} has no '{key}'; it needs 'response' and 'answer'")
        assert rollout.answer is not None
        return {"response": rollout.response, "answer": gold_text(rollout.answer)}

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


def _start_worker(function: RewardFunction) -> None:
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
def _load(function: RewardFunction) -> Callable[[dict[str, Any]], Any] | str:
    """The function itself, or one line that says why it could not be loaded."""
    if function.path is None:
        from megatron_bupo.rewards.math import score  # 0.4 s of sympy that only the workers need

        return lambda record: score(record["response"], record["answer"])
    sys.path.insert(0, str(Path(function.path).parent))
    module_spec = importlib.util.spec_from_file_location("megatron_bupo_user_reward", function.path)
    assert module_spec is not None and module_spec.loader is not None, function.path
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        return f"running the file failed ({_one_line(error)})"
    loaded: Any = getattr(module, function.name, None)
    return loaded if callable(loaded) else f"'{function.name}' is not a function"


def _load_error(function: RewardFunction) -> str | None:
    loaded = _load(function)
    return loaded if isinstance(loaded, str) else None


def _call(function: RewardFunction, record: dict[str, Any]) -> float | str:
    """The reward of one record, or one line on what went wrong: text, so that nothing of the user's is unpickled."""
    loaded = _load(function)
    if isinstance(loaded, str):
        return loaded
    try:
        reward = loaded(record)
    except (Exception, SystemExit) as error:
        return f"it raised {_one_line(error)}"
    if not isinstance(reward, numbers.Real) or not math.isfinite(reward):
        return f"it returned {_one_line(repr(reward))}; a reward must be a finite number"
    return float(reward)


def _one_line(error: BaseException | str) -> str:
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:300]
