"""The SGLang servers of a run: connect or launch, recover after a fault, end."""

from __future__ import annotations

import shutil
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import combinations
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from tqdm import tqdm

from megatron_bupo.config.rollout import SGLangConfig
from megatron_bupo.errors import UsageError
from megatron_bupo.rollout.sglang.client import SGLangClient
from megatron_bupo.rollout.sglang.process import Launcher, ServerProcess
from megatron_bupo.rollout.sglang.startup import POLL_S, NotReady, PortTaken, ServerInfo, Wait
from megatron_bupo.rollout.sglang.worker import Endpoint, Worker

PORT_ATTEMPTS = 3
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


class ServersError(RuntimeError):
    """A server cannot recover: its restarts, or the time for them, are used up."""


class Servers:
    """Use `start` to make one. `recover` may be called from several threads, for different workers at the same time."""

    def __init__(
        self, config: SGLangConfig, dtype: str, api_key: str | None, launcher: Launcher | None, logs: Path | None
    ) -> None:
        self.endpoints: list[Endpoint] = []
        self._config, self._dtype, self._api_key, self._launcher = config, dtype, api_key, launcher
        self._keeps_logs = logs is not None or launcher is None
        self._logs = logs or Path(tempfile.mkdtemp(prefix="bupo-sglang-logs-") if launcher is not None else "")
        self._processes: dict[int, ServerProcess] = {}
        self._num_starts: dict[int, int] = {}
        self._num_recoveries: Counter[Worker] = Counter()
        self._lock = threading.Lock()
        self._ending = threading.Event()

    @property
    def workers(self) -> list[Worker]:
        return [worker for endpoint in self.endpoints for worker in endpoint.workers]

    @classmethod
    def start(
        cls,
        config: SGLangConfig,
        hf_model: str,
        dtype: Literal["fp32", "bf16"],
        seed: int,
        logs: Path | None,
        api_key: str | None,
    ) -> Servers:
        """Connect to the servers of --sglang-url, or launch some, and wait until all are ready.

        Args:
            hf_model: folder of the model that launched servers load at first.
            dtype: of the servers' weights: the trainer's.
            seed: launched servers draw from seed, seed + 1, ...
            logs: folder of server_0.log, ...; None: a temporary one, kept only after a fault.
            api_key: sent to the servers, and asked for by launched ones.

        Raises:
            UsageError: a server died, was not ready in time, or cannot serve this run. Launched servers are ended.
        """
        launcher = Launcher(config, hf_model, DTYPES[dtype], seed, api_key) if config.sglang_launch else None
        servers = cls(config, DTYPES[dtype], api_key, launcher, logs)
        try:
            servers._wait_for_all()
        except BaseException:
            servers._keeps_logs = True
            servers._end(kill=True)
            raise
        return servers

    def recover(self, worker: Worker) -> None:
        """Bring a failed worker back. Blocks until it is ready; its weights are unknown then and must be checked.

        A launched server is killed and started again. For any other one the run waits until it answers, because its
        owner may restart it. Each start or wait counts as one of its --sglang-restarts; all of them together may take
        --sglang-start-timeout.

        Raises:
            ServersError: the budget or the time is spent, or the worker came back as one that cannot serve this run.
        """
        worker.version, worker.checked = None, False
        self._keeps_logs = True  # they show why it failed
        wait = self._wait()
        last = ""
        while True:
            self._spend_recovery(worker, last)
            try:
                if worker.process is None:
                    worker.info = wait.until_ready(worker.client, None, None)
                else:
                    worker.process.kill()
                    old = worker.client
                    worker.client, worker.info, worker.process = self._launch(worker.index, wait)
                    old.close()
                return
            except UsageError as error:
                if worker.process is None or not isinstance(error, NotReady) or wait.is_over():
                    raise ServersError(f"{worker.name} did not come back: {error}") from error
                last = f"; at its last start {error}"

    def await_router(self, endpoint: Endpoint) -> None:
        """Wait until a router that failed answers again, with the same servers behind it. Blocks.

        Raises:
            ServersError: it does not answer within --sglang-start-timeout, or has other servers behind it.
        """
        assert endpoint.router is not None
        try:
            urls = self._wait().find_workers(endpoint.router)
        except UsageError as error:
            raise ServersError(f"router {endpoint.router.url} did not come back: {error}") from error
        expected = sorted(worker.client.url for worker in endpoint.workers)
        if sorted(urls or []) != expected:
            found = " ".join(urls or ["no worker"])
            raise ServersError(
                f"router {endpoint.router.url} came back with {found}, not with {' '.join(expected)}; only those have "
                "the weights of this run"
            )

    def close(self) -> None:
        """End the launched servers with all their processes, and close the connections. Safe to call twice."""
        self._end(kill=False)

    def _wait(self, say: Callable[[str], object] = lambda _text: None) -> Wait:
        timeout_s = self._config.sglang_start_timeout
        return Wait(timeout_s, time.monotonic(), self._dtype, self._api_key is not None, self._ending, say)

    def _wait_for_all(self) -> None:
        """Fill `endpoints`, with one thread for each. The first failure ends the wait, and so does Ctrl-C."""
        if self._launcher is not None:
            names = [f"server_{index}" for index in range(self._config.sglang_num_servers)]
        else:
            names = [url.rstrip("/") for url in self._config.sglang_url or []]
            _check_distinct(names)
        states = dict.fromkeys(names, "")
        found: dict[str, Endpoint] = {}
        failed: list[BaseException] = []

        def find(index: int, name: str) -> None:
            wait = self._wait(lambda text: states.update({name: text}))
            try:
                found[name] = self._connect(name, wait) if self._launcher is None else self._launch_first(index, wait)
            except BaseException as error:  # raised in the thread that waits for all
                failed.append(error)

        for index, name in enumerate(names):
            threading.Thread(target=find, args=(index, name), daemon=True).start()
        with tqdm(total=len(names), desc="SGLang servers", unit=" ready", disable=None) as bar:
            while len(found) < len(names) and not failed:
                time.sleep(POLL_S / 2)
                bar.n = len(found)
                bar.set_postfix_str("; ".join(f"{name}: {states[name]}" for name in names if name not in found))
        if failed:
            raise failed[0]
        self.endpoints = [found[name] for name in names]
        _check_distinct([worker.client.url for worker in self.workers])

    def _connect(self, url: str, wait: Wait) -> Endpoint:
        """A server that runs already, or a router with its workers."""
        client = SGLangClient(url, self._api_key)
        urls = wait.find_workers(client)
        clients = [client] if urls is None else [SGLangClient(worker, self._api_key) for worker in urls]
        workers = [Worker(one, wait.until_ready(one, None, None), None) for one in clients]
        return Endpoint(workers, router=None if urls is None else client)

    def _launch_first(self, index: int, wait: Wait) -> Endpoint:
        client, info, process = self._launch(index, wait)
        return Endpoint([Worker(client, info, process, index)])

    def _launch(self, index: int, wait: Wait) -> tuple[SGLangClient, ServerInfo, ServerProcess]:
        """Start a server and wait for it; on another port if another process took the first one."""
        assert self._launcher is not None
        for attempt in range(1, PORT_ATTEMPTS + 1):
            with self._lock:  # no server is started after `close`
                if self._ending.is_set():
                    raise NotReady(f"server_{index}: the run is ending")
                self._num_starts[index] = num_starts = self._num_starts.get(index, 0) + 1
                url, version, process = self._launcher.launch(index, num_starts, self._logs)
                self._processes[index] = process
            client = SGLangClient(url, self._api_key)
            try:
                return client, wait.until_ready(client, process, version), process
            except PortTaken as error:
                process.kill()
                if attempt == PORT_ATTEMPTS:
                    raise NotReady(f"server_{index}: {error}, {attempt} times; {process.log_tail()}") from error
            except BaseException:
                process.kill()
                raise
        raise AssertionError("the last attempt returns or raises")

    def _spend_recovery(self, worker: Worker, last: str) -> None:
        budget = self._config.sglang_restarts
        with self._lock:
            if self._num_recoveries[worker] >= budget:
                raise ServersError(
                    f"{worker.name} failed, and its --sglang-restarts {budget} is used up in this run{last}"
                )
            self._num_recoveries[worker] += 1

    def _end(self, kill: bool) -> None:
        with self._lock:
            self._ending.set()
            processes = list(self._processes.values())
        with ExitStack() as stack:
            for process in processes:
                stack.callback(process.wait)
                process.begin_stop(kill=kill)
        for endpoint in self.endpoints:
            for client in [endpoint.client, *(worker.client for worker in endpoint.workers)]:
                client.close()
        if not self._keeps_logs:
            shutil.rmtree(self._logs, ignore_errors=True)


def _check_distinct(urls: Sequence[str]) -> None:
    """Raise UsageError if one server has two names: it would get two updates at the same time."""
    for (first, at_first), (second, at_second) in combinations([(url, _addresses(url)) for url in urls], 2):
        if at_first & at_second:
            names = " = ".join(dict.fromkeys([first, second]))
            raise UsageError(f"--sglang-url: {names} is given twice, or is also a worker of a given router")


def _addresses(url: str) -> set[tuple[str, int]]:
    """Addresses and port of a URL; the name itself if it cannot be resolved (yet)."""
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        return {(host, port)}
    return {(str(address[0]), port) for *_, address in found}
