"""The HTTP client against a real little server that misbehaves: every failure is a ServerError that names it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from megatron_bupo.rollout.sglang.client import ServerError, SGLangClient
from megatron_bupo.rollout.sglang.process import free_port

JSON = "Connection: close\r\nContent-Type: application/json"
# path -> what the server sends, byte for byte, before it closes the connection.
ANSWERS = {
    "/good": f"HTTP/1.1 200 OK\r\n{JSON}\r\nContent-Length: 8\r\n\r\n" + '{"a": 1}',
    "/empty": "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
    "/text": "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: text/plain\r\nContent-Length: 5\r\n\r\nflush",
    "/broken": f"HTTP/1.1 500 Internal Server Error\r\n{JSON}\r\n\r\n" + '{"error": {"message": "out of\\n memory"}}',
    "/refused": "HTTP/1.1 400 Bad Request\r\n\r\nnot like this",
    "/cut": f"HTTP/1.1 200 OK\r\n{JSON}\r\nContent-Length: 800\r\n\r\n" + '{"a": ',
    "/gone": "",
    "/no-json": f"HTTP/1.1 200 OK\r\n{JSON}\r\nContent-Length: 6\r\n\r\n" + '{"a": ',
    "/no-http": "SSH-2.0-OpenSSH_9.9\r\n\r\n",
    "/no-gzip": f"HTTP/1.1 200 OK\r\n{JSON}\r\nContent-Encoding: gzip\r\nContent-Length: 5\r\n\r\nplain",
}
FAILURES = {
    "/broken": (500, "500 out of memory"),
    "/refused": (400, "400 not like this"),
    "/cut": (None, "RemoteProtocolError"),
    "/gone": (None, "RemoteProtocolError"),
    "/no-json": (200, "its answer is no JSON"),
    "/no-http": (None, "RemoteProtocolError"),
    "/no-gzip": (None, "DecodingError"),
    "/slow": (None, "ReadTimeout"),
}


SHORT_S, HANG_S = 0.5, 300.0  # for an answer that never comes; for all others, whatever else the machine does
_OVER = threading.Event()


def limit_s(path: str) -> float:
    return SHORT_S if path in ("/slow", "/drip") else HANG_S


class _Handler(BaseHTTPRequestHandler):
    authorization: str | None = None

    def do_GET(self) -> None:
        _Handler.authorization = self.headers["Authorization"]
        self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.path == "/slow":
            _OVER.wait()
        if self.path == "/drip":
            self._drip()
        self.wfile.write(ANSWERS.get(self.path, "").encode())
        self.close_connection = True

    do_POST = do_GET

    def _drip(self) -> None:
        """A byte now and then: each comes in time, the whole never does."""
        self.wfile.write(f"HTTP/1.1 200 OK\r\n{JSON}\r\nContent-Length: 800000\r\n\r\n".encode())
        with contextlib.suppress(OSError):  # the other end has left
            while not _OVER.wait(0.2):
                self.wfile.write(b"{")

    def log_message(self, format: str, *values: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    _OVER.set()
    server.shutdown()
    server.server_close()


def ask(client: SGLangClient, path: str) -> Any:
    """`post`, on the event loop."""

    async def run() -> Any:
        async with client.for_event_loop(2) as connections:
            return await client.ask(connections, path, {"x": 1}, timeout_s=limit_s(path))

    return asyncio.run(run())


ways = pytest.mark.parametrize(
    "request_",
    [
        lambda client, path: client.get(path, timeout_s=limit_s(path)),
        lambda client, path: client.post(path, {"x": 1}, timeout_s=limit_s(path)),
        ask,
    ],
    ids=["get", "post", "ask"],
)
Request = Callable[[SGLangClient, str], Any]


@ways
def test_answers(url: str, request_: Request) -> None:
    client = SGLangClient(url + "/", api_key="k3y")
    assert [request_(client, path) for path in ("/good", "/empty", "/text")] == [{"a": 1}, None, None]
    assert _Handler.authorization == "Bearer k3y"
    client.close()


@ways
@pytest.mark.parametrize("path", FAILURES)
def test_every_failure_is_a_server_error(url: str, request_: Request, path: str) -> None:
    status, message = FAILURES[path]
    with pytest.raises(ServerError) as caught:
        request_(SGLangClient(url), path)
    assert str(caught.value).startswith(f"{url}{path}: {message}")
    assert (caught.value.url, caught.value.status) == (url, status)


def test_an_answer_that_drips_ends_in_time(url: str) -> None:
    with pytest.raises(ServerError, match="/drip: no whole answer"):
        ask(SGLangClient(url), "/drip")
    assert not _OVER.is_set(), "the server still drips"


@ways
def test_no_server_listens(request_: Request) -> None:
    with pytest.raises(ServerError, match="ConnectError"):
        request_(SGLangClient(f"http://127.0.0.1:{free_port('127.0.0.1')}"), "/good")


def test_a_proxy_of_the_environment_is_not_asked(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    client = SGLangClient(url)
    assert client.get("/good", timeout_s=HANG_S) == ask(client, "/good") == {"a": 1}
