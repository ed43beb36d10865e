"""Sends new weights to the servers, by files, messages or a process group, and checks that they arrived."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from megatron_bupo.rollout.engine import TrainedModel
from megatron_bupo.rollout.sglang.client import ServerError
from megatron_bupo.rollout.sglang.weight_sync.calls import SHORT_S, Attempt, SyncMethod, ask, is_answered
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
from megatron_bupo.weights.hf_files import is_finite

if TYPE_CHECKING:
    from megatron_bupo.rollout.sglang.worker import Worker

_FLUSH_S = 30.0


class WeightSync:
    """Pushes weights to servers.

    Args:
        method: tensor posts messages, distributed broadcasts in a process group, disk writes files.
        bucket_bytes: of weights in one message.
        timeout_s: for one message.
        folder: for disk; the servers can read it, and no other run uses it: its contents are removed.
        hf_model: for disk; the files have its names, and its config and tokenizer are written beside them.
        vocab_size: without padding; the fixed prompt has no token above it.
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
        self._method: SyncMethod
        if method == "disk":
            assert folder is not None, "disk needs a folder"
            self._method = FolderOnDisk(folder, hf_model)
        elif method == "distributed":
            self._method = Broadcasts(bucket_bytes)
        else:
            assert method == "tensor", f"{method} is no way of weight sync"
            self._method = TensorMessages(bucket_bytes)
        self._timeout_s, self._vocab_size, self._tied = timeout_s, vocab_size, tied
        # The version that was compared last, with its checksums, and the servers that were after a push of parts.
        self._compared: str | None = None
        self._checksums: dict[str, str] = {}
        self._compared_in_parts: set[Worker] = set()

    def push(self, workers: Sequence[Worker], model: TrainedModel, version: str, since: str | None = None) -> None:
        """Give all `workers` the present weights of `model` as `version`, and check that they hold them.

        One attempt; until it has succeeded no server counts as up to date. The servers are paused meanwhile, and their
        requests are aborted. At the first push to a server process, and at the first that sends it only some tensors,
        all that it holds is compared.

        Args:
            since: the name by which `model` knows the weights that all `workers` hold: what has not changed since is
                not sent, where the method allows that. None: everything is sent.

        Raises:
            SyncError: a server failed, was late, or holds other weights. Servers that still answer run again then.
            FloatingPointError: the trainer's weights have NaN or infinite values.
        """
        attempt = Attempt(workers, self._method.name, version, self._timeout_s)
        unchecked = {worker for worker in workers if not worker.checked}
        assert since is None or not unchecked, "what a server process holds is not known before its first push"
        held = workers[0].version if since is not None and self._method.in_parts else None
        for worker in workers:
            worker.version = None
        self._compared_in_parts -= unchecked
        compares = bool(unchecked)
        if held is not None:
            compares = held == self._compared and not self._compared_in_parts.issuperset(workers)
        kept = None if held is None else self._checksums
        expected = ExpectedWeights(self._tied, any(map(has_known_checksums, workers)), kept)
        try:
            self._pause(attempt)
            if held is not None:
                check_version(attempt, held)
            sessions = self._begin(attempt) if self._method.in_session else []
            tensors = model.hf_tensors(None if held is None else since)
            self._method.send(attempt, _watched(tensors, expected.add if compares else None))
            if sessions:
                end = Attempt(sessions, attempt.method, version, self._timeout_s)
                end.post("ending the update", "/end_weight_update", {})
            attempt.post("going on", "/continue_generation", {})
        except BaseException:  # KeyboardInterrupt too: others may use these servers
            self._tidy_up(attempt)
            raise
        check_version(attempt, version)
        if compares:
            # All, not the new ones alone: checksums that cannot be computed here are compared between the servers.
            check_weights(attempt, expected)
            tokens = probe_tokens(self._vocab_size)
            check_probe(attempt, tokens, model.logprobs(tokens), expected.dtype)
            self._compared, self._checksums = version, expected.checksums()
            self._compared_in_parts |= set() if held is None else set(workers)
        for worker in workers:
            worker.version, worker.checked = version, True

    def close(self) -> None:
        """Remove files and leave process groups. Safe to call twice."""
        self._method.close()

    def _pause(self, attempt: Attempt) -> None:
        """Pause the servers and empty their caches, whose contents were computed with the old weights."""
        attempt.post("pausing", "/pause_generation", {"mode": "abort"})
        deadline = time.monotonic() + min(attempt.timeout_s, _FLUSH_S)

        def flush(worker: Worker) -> None:
            while True:
                try:
                    ask(worker, "/flush_cache", {}, attempt.timeout_s)
                    return
                except ServerError as error:  # 400: aborted requests are still running
                    if error.status != 400 or time.monotonic() > deadline:
                        raise
                time.sleep(0.1)

        attempt.on_all("emptying the cache", flush)

    def _begin(self, attempt: Attempt) -> list[Worker]:
        """Begin an update; the servers that have this call (404: an older one, which takes weights without it)."""

        def begin(worker: Worker) -> bool:
            try:
                ask(worker, "/begin_weight_update", {}, attempt.timeout_s)
            except ServerError as error:
                if error.status == 404:
                    return False
                # 400: an update that a failed push began is still open.
                if error.status != 400:
                    raise
                ask(worker, "/end_weight_update", {}, attempt.timeout_s)
                ask(worker, "/begin_weight_update", {}, attempt.timeout_s)
            return True

        begun = attempt.on_all("beginning the update", begin)
        return [worker for worker, knows in zip(attempt.workers, begun, strict=True) if knows]

    def _tidy_up(self, attempt: Attempt) -> None:
        """After a failure: end the update and resume the servers, as far as they answer."""
        self._method.abandon()

        def tidy(worker: Worker) -> None:
            patience = min(attempt.timeout_s, SHORT_S)
            if self._method.in_session and not is_answered(worker, "/end_weight_update", {}, patience):
                patience = 1.0  # it hangs, and handles the next request when it answers again
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
    """The same stream; `see` is called with each tensor. Raises FloatingPointError for NaN or infinite values."""
    for name, tensor in tensors:
        if not is_finite(tensor):
            raise FloatingPointError(f"weight sync: the trainer's {name} has NaN or infinite values; it is not sent")
        if see is not None:
            see(name, tensor)
        yield name, tensor
