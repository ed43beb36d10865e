"""The state of one SGLang server, and the endpoint that requests for it are sent to."""

from __future__ import annotations

from megatron_bupo.rollout.sglang.client import SGLangClient
from megatron_bupo.rollout.sglang.process import ServerProcess
from megatron_bupo.rollout.sglang.startup import ServerInfo


class Worker:
    """One SGLang server.

    Attributes:
        client: replaced when a launched server is started again, on another port.
        process: None for a server that the run did not launch.
        version: of the weights that it was checked to hold; None: unknown, it gets no requests.
        checked: names, checksums and log-probs of this server process were compared with the trainer's.
        info: of this server process.
        index: n of server_n, for a launched one.
    """

    def __init__(self, client: SGLangClient, info: ServerInfo, process: ServerProcess | None, index: int = 0) -> None:
        self.client, self.info, self.process, self.index = client, info, process, index
        self.version: str | None = None
        self.checked = False

    @property
    def name(self) -> str:
        return self.client.url if self.process is None else f"server_{self.index} ({self.client.url})"


class Endpoint:
    """Where requests are sent: a server itself, or a router with its workers behind it."""

    def __init__(self, workers: list[Worker], router: SGLangClient | None = None) -> None:
        self.workers, self.router = workers, router

    @property
    def client(self) -> SGLangClient:
        return self.router or self.workers[0].client
