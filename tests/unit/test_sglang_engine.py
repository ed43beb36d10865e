"""The SGLang engine against fake servers that fail in every way: each request is answered once, by the right weights.

How real servers fail is tested in tests/integration/sglang.
"""

from __future__ import annotations

import random
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from megatron_bupo.errors import UsageError
from megatron_bupo.rollout.engine import Generation, GenerationRequest, SamplingParams, make_requests
from megatron_bupo.rollout.sglang.repair import EngineError
from megatron_bupo.rollout.sglang.requests import sampling_seeds
from megatron_bupo.rollout.sglang.servers import Endpoint
from megatron_bupo.samples import Prompt
from tests.unit.fake_sglang import FAULTS, HALF, fail_first
from tests.unit.sglang_stand_ins import MODEL, StandIns

PARAMS = SamplingParams(0.7, 0.9, 5, (), seed=3)


@pytest.fixture
def make() -> Iterator[Callable[[int], StandIns]]:
    made: list[StandIns] = []

    def build(count: int) -> StandIns:
        made.append(StandIns(count))
        return made[-1]

    def give_up(*_: Any) -> None:
        raise TimeoutError("the batch does not end")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield build
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    for one in made:
        one.may_revive.set()
        one.close()


def _requests(prompts: int, samples: int = 4) -> list[GenerationRequest]:
    return make_requests([Prompt(i, [i + 1, 40, 41], "") for i in range(prompts)], step=2, num_samples=samples)


def _check(requests: list[GenerationRequest], answers: list[Generation], version: str = "1") -> None:
    """Each answer is that of its request: its seed and its prompt are in the tokens."""
    seeds = sampling_seeds(PARAMS.seed, requests)
    for request, seed, answer in zip(requests, seeds, answers, strict=True):
        assert answer.tokens[:3] == [seed % HALF, seed // HALF, HALF + sum(request.prompt.tokens)]
        assert (answer.finish_reason, answer.weight_version, len(answer.logprobs)) == ("length", version, 5)


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
    requests, done = _requests(6), []

    def progress(number: int) -> None:
        done.append(number)
        if len(done) == 9 and not killed:
            killed.append(rng.choice(stand_ins.fakes))
            killed[0].kill()
            stand_ins.broken_pushes = rng.choice([0, 1])

    _check(requests, engine.generate(requests, PARAMS, progress))
    assert done == [1] * len(requests)
    # The next step begins as if nothing had happened, whatever the last one left behind.
    left.clear()
    engine.update_weights(MODEL, "2")
    assert all(worker.version == "2" for worker in stand_ins.workers)
    _check(requests, engine.generate(requests, PARAMS), version="2")


def test_load_is_spread_within_the_limit_and_samples_of_a_prompt_stay_together(
    make: Callable[[int], StandIns],
) -> None:
    stand_ins = make(2)
    for fake in stand_ins.fakes:
        fake.delay_s = 0.05
    engine = stand_ins.engine(concurrency=8)
    engine.update_weights(MODEL, "1")
    requests = _requests(12)
    _check(requests, engine.generate(requests, PARAMS))
    for fake in stand_ins.fakes:
        assert fake.most_at_once == 8
        assert 16 <= len(fake.requests) <= 32
        assert len({body["rid"] for body in fake.requests}) == len(fake.requests)
        prompts = [tuple(body["input_ids"]) for body in fake.requests[:8]]
        assert len(set(prompts)) == 2
    # A batch for which one server had room enough is for both.
    before = [len(fake.requests) for fake in stand_ins.fakes]
    engine.generate(_requests(1, samples=6), PARAMS)
    assert [len(fake.requests) - old for fake, old in zip(stand_ins.fakes, before, strict=True)] == [3, 3]
    # The quicker one does more.
    stand_ins.fakes[0].delay_s, before = 0.3, [len(fake.requests) for fake in stand_ins.fakes]
    engine.generate(_requests(12), PARAMS)
    slow, quick = (len(fake.requests) - old for fake, old in zip(stand_ins.fakes, before, strict=True))
    assert slow + quick == 48 and slow <= 16
    assert engine.generate([], PARAMS) == []


def test_a_dead_server_costs_no_attempt_and_comes_back_with_the_weights(make: Callable[[int], StandIns]) -> None:
    stand_ins = make(2)
    engine = stand_ins.engine(attempts=1)
    engine.update_weights(MODEL, "1")
    stand_ins.fakes[0].delay_s = 0.3  # some are in work when it dies
    stand_ins.fakes[1].delay_s = 0.1
    requests = _requests(12)
    timer = threading.Timer(0.15, stand_ins.fakes[0].kill)
    timer.start()
    with pytest.warns(UserWarning, match=r"server .* answers again: it had failed: .*Connect"):
        _check(requests, engine.generate(requests, PARAMS))
    assert stand_ins.events == [("push", [0, 1]), ("revive", [0]), ("push", [0])]
    assert stand_ins.fakes[0].version == "1" and not stand_ins.workers[0].client.url.endswith(":0")


def test_a_hung_server_is_found_without_waiting_for_the_request(make: Callable[[int], StandIns]) -> None:
    stand_ins = make(2)
    engine = stand_ins.engine(attempts=1, health_timeout_s=0.4)
    engine.update_weights(MODEL, "1")
    stand_ins.fakes[1].fault = fail_first(1, "hang")
    requests, started = _requests(6), time.monotonic()
    _check(requests, engine.generate(requests, PARAMS))
    assert time.monotonic() - started < 10  # the request itself may take 30 s
    assert ("revive", [1]) in stand_ins.events


def test_what_a_thawed_server_says_late_is_not_counted(make: Callable[[int], StandIns]) -> None:
    stand_ins = make(1)
    stand_ins.thaw = True
    engine = stand_ins.engine(attempts=1, health_timeout_s=0.4)
    engine.update_weights(MODEL, "1")
    stand_ins.fakes[0].fault = fail_first(1, "hang")
    requests, done = _requests(3), []
    _check(requests, engine.generate(requests, PARAMS, done.append))
    assert done == [1] * len(requests)
    assert len(stand_ins.fakes[0].requests) > len(requests)


def test_what_fails_at_one_server_is_asked_of_another(make: Callable[[int], StandIns]) -> None:
    stand_ins = make(2)
    engine = stand_ins.engine(attempts=2)
    engine.update_weights(MODEL, "1")

    def is_poison(body: Any) -> bool:
        return bool(body["input_ids"][0] == 3)

    stand_ins.fakes[0].fault = fail_first(1000, "garbage", chosen=is_poison)
    requests = _requests(6)
    _check(requests, engine.generate(requests, PARAMS))
    stand_ins.fakes[1].fault = fail_first(1000, "500", chosen=is_poison)
    with pytest.raises(
        EngineError, match=r"prompt 2 \(3 tokens\), sample \d: no usable answer in 2 attempts"
    ) as raised:
        engine.generate(requests, PARAMS)
    assert all(fake.url in str(raised.value) for fake in stand_ins.fakes)
    assert all(fake.calls["/abort_request"] == 1 for fake in stand_ins.fakes)


def test_a_server_that_fails_over_and_over_is_restarted_then_left_out(make: Callable[[int], StandIns]) -> None:
    stand_ins = make(2)
    engine = stand_ins.engine(attempts=50)
    engine.update_weights(MODEL, "1")
    stand_ins.fakes[0].fault = fail_first(1000, "abort")
    stand_ins.fakes[1].delay_s = 0.02
    requests = _requests(10, samples=8)
    stand_ins.unrevivable = {stand_ins.workers[0]}
    with pytest.warns(UserWarning, match="left out: .*gone for good.*failed 3 times in a row.* aborted"):
        _check(requests, engine.generate(requests, PARAMS))
    # It is out until the next weights, and is tried again then.
    before = len(stand_ins.fakes[0].requests)
    engine.generate(requests, PARAMS)
    assert len(stand_ins.fakes[0].requests) == before and stand_ins.events.count(("revive", [0])) == 1
    stand_ins.fakes[0].fault = fail_first(0, "abort")
    engine.update_weights(MODEL, "2")
    assert stand_ins.events[-1] == ("push", [0, 1])
    engine.generate(requests, PARAMS)
    assert len(stand_ins.fakes[0].requests) > before
    stand_ins.unrevivable, stand_ins.fakes[1].delay_s = set(), 0.1
    stand_ins.fakes[0].kill()
    engine.generate(requests, PARAMS)
    assert stand_ins.events[-2:] == [("revive", [0]), ("push", [0])]


def test_no_server_left_names_all_and_their_reasons(make: Callable[[int], StandIns]) -> None:
    stand_ins = make(2)
    engine = stand_ins.engine()
    engine.update_weights(MODEL, "1")
    stand_ins.unrevivable = set(stand_ins.workers)
    for fake in stand_ins.fakes:
        fake.kill()
    with pytest.raises(EngineError, match="no SGLang server is left: ") as raised:
        engine.generate(_requests(2), PARAMS)
    for fake in stand_ins.fakes:
        assert f"{fake.url}: {fake.url} is gone for good (it had failed: " in str(raised.value)
    with pytest.raises(EngineError, match="no SGLang server is left: "):
        engine.update_weights(MODEL, "2")


def test_answers_of_other_weights_are_not_used(make: Callable[[int], StandIns]) -> None:
    stand_ins = make(1)
    engine = stand_ins.engine()
    engine.update_weights(MODEL, "1")
    stand_ins.fakes[0].fault = fail_first(1, "stale")  # as if somebody had started it anew
    requests = _requests(4)
    with pytest.warns(UserWarning, match="was given the weights again: it holds weights 'default', not '1'"):
        _check(requests, engine.generate(requests, PARAMS))
    assert stand_ins.events == [("push", [0]), ("push", [0])]


def test_a_server_that_never_keeps_the_weights_is_lost_in_the_end(make: Callable[[int], StandIns]) -> None:
    stand_ins = make(1)
    engine = stand_ins.engine()
    engine.update_weights(MODEL, "1")
    stand_ins.fakes[0].fault = fail_first(1000, "stale")
    with pytest.raises(EngineError, match="it fails again after 5 repairs: it holds weights 'default', not '1'"):
        engine.generate(_requests(4), PARAMS)
    assert stand_ins.events == [("push", [0])] * 6


def test_a_refused_request_ends_the_batch_at_once(make: Callable[[int], StandIns]) -> None:
    stand_ins = make(2)
    engine = stand_ins.engine()
    engine.update_weights(MODEL, "1")
    stand_ins.fakes[0].delay_s = 20.0
    stand_ins.fakes[1].refusal = 400, "the input is longer than the model's context length"
    started = time.monotonic()
    with pytest.raises(UsageError, match=r"prompt \d \(3 tokens\), sample \d is refused: .*400 the input is longer"):
        engine.generate(_requests(4), PARAMS)
    assert time.monotonic() - started < 5
    assert all(fake.calls["/abort_request"] == 1 for fake in stand_ins.fakes)
    assert all(len(fake.requests) <= 8 for fake in stand_ins.fakes)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interrupt_stops_the_servers(make: Callable[[int], StandIns], error: type[BaseException]) -> None:
    stand_ins = make(2)
    engine = stand_ins.engine()
    engine.update_weights(MODEL, "1")
    stand_ins.fakes[0].delay_s = 20.0

    def interrupt(number: int) -> None:
        raise error

    started = time.monotonic()
    with pytest.raises(error):
        engine.generate(_requests(4), PARAMS, interrupt)
    assert time.monotonic() - started < 5
    assert all(fake.calls["/abort_request"] == 1 for fake in stand_ins.fakes)


def test_a_revival_outlives_its_batch_and_the_update_waits_for_it(make: Callable[[int], StandIns]) -> None:
    stand_ins = make(2)
    engine = stand_ins.engine()
    engine.update_weights(MODEL, "1")
    stand_ins.fakes[0].kill()
    stand_ins.may_revive.clear()
    requests = _requests(6)
    _check(requests, engine.generate(requests, PARAMS))
    _check(requests, engine.generate(requests, PARAMS))
    assert stand_ins.events == [("push", [0, 1]), ("revive", [0])]
    threading.Timer(0.2, stand_ins.may_revive.set).start()
    engine.update_weights(MODEL, "2")
    assert stand_ins.events[2:] == [("push", [0, 1])]
    _check(requests, engine.generate(requests, PARAMS), version="2")


def test_no_weights_are_sent_for_a_batch_that_has_ended(make: Callable[[int], StandIns]) -> None:
    stand_ins = make(2)
    engine = stand_ins.engine()
    engine.update_weights(MODEL, "1")
    stand_ins.fakes[0].kill()
    stand_ins.fakes[1].delay_s = 0.1
    requests, held_up = _requests(2), threading.Event()

    def hold_up(number: int) -> None:
        if not held_up.is_set():
            held_up.set()
            time.sleep(2)  # meanwhile all is answered, and the dead server is back and wants its weights

    _check(requests, engine.generate(requests, PARAMS, hold_up))
    assert stand_ins.events == [("push", [0, 1]), ("revive", [0])]


def test_an_update_is_whole_or_an_error(make: Callable[[int], StandIns]) -> None:
    stand_ins = make(2)
    engine = stand_ins.engine()
    with pytest.raises(AssertionError, match="update_weights comes first"):
        engine.generate(_requests(1), PARAMS)
    stand_ins.broken_pushes = 2
    with pytest.warns(UserWarning, match="weights 1 are sent again: .*bucket 2 did not arrive"):
        engine.update_weights(MODEL, "1")
    assert stand_ins.events == [("push", [0, 1])] * 3
    stand_ins.fakes[1].kill()
    engine.update_weights(MODEL, "2")
    assert stand_ins.events[3:] == [("revive", [1]), ("push", [0, 1])]
    stand_ins.broken_pushes, stand_ins.fakes[0].is_ill = 1, True  # it speaks, but generates no more
    engine.update_weights(MODEL, "2")
    assert stand_ins.events[5:] == [("push", [0, 1]), ("revive", [0]), ("push", [0, 1])]
    # Who is gone for good is left out; the others go on.
    stand_ins.fakes[1].kill()
    stand_ins.unrevivable = {stand_ins.workers[1]}
    engine.update_weights(MODEL, "3")
    assert stand_ins.workers[1].version is None
    _check(_requests(2), engine.generate(_requests(2), PARAMS), version="3")
    stand_ins.broken_pushes = 3
    with pytest.raises(EngineError, match=r"did not take weights 4 in 3 attempts: .*bucket 2"):
        engine.update_weights(MODEL, "4")
    engine.close()
    engine.close()


def test_behind_a_router_only_requests_go_to_it(make: Callable[[int], StandIns]) -> None:
    stand_ins = make(3)
    router, *workers = stand_ins.workers
    stand_ins.workers = workers
    stand_ins.endpoints = [Endpoint(workers, router=router.client)]
    engine = stand_ins.engine(concurrency=3)
    stand_ins.fakes[0].version, stand_ins.fakes[0].delay_s = "1", 0.05
    engine.update_weights(MODEL, "1")
    requests = _requests(6)
    stand_ins.fakes[0].fault = fail_first(1, "cut", chosen=lambda body: stand_ins.fakes[2].kill() is None)
    _check(requests, engine.generate(requests, PARAMS))
    assert set(stand_ins.fakes[0].calls) == {"/generate"} and stand_ins.fakes[0].most_at_once == 6
    assert stand_ins.events == [("push", [1, 2]), ("revive", [2]), ("push", [2])]
