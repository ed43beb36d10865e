"""Weight sync by broadcast: for each server a process group of the trainer's first rank and the server's ranks.

The servers join with sglang's init_custom_process_group; this is the trainer's side. The trainer's default group is not
used. One group for all servers would send each byte once, but one server that dies or refuses would block the others
until their own timeouts (gloo: 30 minutes; NCCL: until its watchdog ends the process).
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Iterable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import GroupName, PrefixStore, _new_process_group_helper, _world

from megatron_bupo.errors import UsageError
from megatron_bupo.rollout.sglang.client import ServerError
from megatron_bupo.rollout.sglang.weight_sync.calls import (
    SHORT_S,
    Attempt,
    Bucket,
    SyncMethod,
    ask,
    buckets,
    is_answered,
)

if TYPE_CHECKING:
    from megatron_bupo.rollout.sglang.worker import Worker

_GRACE_S = 5.0  # after the timeout of a message, until a call that has not timed out is broken off


class Broadcasts(SyncMethod):
    """POST /update_weights_from_distributed while this process broadcasts: gloo, or NCCL to GPUs.

    A group is used as long as its server process runs; after a failed push all groups are made again.
    """

    name = "distributed"

    def __init__(self, bucket_bytes: int) -> None:
        self._bucket_bytes = bucket_bytes
        self._groups: dict[Worker, UpdateGroup] = {}

    def send(self, attempt: Attempt, tensors: Iterable[tuple[str, Tensor]]) -> None:
        for worker in attempt.workers:
            # A server process that was never checked is new, even if it has the address of an old one.
            if worker in self._groups and not worker.checked:
                self._groups.pop(worker).close()
            if worker not in self._groups:
                self._groups[worker] = UpdateGroup(attempt, worker)
        for bucket in buckets(tensors, self._bucket_bytes):
            self._broadcast(attempt, bucket)

    def _broadcast(self, attempt: Attempt, bucket: Bucket) -> None:
        def broadcast(worker: Worker) -> None:
            self._groups[worker].broadcast(bucket.tensors, attempt.label(bucket))

        attempt.on_all(str(bucket), broadcast)

    def abandon(self) -> None:
        self.close()

    def close(self) -> None:
        groups, self._groups = list(self._groups.values()), {}
        if groups:
            with ThreadPoolExecutor(len(groups)) as pool:
                wait([pool.submit(group.close) for group in groups])


class UpdateGroup:
    """A process group of the trainer (rank 0) and the tensor-parallel ranks of one server.

    Raises:
        SyncError: the server did not join in time.
        UsageError: the server is on GPUs and the trainer is not.
    """

    def __init__(self, attempt: Attempt, worker: Worker) -> None:
        self._worker, self._timeout_s = worker, attempt.timeout_s
        self.name = f"megatron_bupo-{secrets.token_hex(4)}"
        self._backend, self._device = _backend(worker)
        self._pg: dist.ProcessGroup | None = None
        try:
            self._join()
        except (ServerError, RuntimeError, OSError) as error:
            what = f"{_first_line(error)} (--weight-sync tensor needs no process group)"
            raise attempt.error(worker, f"making the process group {self.name}", what) from error

    def broadcast(self, tensors: list[tuple[str, Tensor]], label: str) -> None:
        """Broadcast some tensors to the server; ends in time even if the server refuses or hangs.

        Raises:
            ServerError: the server did not receive all of them.
            RuntimeError: this side failed; names tensor and group.
        """
        on_device = [(name, tensor.detach().to(self._device).contiguous()) for name, tensor in tensors]
        body = {
            "names": [name for name, _ in on_device],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in on_device],
            "shapes": [list(tensor.shape) for _, tensor in on_device],
            "group_name": self.name,
            "flush_cache": False,
            "weight_version": label,
        }
        with ThreadPoolExecutor(2) as pool:
            posted = pool.submit(ask, self._worker, "/update_weights_from_distributed", body, self._timeout_s)
            sent = pool.submit(self._send, on_device)
            wait([posted, sent], timeout=self._timeout_s + _GRACE_S, return_when=FIRST_EXCEPTION)
            if any(not future.done() or future.exception() is not None for future in (posted, sent)):
                self._break_off(posted, sent)
        posted.result()
        sent.result()

    def close(self) -> None:
        """Leave the group, and tell the server to leave it."""
        with ThreadPoolExecutor(1) as pool:
            pool.submit(self._tell_to_leave)
            self._leave()

    def _send(self, tensors: list[tuple[str, Tensor]]) -> None:
        """Broadcast in the order of the list, which is the order in which the server receives."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # threads have their own
        works = [(name, dist.broadcast(tensor, group=self._pg, group_src=0, async_op=True)) for name, tensor in tensors]
        failed = None
        while works:
            name, work = works.pop(0)
            try:
                work.wait()
            except RuntimeError as error:
                failed = failed or f"the broadcast of {name} in group {self.name} failed: {_first_line(error)}"
        # Raised here: a traceback that refers to works keeps the group alive, and with it the connection to the server.
        del work
        if failed is not None:
            raise RuntimeError(failed)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # NCCL's wait only blocks the stream

    def _break_off(self, posted: Future[Any], sent: Future[Any]) -> None:
        """End a broadcast or a request that has no counterpart; it would last until its timeout.

        NCCL can be aborted from here, gloo cannot: a server that refused is told to leave, which closes the connection.
        """
        assert self._pg is not None
        self._pg.abort()
        error = posted.exception() if posted.done() else None
        if isinstance(error, ServerError) and error.status is not None:
            self._tell_to_leave()
        wait([sent], timeout=self._timeout_s)
        self._leave()

    def _tell_to_leave(self) -> None:
        body = {"group_name": self.name}
        is_answered(self._worker, "/destroy_weights_update_group", body, min(self._timeout_s, SHORT_S))

    def _leave(self) -> None:
        """Close the connection: a server that still waits for a broadcast gets an error."""
        if self._pg is not None:
            dist.destroy_process_group(self._pg)
            self._pg = None

    def _join(self) -> None:
        """Ask the server to join while this process joins. Raises ServerError, RuntimeError, OSError."""
        timeout = timedelta(seconds=self._timeout_s)
        address = local_address(self._worker.client.url)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        # Bound here, to the one address that the server uses: torch would listen on all addresses.
        listener = socket.create_server((address, 0), family=family)
        port = listener.getsockname()[1]
        master = dist.TCPStore(
            address,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timeout,
            master_listen_fd=listener.detach(),
        )
        # A second store as client: when the master is deleted, both sides stop waiting for each other.
        store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout)
        body = {
            "master_address": address,
            "master_port": port,
            "rank_offset": 1,
            "world_size": 1 + self._worker.info.tp_size,
            "group_name": self.name,
            "backend": self._backend,
        }
        with ThreadPoolExecutor(2) as pool:
            invited = pool.submit(ask, self._worker, "/init_weights_update_group", body, self._timeout_s)
            joined = pool.submit(self._new_group, store)
            del store
            wait([invited, joined], timeout=self._timeout_s + _GRACE_S, return_when=FIRST_EXCEPTION)
            if any(not future.done() or future.exception() is not None for future in (invited, joined)):
                del master
        invited.result()
        self._pg = joined.result()
        self._master = master  # NCCL uses it again at its first broadcast

    def _new_group(self, store: dist.Store) -> dist.ProcessGroup:
        """As sglang's init_custom_process_group; torch has no public call for a group beside the default one."""
        # NCCL ends the whole process at a timeout: it gets one that `broadcast` never lets it reach.
        seconds = self._timeout_s if self._backend == "gloo" else 2 * (self._timeout_s + _GRACE_S)
        size = 1 + self._worker.info.tp_size
        group, _ = _new_process_group_helper(
            size,
            0,
            [],
            dist.Backend(self._backend),
            PrefixStore(self.name, store),
            group_name=GroupName(self.name),
            timeout=timedelta(seconds=seconds),
        )
        _world.pg_group_ranks[group] = {rank: rank for rank in range(size)}
        return group


def local_address(url: str) -> str:
    """The address of this machine from which it reaches the server at `url`. Nothing is sent. Raises OSError."""
    parts = urlsplit(url)
    family, *_, address = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as towards:
        towards.connect(address)
        return str(towards.getsockname()[0])


def _backend(worker: Worker) -> tuple[str, torch.device]:
    """gloo or nccl, and the device on which it needs tensors. Raises UsageError if the trainer has no such device."""
    if worker.info.device == "cpu":
        return "gloo", torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError(
            f"--weight-sync distributed: {worker.name} is on {worker.info.device} and the trainer has no GPU; "
            "give --weight-sync tensor"
        )
    return "nccl", torch.device("cuda", torch.cuda.current_device())


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
