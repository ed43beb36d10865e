"""HTTP client of one SGLang server or router. Answers are JSON; every failure is a ServerError.

Endpoints and answers are those of sglang 0.5.23. Proxies of the environment are not used.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

from megatron_bupo.errors import UsageError

if TYPE_CHECKING:
    import httpx2

CONNECT_S = 10.0
"""Seconds to open a connection. The time for an answer is an argument of each request."""
DRIP_S = 1.0
"""Seconds beyond its timeout that an answer may take to arrive, once it has begun."""
IDLE_S = 2.0
"""Seconds that an idle connection is kept. The server closes it after 5; a request just then would fail."""


class ServerError(RuntimeError):
    """A request failed: no connection, no answer in time, an error status, or an answer that is no JSON.

    The message names server and path. `status` is the HTTP status; None if no complete answer came.
    """

    def __init__(self, url: str, path: str, what: str, status: int | None = None) -> None:
        super().__init__(f"{url}{path}: {what}")
        self.url, self.status = url, status


class SGLangClient:
    """Sends requests to one server. `get` and `post` block and may be called from any thread; `ask` is a coroutine.

    Args:
        url: such as http://127.0.0.1:30000, without a path.
        api_key: sent as a bearer token, when given.
        transport: in place of the network, for tests.

    Raises:
        UsageError: the client's library is not installed.
    """

    def __init__(self, url: str, api_key: str | None = None, *, transport: httpx2.BaseTransport | None = None) -> None:
        self.url = url.rstrip("/")
        self._library = http_library()
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        limits = self._library.Limits(keepalive_expiry=IDLE_S)
        self._blocking = self._library.Client(
            headers=self._headers, trust_env=False, transport=transport, limits=limits
        )

    def get(self, path: str, *, timeout_s: float) -> Any:
        """The JSON of an answer (None for an empty one). Raises ServerError."""
        return self._request("GET", path, None, timeout_s)

    def post(self, path: str, body: Any, *, timeout_s: float) -> Any:
        """The JSON of an answer (None for an empty one, or for plain text). Raises ServerError.

        Args:
            body: what becomes JSON, or bytes that are JSON already.
        """
        return self._request("POST", path, body, timeout_s)

    def for_event_loop(self, limit: int) -> httpx2.AsyncClient:
        """A client for the running event loop, with at most `limit` connections; its user closes it."""
        limits = self._library.Limits(max_connections=limit, max_keepalive_connections=limit, keepalive_expiry=IDLE_S)
        return self._library.AsyncClient(headers=self._headers, trust_env=False, limits=limits)

    async def ask(self, client: httpx2.AsyncClient, path: str, body: Any, *, timeout_s: float) -> Any:
        """`post` on the event loop, over a client of `for_event_loop`. Raises ServerError; can be cancelled."""
        try:
            asked = client.post(self.url + path, json=body, timeout=self._timeout(timeout_s))
            # The library's timeout is for each piece of an answer: slow pieces could take for ever together.
            answer = await asyncio.wait_for(asked, timeout_s + DRIP_S)
        except asyncio.TimeoutError as error:
            raise ServerError(self.url, path, f"no whole answer in {timeout_s:g} s") from error
        except self._library.RequestError as error:
            raise ServerError(self.url, path, describe(error)) from error
        return self._json(answer, path)

    def close(self) -> None:
        self._blocking.close()

    def _request(self, method: str, path: str, body: Any, timeout_s: float) -> Any:
        content: dict[str, Any] = {"json": body}
        if isinstance(body, bytes):
            content = {"content": body, "headers": {"Content-Type": "application/json"}}
        try:
            answer = self._blocking.request(method, self.url + path, timeout=self._timeout(timeout_s), **content)
        except self._library.RequestError as error:
            raise ServerError(self.url, path, describe(error)) from error
        return self._json(answer, path)

    def _timeout(self, seconds: float) -> httpx2.Timeout:
        return self._library.Timeout(seconds, connect=min(seconds, CONNECT_S), pool=None)

    def _json(self, answer: httpx2.Response, path: str) -> Any:
        if answer.status_code != 200:
            raise ServerError(self.url, path, f"{answer.status_code} {message_of(answer.text)}", answer.status_code)
        if not answer.content or "json" not in answer.headers.get("content-type", ""):
            return None
        try:
            return answer.json()
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ServerError(self.url, path, f"its answer is no JSON ({error})", answer.status_code) from error


def describe(error: Exception) -> str:
    """A transport error in words: kind and text, since many have no text."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def message_of(text: str) -> str:
    """The message in the body of an error answer, on one line and not too long.

    >>> message_of('{"error": {"message": "bad path"}}'), message_of("Internal Server Error"), message_of("<html>...")
    ('bad path', 'Internal Server Error', '(a web page)')
    """
    if text.lstrip().startswith("<"):
        return "(a web page)"
    try:
        body = json.loads(text)
    except json.JSONDecodeError:
        body = text
    if isinstance(body, dict):
        error = body.get("error", body)
        body = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(body).split())[:500]


def http_library() -> Any:
    """The module of the HTTP client. Raises UsageError where it is not installed."""
    try:
        import httpx2
    except ImportError as error:
        raise UsageError(
            "--rollout-engine sglang: needs the client's library; pip install 'megatron_bupo[sglang]'"
        ) from error
    return httpx2
