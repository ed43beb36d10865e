"""The SGLang engine against fake servers that fail in every way: each request is answered once, by the right weights.

How real servers fail is tested in tests/integration/sglang.
"""

from __future__ import annotations

import random
import resource
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from megatron_bupo.errors import UsageError
from megatron_bupo.rollout.sglang.recovery import EngineError
from tests.unit.fake_sglang import FAULTS, fail_first
from tests.unit.sglang_stand_ins import MODEL, PARAMS, StandIns, check_answers, made_stand_ins, some_requests


@pytest.fixture
def make() -> Iterator[Callable[[int], StandIns]]:
    with made_stand_ins() as build:
        yield build


@pytest.mark.parametrize("seed", range(8))
def test_random_faults_lose_no_request_and_answer_none_twice(make: Callable[[int], StandIns], seed: int) -> None:
    rng = random.Random(seed)
    stand_ins = make(rng.choice([1, 2, 3]))
    engine = stand_ins.engine(concurrency=rng.choice([1, 3, 8]), attempts=100, health_timeout_s=0.4)
    lock, left, killed = threading.Lock(), [rng.choice(FAULTS) for _ in range(rng.choice([2, 5, 8]))], []

    def draw(body: Any) -> str | None:
        with lock:
            return left.pop() if left and rng.random() < 0.3 else None

    for fake in stand_ins.fakes:
        fake.fault, fake.delay_s = draw, 0.01
    stand_ins.broken_pushes = rng.choice([0, 1])
    engine.update_weights(MODEL, "1")
    requests, done = some_requests(6), []

    def progress(number: int) -> None:
        done.append(number)
        if len(done) == 9 and not killed:
            killed.append(rng.choice(stand_ins.fakes))
            killed[0].kill()
            stand_ins.broken_pushes = rng.choice([0, 1])

    check_answers(requests, engine.generate(requests, PARAMS, progress))
    assert done == [1] * len(requests)
    # The next step begins as if nothing had happened, whatever the last one left behind.
    left.clear()
    engine.update_weights(MODEL, "2")
    assert any(str(worker.version).endswith("-2") for worker in stand_ins.workers)
    check_answers(requests, engine.generate(requests, PARAMS), version="2")


def test_a_request_that_hangs_at_a_healthy_server_is_asked_again(make: Callable[[int], StandIns]) -> None:
    stand_ins = make(2)
    once, over = fail_first(1, "slow"), threading.Event()
    stand_ins.fakes[0].fault = lambda body: over.wait() and None if once(body) else None
    engine = stand_ins.engine(request_timeout_s=3.0, attempts=50)
    engine.update_weights(MODEL, "1")
    requests = some_requests(6)
    check_answers(requests, engine.generate(requests, PARAMS))
    over.set()  # until now the first request had no answer
    assert stand_ins.events == [("push", [0, 1])], "and so no server is brought back"


def test_load_is_spread_within_the_limit_and_samples_of_a_prompt_stay_together(
    make: Callable[[int], StandIns],
) -> None:
    stand_ins = make(2)
    for fake in stand_ins.fakes:
        fake.delay_s, fake.may_answer = 0.2, lambda fake=fake: fake.most_at_once == 8
    engine = stand_ins.engine(concurrency=8)
    engine.update_weights(MODEL, "1")
    requests = some_requests(12)
    check_answers(requests, engine.generate(requests, PARAMS))
    for fake in stand_ins.fakes:
        assert fake.most_at_once == 8
        assert 16 <= len(fake.requests) <= 32
        assert len({body["rid"] for body in fake.requests}) == len(fake.requests)
        prompts = [tuple(body["input_ids"]) for body in fake.requests[:8]]
        assert len(set(prompts)) == 2
    # A batch for which one server had room enough is for both.
    before = [len(fake.requests) for fake in stand_ins.fakes]
    engine.generate(some_requests(1, samples=6), PARAMS)
    assert [len(fake.requests) - old for fake, old in zip(stand_ins.fakes, before, strict=True)] == [3, 3]
    # The quicker one does more: here all that the other one was not asked for at first.
    slow, quick = stand_ins.fakes
    num_slow, num_quick = len(slow.requests), len(quick.requests)
    slow.delay_s = quick.delay_s = 0.0
    slow.may_answer = lambda: len(quick.requests) == num_quick + 40
    engine.generate(some_requests(12), PARAMS)
    assert (len(slow.requests) - num_slow, len(quick.requests) - num_quick) == (8, 40)
    assert engine.generate([], PARAMS) == []


def test_a_dead_server_costs_no_attempt_and_comes_back_with_the_weights(make: Callable[[int], StandIns]) -> None:
    stand_ins = make(2)
    engine = stand_ins.engine(attempts=1)
    engine.update_weights(MODEL, "1")
    first, second = stand_ins.fakes
    # It dies while it works on several requests, and comes back before the other one has done all.
    first.fault = fail_first(1, "cut", chosen=lambda body: len(first.requests) >= 3 and first.kill() is None)
    second.may_answer = lambda: stand_ins.events[-1:] == [("push", [0])]
    requests = some_requests(12)
    with pytest.warns(UserWarning, match=r"server .* answers again: it had failed: .*Connect"):
        check_answers(requests, engine.generate(requests, PARAMS))
    assert stand_ins.events == [("push", [0, 1]), ("recover", [0]), ("push", [0])]
    assert stand_ins.fakes[0].version.endswith("-1") and not stand_ins.workers[0].client.url.endswith(":0")


def test_a_hung_server_is_found_without_waiting_for_the_request(make: Callable[[int], StandIns]) -> None:
    stand_ins = make(2)
    engine = stand_ins.engine(attempts=1, health_timeout_s=0.4)  # the request itself may take as long as a test
    engine.update_weights(MODEL, "1")
    stand_ins.fakes[1].fault = fail_first(1, "hang")
    requests = some_requests(6)
    check_answers(requests, engine.generate(requests, PARAMS))
    assert ("recover", [1]) in stand_ins.events


def test_what_a_thawed_server_says_late_is_not_counted(make: Callable[[int], StandIns]) -> None:
    stand_ins = make(1)
    stand_ins.thaw = True
    engine = stand_ins.engine(attempts=1, health_timeout_s=0.4)
    engine.update_weights(MODEL, "1")
    stand_ins.fakes[0].fault = fail_first(1, "hang")
    requests, done = some_requests(3), []
    check_answers(requests, engine.generate(requests, PARAMS, done.append))
    assert done == [1] * len(requests)
    assert len(stand_ins.fakes[0].requests) > len(requests)


def test_what_fails_at_one_server_is_asked_of_another(make: Callable[[int], StandIns]) -> None:
    stand_ins = make(2)
    engine = stand_ins.engine(attempts=2)
    engine.update_weights(MODEL, "1")

    def is_poison(body: Any) -> bool:
        return bool(body["input_ids"][0] == 3)

    stand_ins.fakes[0].fault = fail_first(1000, "garbage", chosen=is_poison)
    requests = some_requests(6)
    check_answers(requests, engine.generate(requests, PARAMS))
    stand_ins.fakes[1].fault = fail_first(1000, "500", chosen=is_poison)
    with pytest.raises(
        EngineError, match=r"prompt 2 \(3 tokens\), sample \d: no usable answer in 2 attempts"
    ) as raised:
        engine.generate(requests, PARAMS)
    assert all(fake.url in str(raised.value) for fake in stand_ins.fakes)
    assert all(fake.calls["/abort_request"] == 1 for fake in stand_ins.fakes)


def test_answers_of_other_weights_are_not_used(make: Callable[[int], StandIns]) -> None:
    stand_ins = make(1)
    engine = stand_ins.engine()
    engine.update_weights(MODEL, "1")
    stand_ins.fakes[0].fault = fail_first(1, "stale")  # as if it had been restarted
    requests = some_requests(4)
    with pytest.warns(UserWarning, match=r"was given the weights again: it holds weights 'default', not '\w+-1'"):
        check_answers(requests, engine.generate(requests, PARAMS))
    assert stand_ins.events == [("push", [0]), ("push", [0])]


def test_a_server_that_never_keeps_the_weights_is_lost_in_the_end(make: Callable[[int], StandIns]) -> None:
    stand_ins = make(1)
    engine = stand_ins.engine()
    engine.update_weights(MODEL, "1")
    stand_ins.fakes[0].fault = fail_first(1000, "stale")
    with pytest.raises(EngineError, match=r"fails again after 5 recoveries: it holds weights 'default', not '\w+-1'"):
        engine.generate(some_requests(4), PARAMS)
    assert stand_ins.events == [("push", [0])] * 6


def test_a_refused_request_ends_the_batch_at_once(make: Callable[[int], StandIns]) -> None:
    stand_ins = make(2)
    engine = stand_ins.engine()
    engine.update_weights(MODEL, "1")
    stand_ins.fakes[0].may_answer = lambda: False
    stand_ins.fakes[1].refusal = 400, "the input is longer than the model's context length"
    with pytest.raises(UsageError, match=r"prompt \d \(3 tokens\), sample \d is refused: .*400 the input is longer"):
        engine.generate(some_requests(4), PARAMS)
    assert all(fake.calls["/abort_request"] == 1 for fake in stand_ins.fakes)
    assert all(len(fake.requests) <= 8 for fake in stand_ins.fakes)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interrupt_stops_the_servers(make: Callable[[int], StandIns], error: type[BaseException]) -> None:
    stand_ins = make(2)
    engine = stand_ins.engine()
    engine.update_weights(MODEL, "1")
    stand_ins.fakes[0].may_answer = lambda: False

    def interrupt(number: int) -> None:
        raise error

    with pytest.raises(error):
        engine.generate(some_requests(4), PARAMS, interrupt)
    assert all(fake.calls["/abort_request"] == 1 for fake in stand_ins.fakes)


def test_weights_of_another_run_at_the_same_step_are_not_taken(make: Callable[[int], StandIns]) -> None:
    stand_ins = make(1)
    engine, other = stand_ins.engine(), stand_ins.engine()
    engine.update_weights(MODEL, "1")
    held = stand_ins.workers[0].version
    other.update_weights(MODEL, "1")
    stand_ins.workers[0].version = held  # the other run is another process: this one knows nothing of it
    requests = some_requests(2)
    check_answers(requests, engine.generate(requests, PARAMS))
    assert stand_ins.fakes[0].version == held and stand_ins.events == [("push", [0])] * 3


def test_sockets_stay_within_the_open_files(make: Callable[[int], StandIns], monkeypatch: pytest.MonkeyPatch) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 1000), hard))
    try:
        make(1).engine()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    stand_ins = make(2)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (265, 265))
    with pytest.warns(UserWarning, match=r"--sglang-concurrency 40: lowered to 4; .* 265 files \(ulimit -n\)"):
        engine = stand_ins.engine(concurrency=40)
    for fake in stand_ins.fakes:
        fake.may_answer = lambda fake=fake: fake.most_at_once == 4
    engine.update_weights(MODEL, "1")
    engine.generate(some_requests(4, samples=8), PARAMS)
    assert [fake.most_at_once for fake in stand_ins.fakes] == [4, 4]
