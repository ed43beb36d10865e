"""The three ways of weight sync on two real servers: from several layouts, against HuggingFace, and under faults."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_bupo.rollout.sglang.servers import Servers
from megatron_bupo.rollout.sglang.weight_sync.calls import SyncError
from megatron_bupo.rollout.sglang.weight_sync.sync import WeightSync
from tests.integration.sglang.conftest import VOCAB_SIZE, server_processes
from tests.integration.sglang.sync_worker import problems_of
from tests.parallel.launch import LAYOUTS, assert_passed, torchrun

WORKER = str(Path(__file__).with_name("sync_worker.py"))
LONG_S = 600.0  # timeout of one message; a push that fails early takes less than half of it
LARGE = 8_000_000  # elements: more than the buffers of a connection take


class Trainer:
    """A HuggingFace model in fp32 in place of the trainer's; `at` does something when a tensor's turn has come."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float()
        self.at: dict[str, Callable[[], object]] = {}
        self.renamed: dict[str, str] = {}
        self.extra: dict[str, Tensor] = {}

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}

    def hf_tensors(self, since: str | None = None) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in [*self.tensors.items(), *self.extra.items()]:
            if name in self.at:
                self.at.pop(name)()
            yield self.renamed.get(name, name), tensor

    def logprobs(self, tokens: list[int]) -> list[float]:
        with torch.no_grad():
            logprobs = self.model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        return [float(logprobs[at, token]) for at, token in enumerate(tokens[1:])]

    @torch.no_grad()
    def train(self) -> None:
        for parameter in self.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))


@pytest.fixture
def trainer(tiny_qwen3: Path) -> Trainer:
    torch.manual_seed(3)
    trainer = Trainer(tiny_qwen3)
    trainer.train()
    return trainer


@pytest.fixture
def make_sync(tiny_qwen3: Path, tmp_path: Path) -> Iterator[Callable[..., WeightSync]]:
    made: list[WeightSync] = []

    def make(method: str, timeout_s: float = 60.0) -> WeightSync:
        made.append(
            WeightSync(
                method,
                bucket_bytes=100_000,
                timeout_s=timeout_s,
                folder=tmp_path / "weights",
                hf_model=str(tiny_qwen3),
                vocab_size=VOCAB_SIZE,
                tied=True,
            )
        )
        return made[-1]

    yield make
    for sync in made:
        sync.close()


def assert_in_step(servers: Servers, trainer: Trainer, folder: Path, version: str) -> None:
    assert problems_of(servers.workers, str(folder), trainer.tensors, version) == []


@pytest.mark.parametrize("layout", ["TP1", "TP2", "PP2", "DP2"])
def test_from_every_layout(layout: str, servers: Servers, tiny_qwen3: Path, tmp_path: Path) -> None:
    processes, flags = LAYOUTS[layout]
    urls = ",".join(worker.client.url for worker in servers.workers)
    for worker in servers.workers:
        worker.version, worker.checked = None, False
    result = torchrun(processes, WORKER, str(tiny_qwen3), str(tmp_path), urls, *flags)
    print(result.stdout)
    assert_passed(result)
    assert result.stdout.count(" nats") == 6 * len(servers.workers)


@pytest.mark.parametrize("method", ["tensor", "distributed"])
def test_what_arrives_wrong_is_caught(
    method: str, servers: Servers, trainer: Trainer, make_sync: Callable[..., WeightSync], tiny_qwen3: Path
) -> None:
    sync, name = make_sync(method), "model.layers.2.mlp.down_proj.weight"

    def outcome() -> str:
        for worker in servers.workers:
            worker.checked = False
        with pytest.raises(SyncError) as caught:
            sync.push(servers.workers, trainer, "9")
        assert [worker.version for worker in servers.workers] == [None, None]
        return str(caught.value)

    trainer.renamed[name] = "model.layers.2.mlp.up_down_proj.weight"
    assert "it has no model.layers.2.mlp.up_down_proj.weight" in outcome()
    trainer.renamed.clear()
    # Memory that is used again too early: after the tensor was handed over, before its bucket is sent.
    trainer.at["model.layers.2.input_layernorm.weight"] = lambda: trainer.tensors[name].view(torch.int32)[3, 3].add_(1)
    assert f"its {name} of 34 tensors is not what the trainer sent" in outcome()
    true_logprobs = trainer.logprobs
    trainer.logprobs = lambda tokens: [number + 2e-3 for number in true_logprobs(tokens)]  # type: ignore[method-assign]
    assert "they are 0.002 nats off, and 0.001 are allowed" in outcome()
    trainer.logprobs = true_logprobs  # type: ignore[method-assign]
    sync.push(servers.workers, trainer, "9")
    assert_in_step(servers, trainer, tiny_qwen3, "9")


@pytest.mark.parametrize("method", ["tensor", "distributed"])
def test_a_server_that_stands_still(
    method: str, servers: Servers, trainer: Trainer, make_sync: Callable[..., WeightSync], tiny_qwen3: Path
) -> None:
    """SIGSTOP in the middle: the push fails in time, and after SIGCONT the next one works without a restart."""
    sync, victim = make_sync(method, timeout_s=10.0), servers.workers[1]
    sync.push(servers.workers, trainer, "1")
    stopped = server_processes(victim)
    trainer.at["model.layers.2.mlp.gate_proj.weight"] = lambda: [process.suspend() for process in stopped]
    trainer.train()
    started = time.monotonic()
    with pytest.raises(SyncError, match=r"bucket \d+ \(.*model\.layers\..*ReadTimeout") as caught:
        sync.push(servers.workers, trainer, "2")
    assert time.monotonic() - started < LONG_S / 2, "gloo alone would wait for half an hour"
    for process in stopped:
        process.resume()
    assert caught.value.worker is victim and victim.client.url in str(caught.value)
    assert [worker.version for worker in servers.workers] == [None, None]
    sync.push(servers.workers, trainer, "2")
    assert_in_step(servers, trainer, tiny_qwen3, "2")


def test_a_server_that_refuses_does_not_hold_up_a_broadcast(
    servers: Servers, trainer: Trainer, make_sync: Callable[..., WeightSync], tiny_qwen3: Path
) -> None:
    sync, victim = make_sync("distributed", timeout_s=LONG_S), servers.workers[0]
    trainer.extra = {"large.weight": torch.ones(LARGE), "after.weight": torch.ones(1)}
    trainer.at["after.weight"] = lambda: victim.client.post("/end_weight_update", {}, timeout_s=30)
    started = time.monotonic()
    with pytest.raises(
        SyncError, match=r"bucket \d+ \(large\.weight\).*must run between begin_weight_update"
    ) as caught:
        sync.push(servers.workers, trainer, "3")
    assert caught.value.worker is victim
    assert time.monotonic() - started < LONG_S / 2
    trainer.extra.clear()
    sync.push(servers.workers, trainer, "3")
    assert_in_step(servers, trainer, tiny_qwen3, "3")


def test_a_server_that_is_killed(
    servers: Servers, trainer: Trainer, make_sync: Callable[..., WeightSync], tiny_qwen3: Path
) -> None:
    """SIGKILL in the middle of a broadcast; after its restart the whole push works, in every way."""
    sync, victim = make_sync("distributed", timeout_s=LONG_S), servers.workers[0]
    sync.push(servers.workers, trainer, "1")

    def kill() -> None:
        for process in server_processes(victim):
            process.send_signal(signal.SIGKILL)

    trainer.extra = {"large.weight": torch.ones(LARGE), "after.weight": torch.ones(1)}
    trainer.at["after.weight"] = kill
    started = time.monotonic()
    with pytest.raises(SyncError, match=r"bucket \d+ \(large\.weight\)") as caught:
        sync.push(servers.workers, trainer, "2")
    assert caught.value.worker is victim
    assert time.monotonic() - started < LONG_S / 2
    trainer.extra.clear()
    servers.recover(victim)
    for number, again in enumerate([sync, make_sync("tensor"), make_sync("disk")]):
        again.push(servers.workers, trainer, f"2-{number}")
        assert_in_step(servers, trainer, tiny_qwen3, f"2-{number}")
