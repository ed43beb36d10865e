"""New weights for the servers: one whole attempt, over files, messages or a process group, and the proof of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from megatron_bupo.rollout.engine import TrainedModel
from megatron_bupo.rollout.sglang.client import ServerError
from megatron_bupo.rollout.sglang.weight_sync.calls import SHORT_S, Attempt, ask, is_answered
from megatron_bupo.rollout.sglang.weight_sync.checks import (
    ExpectedWeights,
    check_probe,
    check_version,
    check_weights,
    has_known_checksums,
    probe_tokens,
)
from megatron_bupo.rollout.sglang.weight_sync.disk import FolderOnDisk
from megatron_bupo.rollout.sglang.weight_sync.distributed import Broadcasts
from megatron_bupo.rollout.sglang.weight_sync.tensor import TensorMessages

if TYPE_CHECKING:
    from megatron_bupo.rollout.sglang.worker import Worker

_FLUSH_S = 30.0


class _Method(Protocol):
    """A way for tensors to reach servers that stand still. Every failure at a server is a SyncError."""

    @property
    def name(self) -> str: ...

    @property
    def in_session(self) -> bool:
        """Whether servers that know begin and end of an update want them around `send`."""

    def send(self, attempt: Attempt, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """The whole stream to every server; the last of it brings the version."""

    def abandon(self) -> None:
        """A push failed: give up what it had open."""

    def close(self) -> None: ...


class WeightSync:
    """Pushes weights to servers.

    Args:
        method: tensor posts messages, distributed broadcasts in a process group, disk writes files.
        bucket_bytes: of weights in one message, or in one file.
        timeout_s: for one message.
        folder: that the servers see too, for disk; of this run alone, what is in it goes.
        hf_model: whose config and tokenizer go with the files.
        vocab_size: without padding, for the fixed prompt.
        tied: whether the unembedding is the embedding, and the servers have no tensor for it.
    """

    def __init__(
        self,
        method: str,
        *,
        bucket_bytes: int,
        timeout_s: float,
        folder: Path | None,
        hf_model: str,
        vocab_size: int,
        tied: bool,
    ) -> None:
        self._method: _Method
        if method == "disk":
            assert folder is not None, "disk needs a folder"
            self._method = FolderOnDisk(folder, hf_model, bucket_bytes)
        elif method == "distributed":
            self._method = Broadcasts(bucket_bytes)
        else:
            assert method == "tensor", f"{method} is no way of weight sync"
            self._method = TensorMessages(bucket_bytes)
        self._timeout_s, self._vocab_size, self._tied = timeout_s, vocab_size, tied

    def push(self, workers: Sequence[Worker], model: TrainedModel, version: str) -> None:
        """Give all `workers` the weights that `model` has now, as `version`, and make sure that they hold them.

        One whole attempt; until it is through no server counts as up to date. The servers stand still meanwhile, and
        what they were generating is aborted. A server process that gets its first push is compared tensor by tensor.

        Raises:
            SyncError: a server failed, was late, or holds something else. What was open is ended as well as it can be.
            FloatingPointError: the trainer's weights have NaN or infinite values.
        """
        attempt = Attempt(workers, self._method.name, version, self._timeout_s)
        for worker in workers:
            worker.version = None
        unchecked = [worker for worker in workers if not worker.checked]
        expected = ExpectedWeights(self._tied, any(map(has_known_checksums, workers)))
        try:
            self._pause(attempt)
            sessions = self._begin(attempt) if self._method.in_session else []
            self._method.send(attempt, _watched(model.hf_tensors(), expected.add if unchecked else None))
            if sessions:
                end = Attempt(sessions, attempt.method, version, self._timeout_s)
                end.post("ending the update", "/end_weight_update", {})
            attempt.post("going on", "/continue_generation", {})
        except BaseException:  # KeyboardInterrupt too: others may use these servers
            self._tidy_up(attempt)
            raise
        check_version(attempt)
        if unchecked:
            # All, not the new ones alone: what one cannot compute it can compare with the others.
            check_weights(attempt, expected)
            tokens = probe_tokens(self._vocab_size)
            check_probe(attempt, tokens, model.logprobs(tokens), expected.dtype)
        for worker in workers:
            worker.version, worker.checked = version, True

    def close(self) -> None:
        """Give back files and process groups. Safe to call twice."""
        self._method.close()

    def _pause(self, attempt: Attempt) -> None:
        """Stop the servers and empty their caches: what is in them was computed with the old weights."""
        attempt.post("pausing", "/pause_generation", {"mode": "abort"})
        deadline = time.monotonic() + min(attempt.timeout_s, _FLUSH_S)

        def flush(worker: Worker) -> None:
            while True:
                try:
                    ask(worker, "/flush_cache", {}, attempt.timeout_s)
                    return
                except ServerError as error:  # 400: what was aborted is not yet gone
                    if error.status != 400 or time.monotonic() > deadline:
                        raise
                time.sleep(0.1)

        attempt.on_all("emptying the cache", flush)

    def _begin(self, attempt: Attempt) -> list[Worker]:
        """Open an update on the servers that know it (404: an older one, which updates at any time); these."""

        def begin(worker: Worker) -> bool:
            try:
                ask(worker, "/begin_weight_update", {}, attempt.timeout_s)
            except ServerError as error:
                if error.status == 404:
                    return False
                # One may be open still, from a push that broke off.
                if error.status != 400:
                    raise
                ask(worker, "/end_weight_update", {}, attempt.timeout_s)
                ask(worker, "/begin_weight_update", {}, attempt.timeout_s)
            return True

        begun = attempt.on_all("beginning the update", begin)
        return [worker for worker, knows in zip(attempt.workers, begun, strict=True) if knows]

    def _tidy_up(self, attempt: Attempt) -> None:
        """After a failure: no update is left open, and the servers run again, each as far as it answers."""
        self._method.abandon()

        def tidy(worker: Worker) -> None:
            patience = min(attempt.timeout_s, SHORT_S)
            if self._method.in_session and not is_answered(worker, "/end_weight_update", {}, patience):
                patience = 1.0  # it hangs, and will find this when it goes on
            is_answered(worker, "/continue_generation", {}, patience)

        attempt.on_all("tidying up", tidy)


def sync_method(flag: str, server_devices: set[str], trainer_device: str) -> str:
    """The method that --weight-sync means, for servers and a trainer on "cpu" or "cuda"."""
    if flag != "auto":
        return flag
    # gloo and NCCL need one kind of device on both sides; messages work everywhere, but take much longer.
    return "distributed" if server_devices == {trainer_device} else "tensor"


def _watched(
    tensors: Iterable[tuple[str, Tensor]], see: Callable[[str, Tensor], None] | None
) -> Iterator[tuple[str, Tensor]]:
    """The stream, shown to `see`. Raises FloatingPointError at a tensor with NaN or infinite values."""
    for name, tensor in tensors:
        # NaN goes through both extremes, without a copy of the tensor.
        if not all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor.detach())):
            raise FloatingPointError(f"weight sync: the trainer's {name} has NaN or infinite values; it is not sent")
        if see is not None:
            see(name, tensor)
        yield name, tensor
