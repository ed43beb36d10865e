"""Launching, waiting for, reviving and ending servers, with a stub in the place of sglang."""

from __future__ import annotations

import dataclasses
import json
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_bupo.config.rollout import SGLangConfig
from megatron_bupo.errors import UsageError
from megatron_bupo.rollout.sglang.process import (
    API_KEY_VARIABLE,
    check_server_args,
    free_port,
    server_environment,
)
from megatron_bupo.rollout.sglang.servers import Servers, ServersError
from megatron_bupo.rollout.sglang.start import check_servers
from tests.unit.test_server_supervisor import HANG_S, alive, wait_for

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="servers are launched on Linux only")
ROOT = Path(__file__).parents[2]
KEY = "s3cret-key"

# A run that waits for a server that never becomes ready.
SLOW_START = textwrap.dedent(
    f"""
    import sys
    from pathlib import Path
    sys.path.insert(0, {str(ROOT)!r})
    from megatron_bupo.rollout.sglang.servers import Servers
    from megatron_bupo.config.rollout import SGLangConfig
    config = SGLangConfig(sglang_launch=True, sglang_args="--stub slow")
    Servers.start(config, "m", "fp32", 1, Path(sys.argv[1]), None)
    """
)


# Flags and environment.


@pytest.mark.parametrize("argument", ["--port", "--port=3", "--model", "--model-path", "--dt", "--api-key=x", "--hos"])
def test_flags_that_the_run_decides_are_refused(argument: str) -> None:
    with pytest.raises(UsageError, match=f"--sglang-args {argument}: the run gives"):
        check_server_args(["--tp", "2", argument, "x"], has_key=False)


def test_other_flags_pass() -> None:
    check_server_args(["--tp", "2", "--device", "cpu", "--config", "more.yaml", "--pp-size=1"], has_key=False)
    with pytest.raises(UsageError, match="SGLANG_API_KEY"):
        check_server_args(["--config", "more.yaml"], has_key=True)


def test_a_server_is_no_rank_of_the_training_job() -> None:
    base = {"RANK": "0", "MASTER_ADDR": "n1", "TORCHELASTIC_RUN_ID": "x", "PYTHONPATH": "/p", "SGLANG_API_KEY": "k"}
    base |= {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "0,1"}
    kept = server_environment(base, "4,5", own_python=True)
    assert set(kept) == {"PATH", "CUDA_VISIBLE_DEVICES", "PYTHONSAFEPATH", "PYTHONUNBUFFERED"}
    assert kept["CUDA_VISIBLE_DEVICES"] == "4,5"
    assert server_environment(base, None, own_python=False)["PYTHONPATH"] == "/p"


def test_a_free_port_can_be_bound() -> None:
    with socket.create_server(("127.0.0.1", free_port("127.0.0.1"))) as listener:
        assert 20000 <= listener.getsockname()[1] < 32000
    with pytest.raises(UsageError, match=r"--sglang-host 192\.0\.2\.1: no port"):
        free_port("192.0.2.1")


# Servers, with a stub in the place of sglang.


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> SGLangConfig:
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests" / "unit" / "stub_sglang"))
    monkeypatch.setenv("RANK", "0")
    return SGLangConfig(sglang_launch=True, sglang_start_timeout=300.0, sglang_restarts=2)


Start = Callable[..., Servers]
OTHERS: set[psutil.Process] = set()


@pytest.fixture
def start(config: SGLangConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Check flags and start servers, as `train` does; `stub` says what goes wrong. They are ended with the test."""
    started = []

    def start_servers(stub: str = "", key: str | None = None, **changes: Any) -> Servers:
        flags = f"--stub {stub} --marker {tmp_path / 'marker'}" if stub else ""
        changed = dataclasses.replace(config, **({"sglang_args": flags} | changes))
        with monkeypatch.context() as environment:
            environment.setenv(API_KEY_VARIABLE, key or "")
            check_servers(changed)
        started.append(Servers.start(changed, "some/model", "fp32", 5, tmp_path / "logs", key))
        return started[-1]

    yield start_servers
    for servers in started:
        servers.close()


def children() -> set[psutil.Process]:
    return {p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE}


@pytest.fixture(autouse=True)
def others() -> None:
    """Other tests of this process may have left helpers of theirs."""
    OTHERS.clear()
    OTHERS.update(children())


def nothing_runs() -> bool:
    """Whether all that the test started has ended."""
    return children() <= OTHERS


def test_servers_are_launched_and_ended(start: Start, tmp_path: Path) -> None:
    servers = start(sglang_num_servers=2, sglang_gpus=["4", "6,7"])
    first, second = servers.workers
    assert first.client.url != second.client.url
    assert first.name == f"server_0 ({first.client.url})"
    assert (first.info.version, first.info.tp_size) == ("0.5.23", 1)
    assert (first.version, first.checked) == (None, False)
    for index, (worker, gpus) in enumerate(zip(servers.workers, ["4", "6,7"], strict=True)):
        worker.client.get("/health", timeout_s=60)
        log = (tmp_path / "logs" / f"server_{index}.log").read_text()
        assert f"random_seed='{5 + index}'" in log
        environment = json.loads(log.partition("environment=")[2])
        assert environment["CUDA_VISIBLE_DEVICES"] == gpus
        assert "RANK" not in environment
    servers.close()
    servers.close()
    assert nothing_runs()


def test_the_key_reaches_only_the_server(start: Start, tmp_path: Path) -> None:
    servers = start(key=KEY)
    worker = servers.workers[0]
    assert worker.client.get("/model_info", timeout_s=60)["weight_version"] == worker.info.weight_version
    words = [word for p in psutil.Process().children(recursive=True) for word in p.cmdline()]
    assert KEY not in " ".join(words)
    log = (tmp_path / "logs" / "server_0.log").read_text()
    assert "api_key='********'" in log
    assert KEY not in log
    files = [Path(word) for word in words if word.endswith("key.yaml")]
    assert [(file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) for file in files] == [(0o600, 0o700)]
    servers.close()
    assert not files[0].parent.exists()


def test_a_wrong_key_is_said_at_once(start: Start) -> None:
    url = start(key=KEY).workers[0].client.url
    for key, found in (("other", "refused"), (None, "not set")):
        with pytest.raises(UsageError, match=f"asks for an API key.*{found}"):
            start(key=key, sglang_launch=False, sglang_url=[url])
    assert start(key=KEY, sglang_launch=False, sglang_url=[url]).workers[0].process is None


def give_less_time(servers: Servers) -> None:
    """From now on two seconds to become ready; the first start had what a loaded machine needs."""
    servers._config = dataclasses.replace(servers._config, sglang_start_timeout=2.0)


def test_a_server_that_dies_at_the_start_says_why(start: Start, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"ended while it started \(exit status 1\).*server_[01]\.log.*no memory left"):
        start("die", sglang_num_servers=2)
    assert nothing_runs()


def test_a_server_that_is_not_ready_in_time(start: Start, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"not ready after --sglang-start-timeout 1\.5 s; last: .*"):
        start("slow", sglang_start_timeout=1.5)
    assert nothing_runs()


@pytest.mark.parametrize("stub", ["port-once", "foreign"])
def test_a_port_of_another_process_is_not_used(start: Start, stub: str, tmp_path: Path) -> None:
    worker = start(stub).workers[0]
    worker.client.get("/health", timeout_s=60)
    assert worker.client.get("/model_info", timeout_s=60)["weight_version"] == worker.info.weight_version != "another"
    assert (tmp_path / "logs" / "server_0.log").read_text().count("server_args=") == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sglang_host": "0.0.0.0"}, "--sglang-host 0.0.0.0: anyone on this network"),
        ({"sglang_args": "--port 3"}, "--sglang-args --port: the run gives --port itself"),
        ({"sglang_args": "--dp-size 2"}, "runs with --dp-size 2, with which its weights cannot be updated"),
        ({"sglang_python": "/bin/false"}, "--sglang-python /bin/false: does not run"),
        ({"key": "-k"}, "SGLANG_API_KEY: give letters"),
    ],
)
def test_what_cannot_be_launched_is_refused(start: Start, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        start(**changes)


def test_a_python_without_sglang_is_refused(start: Start) -> None:
    with pytest.raises(UsageError, match="has no sglang; make sglang-env"):
        start(sglang_python=sys.executable)  # with a Python of its own, the stub's PYTHONPATH does not reach it


def test_given_servers_must_fit_the_trainer(start: Start) -> None:
    url = start().workers[0].client.url
    given = SGLangConfig(sglang_url=[url], sglang_start_timeout=300.0)
    with pytest.raises(UsageError, match="runs in float32, the trainer in bfloat16"):
        Servers.start(given, "m", "bf16", 1, None, None)
    unused = f"http://127.0.0.1:{free_port('127.0.0.1')}"
    with pytest.raises(UsageError, match=f"--sglang-url {unused}: not ready after .* 1 s; last: .*ConnectError"):
        Servers.start(SGLangConfig(sglang_url=[unused], sglang_start_timeout=1.0), "m", "fp32", 1, None, None)


def test_a_router_stands_before_its_workers(start: Start) -> None:
    urls = [worker.client.url for worker in start(sglang_num_servers=2).workers]
    router = start(sglang_args=f"--workers {' '.join(urls)}").workers[0].client.url
    (endpoint,) = start(sglang_launch=False, sglang_url=[router + "/"]).endpoints
    assert endpoint.client.url == router
    assert [(worker.client.url, worker.process) for worker in endpoint.workers] == [(url, None) for url in urls]
    with pytest.raises(
        UsageError, match=f"--sglang-url: {urls[1]} is given twice, or is also a worker of a given router"
    ):
        start(sglang_launch=False, sglang_url=[router, urls[1]])


def test_a_server_under_two_names_is_one(start: Start) -> None:
    url = start().workers[0].client.url
    other = url.replace("127.0.0.1", "localhost")
    for names in ([url, other], [url, url + "/"]):
        with pytest.raises(UsageError, match=f"--sglang-url: {url}( = {other})? is given twice"):
            start(sglang_launch=False, sglang_url=names)


def test_ctrl_c_ends_the_wait_and_the_server(config: SGLangConfig, tmp_path: Path) -> None:
    words = [sys.executable, "-c", SLOW_START, str(tmp_path)]
    # What a shell without job control starts in the background ignores Ctrl-C, and so would its children.
    run = subprocess.Popen(
        words,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    log = tmp_path / "server_0.log"
    wait_for(lambda: log.exists() and "server_args=" in log.read_text())
    below = psutil.Process(run.pid).children(recursive=True)
    assert len(below) == 2
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=HANG_S)
    assert "KeyboardInterrupt" in errors
    assert alive([process.pid for process in below]) == []


def test_a_recovered_server_is_a_new_one_within_its_budget(start: Start, tmp_path: Path) -> None:
    servers = start(sglang_num_servers=2)
    worker = servers.workers[0]
    worker.version, worker.checked = "3", True
    for _ in range(2):
        client, process, info = worker.client, worker.process, worker.info
        assert process is not None
        psutil.Process(process.pid).children()[0].kill()
        servers.recover(worker)
        assert worker.client is servers.endpoints[0].client is not client
        assert worker.process is not process
        assert worker.info.weight_version != info.weight_version
        assert (worker.version, worker.checked) == (None, False)
        worker.client.get("/health", timeout_s=60)
    with pytest.raises(ServersError, match=r"server_0 \(.*\) failed, and its --sglang-restarts 2 is used up"):
        servers.recover(worker)
    servers.recover(servers.workers[1])  # the others have theirs
    log = (tmp_path / "logs" / "server_0.log").read_text()
    assert [f"random_seed='{seed}'" in log for seed in (5, 7, 9)] == [True] * 3  # no noise is drawn twice


def test_a_server_that_dies_at_every_start_spends_the_budget(start: Start) -> None:
    servers = start("die-again")
    worker = servers.workers[0]
    with pytest.raises(
        ServersError, match=r"--sglang-restarts 2 is used up in this run; at its last start .*no memory"
    ):
        servers.recover(worker)
    assert worker.version is None
    assert nothing_runs()


def test_a_server_that_comes_too_late_is_not_left_behind(start: Start) -> None:
    servers = start("slow-again")
    give_less_time(servers)
    with pytest.raises(ServersError, match=r"did not come back: .*not ready after --sglang-start-timeout 2 s"):
        servers.recover(servers.workers[0])
    assert nothing_runs()


def test_a_server_is_not_recovered_after_the_end(start: Start) -> None:
    servers = start()
    servers.close()
    with pytest.raises(ServersError, match=r"did not come back: .*the run is ending"):
        servers.recover(servers.workers[0])
    assert nothing_runs()


def test_a_given_server_is_waited_for(start: Start) -> None:
    owner = start()
    given = start(sglang_launch=False, sglang_url=[owner.workers[0].client.url])
    worker = given.workers[0]
    worker.version, worker.checked = "3", True
    given.recover(worker)
    assert (worker.version, worker.checked) == (None, False)
    owner.close()
    give_less_time(given)
    with pytest.raises(ServersError, match=r"did not come back: .*not ready after"):
        given.recover(worker)


def test_a_router_is_waited_for(start: Start) -> None:
    urls = [worker.client.url for worker in start(sglang_num_servers=2).workers]
    owner = start(sglang_args=f"--workers {' '.join(urls)}")
    router = owner.workers[0].client.url
    servers = start(sglang_launch=False, sglang_url=[router])
    endpoint = servers.endpoints[0]
    servers.await_router(endpoint)
    endpoint.workers.pop()
    with pytest.raises(ServersError, match=f"router {router} came back with {urls[0]} {urls[1]}, not with {urls[0]};"):
        servers.await_router(endpoint)
    owner.close()
    give_less_time(servers)
    with pytest.raises(ServersError, match=f"router {router} did not come back: .*not ready after"):
        servers.await_router(endpoint)
