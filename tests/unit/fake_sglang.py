"""A schema fake of an SGLang server on a real port, with faults that can be switched. For unit tests only.

A response identifies its request: its first tokens are the halves of the sampling seed and the sum of the prompt.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

DEFAULT_VERSION = "default"
FAULTS = ("500", "cut", "cut in the body", "garbage", "schema", "abort", "stale", "hang")
HALF = 1 << 16

Body = dict[str, Any]


def spelled_tokens(body: Body) -> list[int]:
    """The response to a request: the seed in two halves, the sum of the prompt, zeros up to the limit."""
    seed, limit = body["sampling_params"]["sampling_seed"], body["sampling_params"]["max_new_tokens"]
    return [seed % HALF, seed // HALF, HALF + sum(body["input_ids"]), *[HALF] * (limit - 3)]


def good_answer(body: Body, version: str) -> Body:
    """What sglang 0.5.23 answers: the response reaches its limit."""
    tokens = spelled_tokens(body)
    return {
        "text": "",
        "output_ids": tokens,
        "meta_info": {
            "id": body["rid"],
            "finish_reason": {"type": "length", "length": len(tokens)},
            "prompt_tokens": len(body["input_ids"]),
            "completion_tokens": len(tokens),
            "cached_tokens": 0,
            "weight_version": version,
            "weight_versions": [{"version": version, "start": 0, "end": len(tokens)}],
            "output_token_logprobs": [[-0.5 - i / 8, token, None] for i, token in enumerate(tokens)],
        },
    }


def fail_first(
    times: int, fault: str, *, chosen: Callable[[Body], bool] = lambda body: True
) -> Callable[[Body], str | None]:
    """A fault for the first so many of the chosen requests."""
    left, lock = [None] * times, threading.Lock()

    def draw(body: Body) -> str | None:
        with lock:
            if not left or not chosen(body):
                return None
            left.pop()
            return fault

    return draw


class FakeServer:
    """Attributes:

    version: of the weights that it says it holds.
    fault: asked with the body of each /generate: a word of FAULTS, or None.
    delay_s: of each /generate.
    may_answer: each /generate waits until this is true.
    is_frozen: nothing is answered any more, as after SIGSTOP.
    is_unhealthy: /health says 503, all else works.
    refusal: (status, message) for every /generate.
    requests: the bodies of /generate so far.
    calls: how often each path was asked for.
    """

    def __init__(self) -> None:
        self.version = DEFAULT_VERSION
        self.fault: Callable[[Body], str | None] = lambda body: None
        self.delay_s = 0.0
        self.may_answer: Callable[[], object] = lambda: True
        self.is_frozen = False
        self.is_unhealthy = False
        self.refusal: tuple[int, str] | None = None
        self.requests: list[Body] = []
        self.most_at_once = 0
        self.calls: Counter[str] = Counter()
        self._at_once = 0
        self._lock = threading.Lock()
        self._start()

    @property
    def num_connections(self) -> int:
        return len(self._connections)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def kill(self) -> None:
        """As SIGKILL: the port is closed, and so is every connection."""
        if not self._gone.is_set():
            self._gone.set()
            self._http.shutdown()
            self._http.server_close()
            for connection in list(self._connections):
                _cut(connection)

    def restart(self) -> None:
        """As an operator would: on another port, with the weights of the start and without requests."""
        self.kill()
        self.version, self.is_frozen, self.is_unhealthy = DEFAULT_VERSION, False, False
        self._start()

    def _start(self) -> None:
        self._gone = threading.Event()
        self._connections: set[socket.socket] = set()
        self._http = _Http(("127.0.0.1", 0), _handler(self, self._gone, self._connections))
        self._port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def generate(self, body: Body, gone: threading.Event) -> tuple[int, bytes] | None:
        """Status and body of the answer; None: the connection is cut."""
        with self._lock:
            self.requests.append(body)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            return self._generate(body, gone)
        finally:
            with self._lock:
                self._at_once -= 1

    def _generate(self, body: Body, gone: threading.Event) -> tuple[int, bytes] | None:
        if self.refusal is not None:
            return self.refusal[0], json.dumps({"error": {"message": self.refusal[1]}}).encode()
        version, fault = self.version, self.fault(body)
        gone.wait(self.delay_s)
        while not self.may_answer() and not gone.is_set():
            time.sleep(0.01)
        answer = good_answer(body, version)
        if fault == "500":
            return 500, b"Internal Server Error"
        if fault == "cut":
            return None
        if fault == "garbage":
            return 200, b'{"output_ids": [1, 2'
        if fault == "schema":
            answer["meta_info"]["output_token_logprobs"].pop()
        if fault == "abort":
            answer["output_ids"], answer["meta_info"]["finish_reason"] = [7], {"type": "abort", "message": "Abort"}
        if fault == "stale":
            self.version = DEFAULT_VERSION
            answer = good_answer(body, DEFAULT_VERSION)
        if fault == "hang":
            self.is_frozen = True
        data = json.dumps(answer).encode()
        return (-1, data) if fault == "cut in the body" else (200, data)


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is part of the tests."""


def _cut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # it is closed already


def _handler(fake: FakeServer, gone: threading.Event, connections: set[socket.socket]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 30

        def setup(self) -> None:
            super().setup()
            connections.add(self.connection)

        def finish(self) -> None:
            connections.discard(self.connection)
            super().finish()

        def do_GET(self) -> None:
            self._serve(None)

        def do_POST(self) -> None:
            self._serve(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _serve(self, body: Any) -> None:
            fake.calls[self.path] += 1
            answer: tuple[int, bytes] | None = (200, b"{}")
            if self.path == "/generate":
                answer = fake.generate(body, gone)
            if self.path == "/health" and fake.is_unhealthy:
                answer = 503, b""
            if self.path == "/model_info":
                answer = 200, json.dumps({"weight_version": fake.version}).encode()
            while fake.is_frozen and not gone.is_set():
                time.sleep(0.01)
            if gone.is_set() or answer is None:
                _cut(self.connection)
                return
            status, data = answer
            self.send_response(200 if status < 0 else status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if status < 0 else data)
            if status < 0:
                _cut(self.connection)

        def log_message(self, format: str, *args: Any) -> None:
            """Tests are quiet."""

    return Handler
