"""Weight sync in an internal phase: only what has changed since the version that all servers hold is sent."""

from __future__ import annotations

import base64
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_bupo.rollout.sglang.weight_sync.calls import SyncError
from megatron_bupo.rollout.sglang.weight_sync.sync import WeightSync
from tests.unit.tiny_hf import tensors_in_order
from tests.unit.weight_sync_fakes import VOCAB, FakeModel, FakeServer

CHECKS = ["weights_checker", "generate"]


@pytest.fixture
def tensors(tmp_path: Path) -> dict[str, Tensor]:
    return tensors_in_order("qwen3", True, tmp_path / "model")


def sync_of(method: str, tmp_path: Path) -> WeightSync:
    folder, hf_model = tmp_path / "sync", str(tmp_path / "model")
    return WeightSync(
        method, bucket_bytes=4000, timeout_s=60.0, folder=folder, hf_model=hf_model, vocab_size=VOCAB, tied=True
    )


class Phase(FakeModel):
    """Trains the embedding and the first layer, of a model of several."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__(dict(tensors))
        self.trained = {name for name in tensors if "embed_tokens" in name or ".layers.0." in name}

    def train(self, since: str) -> None:
        self.tensors |= {name: 2 * self.tensors[name] for name in self.trained}
        self.changed[since] = self.trained


def sent(server: FakeServer) -> list[str]:
    """The names of all tensors that came in messages since the last call."""
    entries = [body.pop("serialized_named_tensors")[0] for body in server.bodies if "serialized_named_tensors" in body]
    return [name for entry in entries for name, _ in pickle.loads(base64.b64decode(entry))]


def assert_holds(server: FakeServer, model: FakeModel) -> None:
    assert all(torch.equal(server.held[name], tensor) for name, tensor in model.tensors.items())


def test_what_has_not_changed_is_not_sent(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    servers, model = [FakeServer(tensors), FakeServer(tensors)], Phase(tensors)
    workers = [server.worker(f"http://{at}:1") for at, server in enumerate(servers)]
    sync = sync_of("tensor", tmp_path)
    sync.push(workers, model, "x-0")
    assert [sent(server) for server in servers] == [[*tensors], [*tensors]]
    asked = []
    for step in (1, 2):
        model.train(since=str(step - 1))
        for server in servers:
            server.calls.clear()
        sync.push(workers, model, f"x-{step}", since=str(step - 1))
        for server in servers:
            assert sent(server) == [name for name in tensors if name in model.trained]
            assert server.calls[:4] == ["pause_generation", "flush_cache", "model_info", "begin_weight_update"]
            assert_holds(server, model)
        asked.append(servers[0].calls[servers[0].calls.index("continue_generation") + 1 :])
        assert [worker.version for worker in workers] == [f"x-{step}"] * 2
    assert asked == [["model_info", *CHECKS], ["model_info"]], "all is compared after the first push of parts"


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"])
def test_the_first_push_of_parts_compares_what_was_sent_and_what_was_not(
    name: str, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    server, model = FakeServer(tensors), Phase(tensors)
    worker, sync = server.worker(), sync_of("tensor", tmp_path)
    sync.push([worker], model, "0")
    model.train(since="0")
    checksums = server.checksums

    def broken() -> dict[str, str]:
        server.held[name] = server.held[name] + 1
        return checksums()

    server.checksums = broken  # type: ignore[method-assign]
    with pytest.raises(SyncError, match=rf"its {name.replace('up_proj', 'gate_up_proj')} of \d+ tensors is not what"):
        sync.push([worker], model, "1", since="0")
    assert worker.version is None


def test_a_server_that_holds_something_else_gets_no_parts(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    """It was restarted since the engine asked it."""
    server, model = FakeServer(tensors), Phase(tensors)
    worker, sync = server.worker(), sync_of("tensor", tmp_path)
    sync.push([worker], model, "0")
    model.train(since="0")
    server.version = "default"
    sent(server)
    with pytest.raises(SyncError, match="it serves version default instead of 0"):
        sync.push([worker], model, "1", since="0")
    assert sent(server) == [] and not server.is_paused and worker.version is None
    sync.push([worker], model, "1")
    assert_holds(server, model)


def test_a_new_server_gets_everything_and_parts_later(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    old, new, model = FakeServer(tensors), FakeServer(tensors), Phase(tensors)
    sync, workers = sync_of("tensor", tmp_path), [old.worker("http://old:1"), new.worker("http://new:1")]
    sync.push(workers[:1], model, "0")
    model.train(since="0")
    sync.push(workers[:1], model, "1", since="0")
    sync.push(workers[1:], model, "1")  # as in the middle of a batch
    model.train(since="1")
    sent(new)
    old.calls.clear()
    sync.push(workers, model, "2", since="1")
    assert set(sent(new)) == model.trained
    assert old.calls[-2:] == new.calls[-2:] == CHECKS
    assert_holds(old, model)
    assert_holds(new, model)


def test_disk_gives_the_whole_model_always(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    server, model = FakeServer(tensors), Phase(tensors)
    worker, sync = server.worker(), sync_of("disk", tmp_path)
    sync.push([worker], model, "0")
    model.train(since="0")
    sync.push([worker], model, "1", since="0")  # a folder of parts cannot be written
    assert_holds(server, model)
    sync.close()
