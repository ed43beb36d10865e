"""Waits until an SGLang server answers, and checks whether it can serve this run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_bupo.errors import UsageError
from megatron_bupo.rollout.sglang.client import ServerError, SGLangClient
from megatron_bupo.rollout.sglang.process import API_KEY_VARIABLE, ServerProcess

PROBE_S = 30.0
"""Timeout of one request: for /health a server generates a token, which takes longer under load."""
POLL_S = 0.5


class NotReady(UsageError):
    """A server did not become ready in time, or it ended."""


class PortTaken(Exception):
    """Another process took the port after it was chosen and before the server was bound to it."""


@dataclass(frozen=True)
class ServerInfo:
    """What a server says about itself.

    Args:
        version: of sglang.
        device: "cpu" or "cuda".
        weight_version: of its weights at the time of the request.
        max_input_tokens: longest prompt that it accepts; None: unknown.
        is_deterministic: it uses the sampling seeds of requests.
    """

    version: str
    tp_size: int
    device: str
    weight_version: str
    max_input_tokens: int | None
    is_deterministic: bool

    @classmethod
    def of(cls, client: SGLangClient, dtype: str, timeout_s: float) -> ServerInfo:
        """Ask a server. Raises ServerError without an answer, UsageError if the server cannot serve this run."""
        model = client.get("/model_info", timeout_s=timeout_s)
        args = client.get("/server_info", timeout_s=timeout_s)
        if not isinstance(model, dict) or not isinstance(args, dict) or "tp_size" not in args:
            raise UsageError(f"{client.url}: no SGLang server that this version knows (tested: sglang 0.5.23)")
        _check_usable(client.url, args, bool(model.get("is_generation", True)), dtype)
        return cls(
            version=str(args.get("version")),
            tp_size=int(args["tp_size"]),
            device=str(args.get("device")),
            weight_version=str(model.get("weight_version")),
            max_input_tokens=args.get("max_req_input_len"),
            is_deterministic=bool(args.get("enable_deterministic_inference")),
        )

    def check_room(self, name: str, longest_prompt: int, response_len: int) -> None:
        """Raise UsageError if the server would cut a response to the longest prompt short: it would show hours later.

        Args:
            name: of the server, for the message.
            longest_prompt, response_len: numbers of tokens.
        """
        # sglang takes prompts 5 tokens shorter than a whole sequence may be, and ends a response one token before that.
        room = self.max_input_tokens
        if room is not None and longest_prompt + response_len > room + 4:
            raise UsageError(
                f"{name}: has room for {room + 4} tokens, but the longest prompt has {longest_prompt} and a response "
                f"up to {response_len} (--rollout-max-response-len); ask for shorter ones, or give the server more "
                "(--context-length, --max-total-tokens, --mem-fraction-static)"
            )


@dataclass(frozen=True)
class Wait:
    """Waits for servers until --sglang-start-timeout is over.

    Args:
        timeout_s: --sglang-start-timeout, running from `start` in seconds of time.monotonic.
        dtype: of the trainer, as sglang spells it.
        has_key: whether the run has an API key, for the message about a server that refuses it.
        ending: ends the wait from another thread.
        say: called with the state of the wait, for the progress bar.
    """

    timeout_s: float
    start: float
    dtype: str
    has_key: bool
    ending: threading.Event
    say: Callable[[str], object]

    def until_ready(self, client: SGLangClient, process: ServerProcess | None, version: str | None) -> ServerInfo:
        """Wait until /health answers, then ask the server for its information.

        Args:
            process: of a server that was launched.
            version: the weight version with which it was launched; another server at this address has another one.

        Raises:
            NotReady: the time is up, the process or the run has ended.
            UsageError: the server refuses the key, or cannot serve this run.
            PortTaken: another process has the port of a launched server.
        """
        name = f"--sglang-url {client.url}" if process is None else f"the server launched at {client.url}"
        while True:
            if process is not None:
                _check_running(name, process)
            try:
                client.get("/health", timeout_s=self._probe_s())
                info = ServerInfo.of(client, self.dtype, self._probe_s())
            except ServerError as error:
                self._check_allowed(error)
                if error.status in (404, 405):
                    raise UsageError(f"{name}: something else than an SGLang server answers there ({error})") from error
                self._pause(name, str(error), process)
                continue
            if version is not None and info.weight_version != version:
                raise PortTaken(f"{client.url}: another server answers there")
            self.say("ready")
            return info

    def find_workers(self, client: SGLangClient) -> list[str] | None:
        """URLs of the workers of a router as soon as all are healthy; None where a server answers, not a router.

        Raises:
            NotReady: no answer, or a worker that is not healthy, until the time is up or the run has ended.
            UsageError: the key is refused, or what answers is no router and no server.
        """
        while True:
            try:
                urls = _workers_of_router(client.url, client.get("/workers", timeout_s=self._probe_s()))
                if urls:
                    return urls
                last = f"{client.url}: a router, whose workers are not all healthy"
            except ServerError as error:
                if error.status in (404, 405):
                    return None
                self._check_allowed(error)
                last = str(error)
            self._pause(f"--sglang-url {client.url}", last, None)

    def is_over(self) -> bool:
        return self._left_s() <= 0 or self.ending.is_set()

    def _left_s(self) -> float:
        return self.start + self.timeout_s - time.monotonic()

    def _probe_s(self) -> float:
        return max(0.1, min(PROBE_S, self._left_s()))

    def _check_allowed(self, error: ServerError) -> None:
        """Raise UsageError for a server that refuses the key: waiting does not help."""
        if error.status in (401, 403):
            found = "the key in it is refused" if self.has_key else "it is not set"
            raise UsageError(f"{error.url} asks for an API key ({error.status}): set {API_KEY_VARIABLE}; {found}")

    def _pause(self, name: str, last: str, process: ServerProcess | None) -> None:
        """Wait before the next request. Raises NotReady if the time is up or the run is ending."""
        left_s = self._left_s()
        if left_s <= 0:
            more = f"; {process.log_tail()}" if process is not None else ""
            raise NotReady(f"{name}: not ready after --sglang-start-timeout {self.timeout_s:g} s; last: {last}{more}")
        self.say(f"{last[:100]}, {left_s:.0f} s left")
        if self.ending.wait(min(POLL_S, left_s)):
            raise NotReady(f"{name}: the run is ending")


def _check_running(name: str, process: ServerProcess) -> None:
    status = process.exit_status()
    if status is None:
        return
    if "address already in use" in process.printed().lower():
        raise PortTaken(f"{name}: another process took the port")
    raise NotReady(f"{name} ended while it started (exit status {status}); {process.log_tail()}")


def _check_usable(url: str, args: dict[str, Any], is_generation: bool, dtype: str) -> None:
    """Raise UsageError for a server whose weights cannot be updated, or would not be the trainer's."""
    if not is_generation:
        raise UsageError(f"{url}: serves embeddings; start it without --is-embedding")
    for name in ("dp_size", "pp_size", "nnodes"):
        if args.get(name, 1) != 1:
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(
                f"{url}: runs with {flag} {args[name]}, with which its weights cannot be updated; start several "
                f"servers with {flag} 1 (--tp-size is free)"
            )
    if args.get("disaggregation_mode", "null") != "null":
        raise UsageError(f"{url}: does only {args['disaggregation_mode']}; give servers that do prefill and decode")
    if args.get("quantization"):
        raise UsageError(f"{url}: quantizes to {args['quantization']}, the trainer does not; start it without")
    if args.get("dtype") not in (dtype, "auto", None):
        raise UsageError(f"{url}: runs in {args['dtype']}, the trainer in {dtype}; start it with --dtype {dtype}")


def _workers_of_router(url: str, answer: Any) -> list[str]:
    """URLs from a router's answer to GET /workers (sglang-router 0.3.2); none while not all are healthy."""
    try:
        workers = answer["workers"]
        kinds = {(worker.get("worker_type", "regular"), worker.get("connection_mode", "HTTP")) for worker in workers}
        healthy = [str(worker["url"]).rstrip("/") for worker in workers if worker["is_healthy"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"--sglang-url {url}: no router's answer to GET /workers: {str(answer)[:200]}") from error
    if kinds - {("regular", "HTTP")}:
        raise UsageError(
            f"--sglang-url {url}: has workers of the kinds {sorted(kinds)}; give a router of plain servers"
        )
    return healthy if len(healthy) == len(workers) else []
