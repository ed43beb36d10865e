"""Weight sync by broadcast: one process group of the trainer's first rank and every rank of the servers.

The servers join with sglang's init_custom_process_group; this is the other end of it. The default group of the trainer
takes no part.
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
from megatron_bupo.rollout.sglang_client import ServerError
from megatron_bupo.rollout.weight_sync_calls import SHORT_S, Attempt, Bucket, Failures, ask, buckets, is_answered

if TYPE_CHECKING:
    from megatron_bupo.rollout.sglang_servers import Worker

_GRACE_S = 5.0  # between the timeout of a message and giving up what should have ended by itself


class Broadcasts:
    """POST /update_weights_from_distributed while this process broadcasts: gloo, or NCCL to GPUs.

    The group lives as long as the same server processes are pushed to; after a failure a new one is made.
    """

    name = "distributed"
    in_session = True

    def __init__(self, bucket_bytes: int) -> None:
        self._bucket_bytes = bucket_bytes
        self._group: UpdateGroup | None = None

    def send(self, attempt: Attempt, tensors: Iterable[tuple[str, Tensor]]) -> None:
        group = self._group
        # A server process that was never compared is new, though it may have the address of an old one.
        if group is None or group.urls != _urls(attempt) or not all(worker.checked for worker in attempt.workers):
            self.close()
            group = self._group = UpdateGroup(attempt)
        for bucket in buckets(tensors, self._bucket_bytes):
            group.broadcast(attempt, bucket)

    def abandon(self) -> None:
        self.close()

    def close(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.close()


class UpdateGroup:
    """Trainer: rank 0; then the ranks of the first server, of the second ...

    Raises:
        SyncError: a server did not join in time.
    """

    def __init__(self, attempt: Attempt) -> None:
        self.urls = _urls(attempt)
        self.name = f"megatron_bupo-{secrets.token_hex(4)}"
        self._workers = list(attempt.workers)
        self._timeout = timedelta(seconds=attempt.timeout_s)
        self._backend, self._device = _backend(self._workers)
        self._pg: dist.ProcessGroup | None = self._join(attempt)

    def broadcast(self, attempt: Attempt, bucket: Bucket) -> None:
        """One bucket to every server; ends within the timeout, also where a server refuses or stands still."""
        tensors = [(name, tensor.detach().to(self._device).contiguous()) for name, tensor in bucket.tensors]
        body = {
            "names": [name for name, _ in tensors],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors],
            "shapes": [list(tensor.shape) for _, tensor in tensors],
            "group_name": self.name,
            "flush_cache": False,
            "weight_version": attempt.label(bucket),
        }
        failures = Failures()
        with ThreadPoolExecutor(len(self._workers) + 1) as pool:
            posts: list[Future[Any]] = [
                pool.submit(
                    failures.watch,
                    worker,
                    lambda worker: ask(worker, "/update_weights_from_distributed", body, attempt.timeout_s),
                )
                for worker in self._workers
            ]
            sent = pool.submit(self._send, tensors)
            done, _ = wait([*posts, sent], timeout=attempt.timeout_s + _GRACE_S, return_when=FIRST_EXCEPTION)
            if failures.found or sent not in done or sent.exception() is not None:
                self._break_off(failures, sent)
        doing = f"{bucket}, group {self.name}"
        attempt.raise_first(doing, failures)
        _raise_own(attempt, doing, sent)

    def close(self) -> None:
        """Leave, and tell the servers to."""
        patience = min(self._timeout.total_seconds(), SHORT_S)
        with ThreadPoolExecutor(len(self._workers)) as pool:
            for worker in self._workers:
                pool.submit(is_answered, worker, "/destroy_weights_update_group", {"group_name": self.name}, patience)
            self._leave()

    def _leave(self) -> None:
        """Cut the lines: a server that still waits for a broadcast ends that with an error."""
        if self._pg is not None:
            dist.destroy_process_group(self._pg)
            self._pg = None

    def _send(self, tensors: list[tuple[str, Tensor]]) -> None:
        """Broadcast in the order of the list, as the servers receive; errors name the tensor."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # threads have their own
        works = [(name, dist.broadcast(tensor, group=self._pg, group_src=0, async_op=True)) for name, tensor in tensors]
        failed = None
        while works:
            name, work = works.pop(0)
            try:
                work.wait()
            except RuntimeError as error:
                failed = failed or f"the broadcast of {name} failed: {_first_line(error)}"
        # Raised out here: a traceback that holds works keeps the group alive, and so the servers' lines open.
        del work
        if failed is not None:
            raise RuntimeError(failed)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # NCCL's wait is one of the stream only

    def _break_off(self, failures: Failures, sent: Future[Any]) -> None:
        """End a broadcast that somebody does not take part in; all others in the group would wait out their timeouts.

        NCCL can be aborted from here. Gloo cannot: there a server that refused is told to leave, which cuts its line.
        """
        assert self._pg is not None
        self._pg.abort()
        for worker, error in list(failures.found):
            if isinstance(error, ServerError) and error.status is not None:
                is_answered(worker, "/destroy_weights_update_group", {"group_name": self.name}, SHORT_S)
        wait([sent], timeout=self._timeout.total_seconds())
        self._leave()

    def _join(self, attempt: Attempt) -> dist.ProcessGroup:
        """Post the invitations while this process joins."""
        doing = f"making the process group {self.name}"
        try:
            addresses = {worker.name: local_address(worker.client.url) for worker in self._workers}
        except OSError as error:
            raise attempt.error(self._workers[0], doing, f"no way to it: {error}") from error
        size = 1 + sum(worker.info.tp_size for worker in self._workers)
        master, port = _listen(set(addresses.values()), self._timeout)
        failures = Failures()

        def invite(worker: Worker) -> None:
            before = self._workers[: self._workers.index(worker)]
            body = {
                "master_address": addresses[worker.name],
                "master_port": port,
                "rank_offset": 1 + sum(other.info.tp_size for other in before),
                "world_size": size,
                "group_name": self.name,
                "backend": self._backend,
            }
            ask(worker, "/init_weights_update_group", body, attempt.timeout_s)

        own = addresses[self._workers[0].name]
        # A client of its own: when the master is gone, all that wait for each other give up at once.
        store = dist.TCPStore(own, port, is_master=False, wait_for_workers=False, timeout=self._timeout)
        with ThreadPoolExecutor(len(self._workers) + 1) as pool:
            invited: list[Future[Any]] = [pool.submit(failures.watch, worker, invite) for worker in self._workers]
            joined = pool.submit(self._new_group, store, size)
            del store
            wait([*invited, joined], timeout=attempt.timeout_s + _GRACE_S, return_when=FIRST_EXCEPTION)
            if failures.found or not joined.done() or joined.exception() is not None:
                del master
        attempt.raise_first(f"{doing} at {own}:{port}", failures)
        _raise_own(attempt, doing, joined)
        self._master = master
        return joined.result()

    def _new_group(self, store: dist.Store, size: int) -> dist.ProcessGroup:
        """What sglang's init_custom_process_group does; torch has no public call for a group beside the default one."""
        # NCCL ends the whole process at a timeout: it gets one that `broadcast` never lets it reach.
        timeout = self._timeout if self._backend == "gloo" else 2 * self._timeout + timedelta(seconds=2 * _GRACE_S)
        group, _ = _new_process_group_helper(
            size,
            0,
            [],
            dist.Backend(self._backend),
            PrefixStore(self.name, store),
            group_name=GroupName(self.name),
            timeout=timeout,
        )
        _world.pg_group_ranks[group] = {rank: rank for rank in range(size)}
        return group


def local_address(url: str) -> str:
    """The address of this machine as the server at `url` sees it. Nothing is sent. Raises OSError."""
    parts = urlsplit(url)
    family, *_, address = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as towards:
        towards.connect(address)
        return str(towards.getsockname()[0])


def _listen(addresses: set[str], timeout: timedelta) -> tuple[dist.TCPStore, int]:
    """The store where a group meets, on a free port; on one address only where all servers see the same."""
    host = next(iter(addresses)) if len(addresses) == 1 else ""
    family = socket.AF_INET6 if any(":" in address for address in addresses) else socket.AF_INET
    listener = socket.create_server((host, 0), family=family, dualstack_ipv6=host == "" and family == socket.AF_INET6)
    port = listener.getsockname()[1]
    store = dist.TCPStore(
        host or "localhost",
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timeout,
        master_listen_fd=listener.detach(),
    )
    return store, port


def _backend(workers: list[Worker]) -> tuple[str, torch.device]:
    """gloo or nccl, and where tensors must be for it. Raises UsageError where the sides do not fit."""
    devices = {worker.info.device for worker in workers}
    if devices == {"cpu"}:
        return "gloo", torch.device("cpu")
    if devices != {"cuda"}:
        raise UsageError(f"--weight-sync distributed: the servers are on {', '.join(sorted(devices))}; give one kind")
    if not torch.cuda.is_available():
        raise UsageError("--weight-sync distributed: the servers are on GPUs and the trainer is not; give tensor")
    return "nccl", torch.device("cuda", torch.cuda.current_device())


def _urls(attempt: Attempt) -> list[str]:
    return [worker.client.url for worker in attempt.workers]


def _raise_own(attempt: Attempt, doing: str, future: Future[Any]) -> None:
    """Raise SyncError where this side failed though every server said yes; which of them is to blame stays open."""
    error = future.exception()
    if error is not None:
        raise attempt.error(attempt.workers[0], doing, f"on the trainer's side: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
