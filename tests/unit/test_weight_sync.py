"""Weight sync against a server that keeps what it gets, and stacks, pads and hashes as SGLang does on a CPU."""

from __future__ import annotations

import base64
import hashlib
import math
import pickle
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from torch import Tensor

from megatron_bupo.rollout.sglang.weight_sync.calls import SyncError, buckets
from megatron_bupo.rollout.sglang.weight_sync.checks import ExpectedWeights
from megatron_bupo.rollout.sglang.weight_sync.distributed import local_address
from megatron_bupo.rollout.sglang.weight_sync.sync import WeightSync
from megatron_bupo.rollout.sglang.weight_sync.tensor import serialize
from tests.unit.tiny_hf import tensors_in_order
from tests.unit.weight_sync_fakes import LOGPROBS, VOCAB, FakeModel, FakeServer

BRACKET = ["pause_generation", "flush_cache", "begin_weight_update"]


def sync_of(method: Any = "tensor", *, tied: bool = True, size: int = 4000, folder: Path | None = None) -> WeightSync:
    hf_model = "" if folder is None else str(folder.parent)
    return WeightSync(
        method, bucket_bytes=size, timeout_s=60.0, folder=folder, hf_model=hf_model, vocab_size=VOCAB, tied=tied
    )


@pytest.fixture
def tensors(tmp_path: Path) -> dict[str, Tensor]:
    return tensors_in_order("qwen3", True, tmp_path / "model")


def test_buckets_are_bounded_and_in_order() -> None:
    sizes = [3, 4, 2, 9, 1, 1, 5, 3]
    stream = [(str(at), torch.zeros(size, dtype=torch.uint8)) for at, size in enumerate(sizes)]
    found = [(b.number, [name for name, _ in b.tensors], b.is_last) for b in buckets(stream, 7)]
    assert found == [
        (1, ["0", "1"], False),
        (2, ["2"], False),
        (3, ["3"], False),  # larger than a bucket
        (4, ["4", "5", "6"], False),
        (5, ["7"], True),
    ]


def test_no_more_than_one_bucket_and_a_tensor_are_held() -> None:
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0

    def stream() -> Iterator[tuple[str, Tensor]]:
        nonlocal most
        for at in range(20):
            tensor = torch.zeros(10, dtype=torch.uint8)
            alive.add(tensor)
            most = max(most, len(alive))
            yield str(at), tensor
            del tensor

    for bucket in buckets(stream(), 40):
        serialize(bucket.tensors)
    assert most <= 5


def test_a_message_holds_the_tensors_and_nothing_else() -> None:
    large = torch.randn(100_000)
    sent = [
        ("view", large[10:20]),
        ("transposed", large[:12].view(3, 4).T),
        ("parameter", torch.nn.Parameter(torch.randn(3))),
        ("bf16", torch.randn(5).bfloat16()),
        ("nan", torch.tensor([math.nan, 1.0])),
    ]
    text = serialize(sent)
    assert len(text) < 6000
    got = pickle.loads(base64.b64decode(text))
    assert [name for name, _ in got] == [name for name, _ in sent]
    for (_, one), (_, other) in zip(sent, got, strict=True):
        assert type(other) is Tensor and other.dtype == one.dtype and other.is_contiguous()
        torch.testing.assert_close(other, one.detach(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_push_and_checks_of_every_family(family: str, tied: bool, tmp_path: Path) -> None:
    tensors = tensors_in_order(family, tied, tmp_path)
    server, model = FakeServer(tensors), FakeModel(tensors)
    worker, sync = server.worker(), sync_of(tied=tied)
    sync.push([worker], model, "7")
    assert all(torch.equal(server.held[name], tensor) for name, tensor in tensors.items())
    assert (worker.version, worker.checked, server.version) == ("7", True, "7")
    updates = [body["weight_version"] for body in server.bodies if "serialized_named_tensors" in body]
    assert len(updates) > 3 and updates == ["7-incomplete"] * (len(updates) - 1) + ["7"]
    end = ["end_weight_update", "continue_generation", "model_info"]
    first = [*BRACKET, *["update_weights_from_tensor"] * len(updates), *end]
    assert server.calls == [*first, "weights_checker", "generate"]
    assert server.bodies[0] == {"mode": "abort"}
    assert model.asked == 1
    server.calls.clear()
    sync.push([worker], model, "8")
    assert server.calls == first, "a server that was compared once is asked for its version only"
    assert (worker.version, model.asked) == ("8", 1)


def test_checksums_of_odd_dtypes_and_padding() -> None:
    expected = ExpectedWeights(tied=True)
    embedding = torch.randn(130, 3).bfloat16()
    expected.add("model.embed_tokens.weight", embedding)
    expected.add("lm_head.weight", embedding)
    raw = embedding.view(torch.int16).numpy().tobytes() + bytes((192 - 130) * 3 * 2)
    assert expected.checksums() == {"model.embed_tokens.weight": hashlib.sha256(raw).hexdigest()[:16]}


def test_an_older_server_without_begin_and_end(tensors: dict[str, Tensor]) -> None:
    old, new = FakeServer(tensors, has_sessions=False), FakeServer(tensors)
    workers = [old.worker("http://old:1"), new.worker("http://new:1")]
    sync_of().push(workers, FakeModel(tensors), "1")
    assert "end_weight_update" not in old.calls and "end_weight_update" in new.calls
    assert [worker.version for worker in workers] == ["1", "1"]


def test_tensor_parallel_servers_get_a_copy_for_each_rank(tensors: dict[str, Tensor]) -> None:
    server = FakeServer(tensors)
    sync_of().push([server.worker(tp_size=2)], FakeModel(tensors), "1")
    entries = [body["serialized_named_tensors"] for body in server.bodies if "serialized_named_tensors" in body]
    assert all(len(both) == 2 and both[0] == both[1] for both in entries)
    assert all(sum(t.nbytes for _, t in held) <= 2000 or len(held) == 1 for held in map(_unpickled, entries))


def _unpickled(entries: list[str]) -> list[tuple[str, Tensor]]:
    return list(pickle.loads(base64.b64decode(entries[0])))


@pytest.mark.parametrize(
    ("path", "answers", "words"),
    [
        ("pause_generation", [500], "pausing"),
        ("flush_cache", [503], "emptying the cache"),
        ("begin_weight_update", [500], "beginning the update"),
        (
            "update_weights_from_tensor",
            [None, 400],
            "bucket 2 (2 tensors from model.layers.0.input_layernorm.weight to ",
        ),
        (
            "update_weights_from_tensor",
            [None, None, httpx2.ReadTimeout("")],
            "bucket 3 (2 tensors from model.layers.0.self_attn.k_proj",
        ),
        ("update_weights_from_tensor", [200], "bucket 1 (model.embed_tokens.weight)"),  # a 200 that says no success
        ("end_weight_update", [500], "ending the update"),
        ("continue_generation", [500], "going on"),
    ],
)
def test_a_failure_leaves_servers_that_the_next_push_can_use(
    tensors: dict[str, Tensor], path: str, answers: list[Any], words: str
) -> None:
    good, bad = FakeServer(tensors), FakeServer(tensors)
    workers = [good.worker("http://good:1"), bad.worker("http://bad:1")]
    bad.fails = {path: list(answers)}
    sync = sync_of()
    with pytest.raises(SyncError) as caught:
        sync.push(workers, FakeModel(tensors), "3")
    assert caught.value.worker is workers[1]
    what = "ReadTimeout" if isinstance(answers[-1], Exception) else f"planned {answers[-1]}"
    for part in (f"weight sync (tensor, version 3), {words}", f"http://bad:1/{path}", what):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    for server in (good, bad):
        assert not server.is_open and not server.is_paused
    assert [worker.version for worker in workers] == [None, None]
    if "bucket" in words and "bucket 1" not in words:
        assert good.version == bad.version == "3-incomplete", "neither the old name nor the new one"
    sync.push(workers, FakeModel(tensors), "3")
    assert [worker.version for worker in workers] == ["3", "3"]


def test_a_session_that_a_dead_run_left_open_is_ended(tensors: dict[str, Tensor]) -> None:
    server = FakeServer(tensors)
    server.is_open = server.is_paused = True
    sync_of().push([server.worker()], FakeModel(tensors), "1")
    assert server.calls[2:5] == ["begin_weight_update", "end_weight_update", "begin_weight_update"]


def test_the_cache_is_flushed_as_soon_as_what_was_aborted_is_gone(tensors: dict[str, Tensor]) -> None:
    server = FakeServer(tensors)
    server.fails = {"flush_cache": [400, 400]}
    sync_of().push([server.worker()], FakeModel(tensors), "1")
    assert server.calls.count("flush_cache") == 3


def _drop_byte(server: FakeServer) -> None:
    original = server.checksums

    def checksums() -> dict[str, str]:
        server.held["model.layers.1.mlp.up_proj.weight"].view(torch.uint8)[0, 0] ^= 1
        return original()

    server.checksums = checksums  # type: ignore[method-assign]


def test_what_arrived_wrong_is_found(tensors: dict[str, Tensor]) -> None:
    """One bit, a tensor that is not sent, one that the server does not know, log-probs, a version."""

    def outcome(change: Any, sent: dict[str, Tensor] = tensors) -> str:
        copies = {name: tensor.clone() for name, tensor in sent.items()}
        server = FakeServer(tensors)
        change(server)
        worker = server.worker()
        with pytest.raises(SyncError) as caught:
            sync_of().push([worker], FakeModel(copies), "1")
        assert worker.version is None and not worker.checked and not server.is_open and not server.is_paused
        return str(caught.value)

    def nothing(server: FakeServer) -> None:
        return

    assert "its model.layers.1.mlp.gate_up_proj.weight of 18 tensors is not what" in outcome(_drop_byte)
    fewer = {name: tensor for name, tensor in tensors.items() if name != "model.layers.1.self_attn.q_norm.weight"}
    assert "it has model.layers.1.self_attn.q_norm.weight, which the trainer never sends" in outcome(nothing, fewer)
    more = {**tensors, "model.layers.2.input_layernorm.weight": torch.ones(16)}
    assert "it has no model.layers.2.input_layernorm.weight" in outcome(nothing, more)
    for wrong in (LOGPROBS[3] + 2e-3, math.nan):
        text = outcome(lambda server, wrong=wrong: server.logprobs.__setitem__(3, wrong))
        assert "nats off, and 0.001 are allowed; most so token 4: " in text
    assert "22 log-probs came" in outcome(lambda server: _shorten(server))

    def stuck_version(server: FakeServer) -> None:
        act = server._act
        server._act = lambda call, body: (200, {"weight_version": "0"}) if call == "model_info" else act(call, body)  # type: ignore[method-assign]

    assert "asking for the version: http://one:1: it serves version 0" in outcome(stuck_version)


def test_the_probe_in_bf16_goes_by_the_mean(tensors: dict[str, Tensor]) -> None:
    """There single tokens are off by whole nats, though the weights are right."""
    model = FakeModel({name: tensor.bfloat16() for name, tensor in tensors.items()})
    server = FakeServer(tensors)
    server.logprobs[5] += 4.0
    sync_of().push([server.worker()], model, "1")
    server.logprobs = [number + 0.31 for number in LOGPROBS]
    with pytest.raises(SyncError, match=r"0\.31 nats off on average, and 0\.3 are allowed"):
        sync_of().push([server.worker()], model, "1")


def _shorten(server: FakeServer) -> None:
    act = server._act

    def shorter(call: str, body: dict[str, Any]) -> tuple[int, Any]:
        status, answer = act(call, body)
        if call == "generate":
            answer["meta_info"]["input_token_logprobs"].pop()
        return status, answer

    server._act = shorter  # type: ignore[method-assign]


def test_weights_with_nan_are_not_sent(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = math.nan
    server = FakeServer(tensors)
    worker = server.worker()
    with pytest.raises(FloatingPointError, match=r"up_proj\.weight has NaN"):
        sync_of().push([worker], FakeModel(tensors), "1")
    assert worker.version is None and not server.is_open and not server.is_paused


def test_disk_gives_a_whole_model_and_keeps_the_newest(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    folder = tmp_path / "model" / "sync"
    server = FakeServer(tensors)
    worker, sync = server.worker(), sync_of("disk", folder=folder)
    sync.push([worker], FakeModel(tensors), "1")
    twice = {name: 2 * tensor for name, tensor in tensors.items()}
    sync.push([worker], FakeModel(twice), "2")
    assert all(torch.equal(server.held[name], tensor) for name, tensor in twice.items())
    assert "begin_weight_update" not in server.calls
    (version,) = folder.iterdir()
    assert server.bodies[-3]["model_path"] == str(version) and (version / "model.safetensors").is_file()
    server.fails = {"update_weights_from_disk": [400]}
    with pytest.raises(SyncError, match=r"\(disk, version 3\), all tensors, in .*planned 400"):
        sync.push([worker], FakeModel(twice), "3")
    sync.push([worker], FakeModel(twice), "3")
    assert len(list(folder.iterdir())) == 1
    sync.close()
    sync.close()
    assert not folder.exists()


def test_the_trainers_address_as_a_server_sees_it() -> None:
    assert local_address("http://127.0.0.1:30000") == "127.0.0.1"
    assert local_address("http://localhost:30000") in ("127.0.0.1", "::1")
