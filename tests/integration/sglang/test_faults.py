"""Real servers that are killed or stopped while they generate: every response comes, once, from the right weights."""

from __future__ import annotations

import copy
import signal
import threading
import time
from pathlib import Path

import pytest

from megatron_bupo.rollout.engine import Generation, SamplingParams, make_requests
from megatron_bupo.rollout.sglang.engine import SGLangEngine
from megatron_bupo.rollout.sglang.servers import Servers
from megatron_bupo.rollout.sglang.worker import Worker
from tests.integration.sglang.conftest import START_TIMEOUT_S, server_processes
from tests.integration.sglang.test_generation import HFModel, assert_matches, make_engine, make_prompts

PARAMS = SamplingParams(0.7, 0.9, 400, (), seed=1)  # long, and nothing ends them early
REQUESTS = make_requests(make_prompts(6), step=1, num_samples=4)
# From the first request on; all are sent then, and none is finished.
FAULT_AFTER_S = 0.5


def num_served(worker: Worker) -> int:
    """Responses since this server process started."""
    assert worker.process is not None
    return worker.process.log.read_text(errors="replace").count('POST /generate HTTP/1.1" 200')


def generate_with_fault(engine: SGLangEngine, victim: Worker, fault: signal.Signals) -> list[Generation]:
    """All responses; in the middle every process of the victim gets the signal."""
    done: list[int] = []
    done_before: list[int] = []
    processes = server_processes(victim)

    def inject() -> None:
        done_before.append(len(done))
        for process in processes if fault == signal.SIGSTOP else processes[:1]:
            process.send_signal(fault)

    timer = threading.Timer(FAULT_AFTER_S, inject)
    timer.start()
    answers = engine.generate(REQUESTS, PARAMS, done.append)
    timer.join()
    assert done_before == [0]
    assert done == [1] * len(REQUESTS)
    assert all(len(answer.tokens) == PARAMS.max_new_tokens for answer in answers)
    return answers


def update_until_back(engine: SGLangEngine, model: HFModel, version: str, victim: Worker) -> None:
    """Push the weights, again and again until the victim has them too."""
    deadline = time.monotonic() + START_TIMEOUT_S
    engine.update_weights(model, version)
    while victim.version is None:
        assert time.monotonic() < deadline
        time.sleep(1)
        engine.update_weights(model, version)


def test_killed_in_the_middle_the_other_does_its_work(servers: Servers, tiny_qwen3: Path) -> None:
    engine, model = make_engine(servers, tiny_qwen3), HFModel(tiny_qwen3, seed=11)
    engine.update_weights(model, "4")
    victim = servers.workers[0]
    answers = generate_with_fault(engine, victim, signal.SIGKILL)
    assert_matches(REQUESTS, answers, model, "4", temperature=0.7)
    # The next weights do not wait for it. When it is back it gets them as the other one does.
    model = HFModel(tiny_qwen3, seed=12)
    with pytest.warns(UserWarning, match=r"server server_0 .* was restarted as .* it had failed: it ended \(exit"):
        update_until_back(engine, model, "5", victim)
    before = [num_served(worker) for worker in servers.workers]
    answers = engine.generate(REQUESTS, PARAMS)
    assert_matches(REQUESTS, answers, model, "5", temperature=0.7)
    assert [num_served(worker) - old for worker, old in zip(servers.workers, before, strict=True)] == [12, 12]


def test_stopped_with_no_other_the_requests_wait_for_its_restart(servers: Servers, tiny_qwen3: Path) -> None:
    alone = copy.copy(servers)
    alone.endpoints = servers.endpoints[1:]
    engine, model = make_engine(alone, tiny_qwen3, health_timeout_s=10.0), HFModel(tiny_qwen3, seed=13)
    engine.update_weights(model, "6")
    victim = servers.workers[1]
    url = victim.client.url
    with pytest.warns(UserWarning, match=r"server server_1 .* was restarted as .* it had failed: .*/health"):
        answers = generate_with_fault(engine, victim, signal.SIGSTOP)
    assert victim.client.url != url and str(victim.version).endswith("-6")
    assert_matches(REQUESTS, answers, model, "6", temperature=0.7)
