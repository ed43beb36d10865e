"""The SGLang engine while servers or a router are down: waits, updates without them, weights after a recovery."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from megatron_bupo.rollout.sglang.recovery import EngineError, Recovery
from megatron_bupo.rollout.sglang.worker import Endpoint
from tests.unit.fake_sglang import FakeServer, fail_first
from tests.unit.sglang_stand_ins import MODEL, OWNED, PARAMS, StandIns, check_answers, made_stand_ins, some_requests


@pytest.fixture
def make() -> Iterator[Callable[[int], StandIns]]:
    with made_stand_ins() as build:
        yield build


def test_a_server_that_fails_over_and_over_is_restarted_then_left_out(make: Callable[[int], StandIns]) -> None:
    stand_ins = make(2)
    engine = stand_ins.engine(attempts=50)
    engine.update_weights(MODEL, "1")
    stand_ins.fakes[0].fault = fail_first(1000, "abort")
    stand_ins.fakes[1].may_answer = lambda: ("recover", [0]) in stand_ins.events
    requests = some_requests(10, samples=8)
    stand_ins.unrecoverable = {stand_ins.workers[0]}
    with pytest.warns(UserWarning, match="left out: .*gone for good.*failed 3 times in a row.* aborted"):
        check_answers(requests, engine.generate(requests, PARAMS))
    # It is out until the next weights, and is tried again then.
    before = len(stand_ins.fakes[0].requests)
    engine.generate(requests, PARAMS)
    assert len(stand_ins.fakes[0].requests) == before and stand_ins.events.count(("recover", [0])) == 1
    stand_ins.fakes[0].fault = fail_first(0, "abort")
    engine.update_weights(MODEL, "2")
    assert stand_ins.events[-1] == ("push", [0, 1])
    engine.generate(requests, PARAMS)
    assert len(stand_ins.fakes[0].requests) > before
    stand_ins.unrecoverable = set()
    stand_ins.fakes[1].may_answer = lambda: stand_ins.events[-1] == ("push", [0])
    stand_ins.fakes[0].kill()
    engine.generate(requests, PARAMS)
    assert stand_ins.events[-2:] == [("recover", [0]), ("push", [0])]


def test_no_server_left_names_all_and_their_reasons(make: Callable[[int], StandIns]) -> None:
    stand_ins = make(2)
    engine = stand_ins.engine()
    engine.update_weights(MODEL, "1")
    stand_ins.unrecoverable = set(stand_ins.workers)
    for fake in stand_ins.fakes:
        fake.kill()
    with pytest.raises(EngineError, match="no SGLang server is left: ") as raised:
        engine.generate(some_requests(2), PARAMS)
    for fake in stand_ins.fakes:
        assert f"{fake.url}: {fake.url} is gone for good (it had failed: " in str(raised.value)
    with pytest.raises(EngineError, match="no SGLang server is left: "):
        engine.update_weights(MODEL, "2")


def test_a_failed_server_delays_no_other_and_gets_the_weights_when_it_is_back(make: Callable[[int], StandIns]) -> None:
    stand_ins = make(2)
    engine = stand_ins.engine()
    engine.update_weights(MODEL, "1")
    stand_ins.fakes[0].kill()
    stand_ins.may_recover.clear()
    requests = some_requests(6)
    check_answers(requests, engine.generate(requests, PARAMS))
    assert stand_ins.events == [("push", [0, 1]), ("recover", [0])]
    engine.update_weights(MODEL, "2")
    check_answers(requests, engine.generate(requests, PARAMS), version="2")
    assert stand_ins.events[2:] == [("push", [1])]
    # It is being recovered when a batch begins, and comes back in its middle.
    before = len(stand_ins.fakes[0].requests)
    stand_ins.fakes[1].fault = lambda body: stand_ins.may_recover.set()
    stand_ins.fakes[1].may_answer = lambda: len(stand_ins.fakes[0].requests) > before
    requests = some_requests(10)
    check_answers(requests, engine.generate(requests, PARAMS), version="2")
    assert stand_ins.events[3:] == [("push", [0])]
    # An update finds another one dead, and does not wait for it either.
    stand_ins.may_recover.clear()
    stand_ins.fakes[1].kill()
    engine.update_weights(MODEL, "3")
    assert sorted(stand_ins.events[4:]) == [("push", [0]), ("recover", [1])]


def test_only_servers_that_hold_one_version_get_what_changed_since(make: Callable[[int], StandIns]) -> None:
    stand_ins = make(2)
    engine = stand_ins.engine()
    for version in ("1", "2", "3"):
        engine.update_weights(MODEL, version)
    assert stand_ins.since == [None, "1", "2"]
    # One is restarted while responses are generated, another one behind the engine's back before an update.
    stand_ins.fakes[0].kill()
    stand_ins.fakes[1].may_answer = lambda: ("push", [0]) in stand_ins.events
    engine.generate(some_requests(4), PARAMS)
    engine.update_weights(MODEL, "4")
    assert stand_ins.since[3:] == [None, "3"]
    stand_ins.fakes[1].version = "default"
    engine.update_weights(MODEL, "5")
    # A push fails: what the servers hold is unknown, and all is sent again.
    stand_ins.broken_pushes = 1
    with pytest.warns(UserWarning, match="weights 6 are sent again"):
        engine.update_weights(MODEL, "6")
    assert stand_ins.since[5:] == [None, "5", None]


def test_a_recovery_under_way_is_not_begun_again(make: Callable[[int], StandIns]) -> None:
    stand_ins = make(1)
    recovery = Recovery(cast(Any, stand_ins), 2.0)
    stand_ins.may_recover.clear()
    under_way = recovery.recover(stand_ins.workers[0], "it hung")
    fault = recovery.diagnose(stand_ins.workers[0], "1")
    assert fault is not None and fault.under_way is under_way


def test_no_weights_are_sent_for_a_batch_that_has_ended(make: Callable[[int], StandIns]) -> None:
    stand_ins = make(2)
    engine = stand_ins.engine()
    engine.update_weights(MODEL, "1")
    first, second = stand_ins.fakes
    first.kill()
    # What the dead server was asked for is answered when that server is back and wants its weights.
    second.delay_s = 0.1
    second.may_answer = lambda: len(second.requests) <= 4 or ("recover", [0]) in stand_ins.events
    requests, before = some_requests(2), second.num_connections

    def hold_up(number: int) -> None:
        while second.num_connections > before:  # the batch closes its connections at its end
            time.sleep(0.01)

    check_answers(requests, engine.generate(requests, PARAMS, hold_up))
    assert stand_ins.events == [("push", [0, 1]), ("recover", [0])]


def test_an_update_is_whole_or_an_error(make: Callable[[int], StandIns]) -> None:
    stand_ins = make(2)
    engine = stand_ins.engine()
    with pytest.raises(AssertionError, match="update_weights comes first"):
        engine.generate(some_requests(1), PARAMS)
    stand_ins.broken_pushes = 1
    with pytest.warns(UserWarning, match="weights 1 are sent again: .*bucket 2 did not arrive"):
        engine.update_weights(MODEL, "1")
    assert stand_ins.events == [("push", [0, 1])] * 2
    # A server that cannot recover is left out; the others go on.
    stand_ins.fakes[1].kill()
    stand_ins.unrecoverable = {stand_ins.workers[1]}
    engine.update_weights(MODEL, "3")
    assert stand_ins.workers[1].version is None
    check_answers(some_requests(2), engine.generate(some_requests(2), PARAMS), version="3")
    engine.close()
    engine.close()


def test_the_only_server_is_waited_for(make: Callable[[int], StandIns]) -> None:
    stand_ins = make(1)
    engine = stand_ins.engine(health_timeout_s=2.0)
    stand_ins.fakes[0].kill()
    engine.update_weights(MODEL, "2")
    assert stand_ins.events == [("recover", [0]), ("push", [0])]
    stand_ins.broken_pushes, stand_ins.fakes[0].is_unhealthy = 1, True  # it answers, but cannot generate
    engine.update_weights(MODEL, "2")
    assert stand_ins.events[2:] == [("push", [0]), ("recover", [0]), ("push", [0])]
    stand_ins.broken_pushes = 3
    with pytest.raises(EngineError, match=r"did not take weights 4 in 3 attempts: .*bucket 2"):
        engine.update_weights(MODEL, "4")
    stand_ins.workers[0].process, stand_ins.broken_pushes, before = OWNED, 2, len(stand_ins.events)
    engine.update_weights(MODEL, "5")
    assert stand_ins.events[before:] == [("push", [0]), ("push", [0]), ("recover", [0]), ("push", [0])]


@pytest.mark.parametrize("is_owned", [False, True])
def test_a_server_that_takes_no_weights_is_left_out_of_the_update(
    make: Callable[[int], StandIns], is_owned: bool
) -> None:
    stand_ins = make(4)
    engine = stand_ins.engine()
    bad = stand_ins.workers[1:3]  # more failures than an update may have, but those of two servers
    stand_ins.refuses_pushes = set(bad)
    stand_ins.may_recover.clear()
    if is_owned:
        for worker in bad:
            worker.process = OWNED
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine.update_weights(MODEL, "1")
    pushes = [event for event in stand_ins.events if event[0] == "push"]
    assert pushes == [("push", [0, 1, 2, 3])] * 2 + [("push", [0, 2, 3])] * 2 + [("push", [0, 3])]
    assert [event for event in stand_ins.events if event[0] == "recover"] == [
        ("recover", [1]),
        ("recover", [2]),
    ] * is_owned
    for worker in bad:
        left_out = [one for one in caught if f"{worker.name} is left out: it failed 2 times" in str(one.message)]
        assert len(left_out) == (not is_owned)
    requests = some_requests(6)
    check_answers(requests, engine.generate(requests, PARAMS))
    assert not stand_ins.fakes[1].requests and not stand_ins.fakes[2].requests
    # The next update tries those that were given up again.
    if not is_owned:
        stand_ins.refuses_pushes = set()
        engine.update_weights(MODEL, "2")
        assert stand_ins.events[-1] == ("push", [0, 1, 2, 3])


def _behind_a_router(stand_ins: StandIns) -> FakeServer:
    """The first of the servers as the router of the others; it says that it has their weights."""
    router, *stand_ins.workers = stand_ins.workers
    stand_ins.endpoints = [Endpoint(stand_ins.workers, router=router.client)]
    return stand_ins.fakes[0]


def test_behind_a_router_only_requests_go_to_it(make: Callable[[int], StandIns]) -> None:
    stand_ins = make(3)
    router = _behind_a_router(stand_ins)
    engine = stand_ins.engine(concurrency=3)
    engine.update_weights(MODEL, "1")
    router.version, router.may_answer = stand_ins.fakes[1].version, lambda: router.most_at_once == 6
    requests = some_requests(6)
    router.fault = fail_first(1, "cut", chosen=lambda body: stand_ins.fakes[2].kill() is None)
    check_answers(requests, engine.generate(requests, PARAMS))
    assert set(router.calls) == {"/generate", "/health"} and router.most_at_once == 6
    assert stand_ins.events == [("push", [1, 2]), ("recover", [2]), ("push", [2])]


def test_a_router_that_is_down_is_not_blamed_on_its_servers(make: Callable[[int], StandIns]) -> None:
    stand_ins = make(3)
    router = _behind_a_router(stand_ins)
    engine = stand_ins.engine(attempts=1)
    engine.update_weights(MODEL, "1")
    router.version = stand_ins.fakes[1].version
    requests = some_requests(6)
    router.fault = fail_first(1, "cut", chosen=lambda body: len(router.requests) >= 3 and router.kill() is None)
    with pytest.warns(UserWarning, match="router .* answers again: it had failed: .*/health: Connect"):
        check_answers(requests, engine.generate(requests, PARAMS))
    assert stand_ins.events == [("push", [1, 2]), ("router", [])]
    # One that says itself that something is wrong is there: its servers are looked at.
    router.is_unhealthy = True
    router.fault = fail_first(1, "cut", chosen=lambda body: stand_ins.fakes[2].kill() is None)
    check_answers(requests, engine.generate(requests, PARAMS))
    assert stand_ins.events[2:] == [("recover", [2]), ("push", [2])]
    stand_ins.router_is_lost = True
    router.kill()
    with pytest.raises(EngineError, match=r"no SGLang server is left: .*the router is gone for good \(it had failed: "):
        engine.generate(requests, PARAMS)
    assert stand_ins.events[4:] == [("router", [])]
