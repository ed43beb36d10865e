"""Parts of every method of weight sync: buckets of tensors, and calls to all servers at the same time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from megatron_bupo.rollout.sglang.client import ServerError

if TYPE_CHECKING:
    from megatron_bupo.rollout.sglang.worker import Worker

SHORT_S = 5.0
"""Timeout of a request that cleans up: a server that is slow does it later too."""
_Answer = TypeVar("_Answer")


class SyncError(RuntimeError):
    """One push of weights failed at a server. The text names server, method and version, bucket and tensors."""

    def __init__(self, worker: Worker, text: str) -> None:
        super().__init__(text)
        self.worker = worker


@dataclass
class Bucket:
    """Tensors that are sent together. `number` counts from 1."""

    number: int
    tensors: list[tuple[str, Tensor]]
    is_last: bool

    def __str__(self) -> str:
        names = [name for name, _ in self.tensors]
        held = names[0] if len(names) == 1 else f"{len(names)} tensors from {names[0]} to {names[-1]}"
        return f"bucket {self.number} ({held})"


def buckets(tensors: Iterable[tuple[str, Tensor]], max_bytes: int) -> Iterator[Bucket]:
    """The stream cut into pieces of at most `max_bytes`; a larger tensor is sent alone.

    A bucket is emptied when the next one is requested: at most one bucket and one more tensor are in memory.
    """
    held: list[tuple[str, Tensor]] = []
    number, size = 1, 0
    for name, tensor in tensors:
        if held and size + tensor.nbytes > max_bytes:
            yield Bucket(number, held, is_last=False)
            held.clear()
            number, size = number + 1, 0
        held.append((name, tensor))
        size += tensor.nbytes
    assert held, "no tensor came"
    yield Bucket(number, held, is_last=True)
    held.clear()


@dataclass(frozen=True)
class Attempt:
    """One push of one version to some servers; makes the messages of its errors."""

    workers: Sequence[Worker]
    method: str
    version: str
    timeout_s: float

    def label(self, bucket: Bucket) -> str:
        """The version that a server takes over with a bucket: the new one with the last bucket.

        Before that it is a name that marks incomplete weights: the old weights are no longer there.
        """
        return self.version if bucket.is_last else f"{self.version}-incomplete"

    def on_all(self, doing: str, call: Callable[[Worker], _Answer]) -> list[_Answer]:
        """Run `call` for all servers at once, in threads. Waits for all; SyncError names the first that failed."""
        failures: list[tuple[Worker, Exception]] = []

        def watched(worker: Worker) -> _Answer:
            try:
                return call(worker)
            except Exception as error:
                failures.append((worker, error))
                raise

        with ThreadPoolExecutor(len(self.workers)) as pool:
            futures = [pool.submit(watched, worker) for worker in self.workers]
            wait(futures)
        if failures:
            (worker, error), *more = failures
            also = f"; {', '.join(other.name for other, _ in more)} failed too" if more else ""
            raise self.error(worker, doing, f"{error}{also}") from error
        return [future.result() for future in futures]

    def post(self, doing: str, path: str, body: Any) -> list[Any]:
        """One POST to all servers at once. Raises SyncError."""
        return self.on_all(doing, lambda worker: ask(worker, path, body, self.timeout_s))

    def error(self, worker: Worker, doing: str, what: str) -> SyncError:
        server = "" if what.startswith(worker.name) else f"{worker.name}: "
        return SyncError(worker, f"weight sync ({self.method}, version {self.version}), {doing}: {server}{what}")


class SyncMethod(ABC):
    """A method to send tensors to paused servers. Every failure of a server is a SyncError.

    Attributes:
        name: the value of --weight-sync.
        in_session: whether `send` has to stand between the begin and the end of an update, on servers that have these.
        in_parts: whether a server keeps the tensors that it is not sent.
    """

    name: str
    in_session = True
    in_parts = True

    @abstractmethod
    def send(self, attempt: Attempt, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Send the stream, all tensors or (`in_parts`) some, to every server; the last bucket sets the version."""

    def abandon(self) -> None:  # noqa: B027
        """Clean up after a push that failed."""

    def close(self) -> None:  # noqa: B027
        """Remove files and leave process groups. Safe to call twice."""


def ask(worker: Worker, path: str, body: Any, timeout_s: float) -> Any:
    """POST to one server. Raises ServerError, also for an answer that says `success: false`."""
    answer = worker.client.post(path, body, timeout_s=timeout_s)
    if isinstance(answer, dict) and answer.get("success") is False:
        raise ServerError(worker.client.url, path, str(answer.get("message")), 200)
    return answer


def is_answered(worker: Worker, path: str, body: Any, timeout_s: float) -> bool:
    """Whether a POST that cleans up got any answer, an error too: there may be nothing to clean up."""
    try:
        ask(worker, path, body, timeout_s)
    except ServerError as error:
        return error.status is not None
    return True
