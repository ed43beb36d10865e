"""Servers.start, recover and close with the real SGLang: readiness, real kills, nothing left over."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from megatron_bupo.errors import UsageError
from megatron_bupo.rollout.sglang.client import ServerError, SGLangClient
from megatron_bupo.rollout.sglang.servers import Servers
from megatron_bupo.rollout.sglang.worker import Worker
from tests.integration.sglang.conftest import ROOT, VOCAB_SIZE, launch_config, server_processes

KEY = "s3cret-key"
# A run that starts one server, with a key, says where it is, and waits to be killed.
RUN = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    from megatron_bupo.rollout.sglang.servers import Servers
    from tests.integration.sglang.conftest import launch_config
    python, model, folder, key = sys.argv[1:]
    servers = Servers.start(launch_config(Path(python)), model, "fp32", 1, Path(folder), key)
    Path(folder, "url.tmp").write_text(servers.workers[0].client.url)
    Path(folder, "url.tmp").rename(Path(folder, "url"))
    time.sleep(600)
    """
)


def generates(worker: Worker) -> bool:
    body = {"input_ids": [5, VOCAB_SIZE - 1], "sampling_params": {"max_new_tokens": 3, "ignore_eos": True}}
    return len(worker.client.post("/generate", body, timeout_s=60)["output_ids"]) == 3


def test_two_servers_are_ready(servers: Servers) -> None:
    assert len(servers.endpoints) == len(servers.workers) == 2
    assert len({worker.client.url for worker in servers.workers}) == 2
    for index, worker in enumerate(servers.workers):
        assert worker.name == f"server_{index} ({worker.client.url})"
        assert (worker.info.device, worker.info.tp_size, worker.info.is_deterministic) == ("cpu", 1, False)
        assert worker.info.max_input_tokens is not None and worker.info.max_input_tokens > 400
        assert generates(worker)
        kinds = [process.name() for process in server_processes(worker)]
        assert any(kind.startswith("sglang::schedul") for kind in kinds), kinds


def test_given_servers_are_the_same_from_outside(servers: Servers) -> None:
    urls = [worker.client.url for worker in servers.workers]
    given = launch_config(Path(sys.executable), sglang_launch=False, sglang_url=urls)
    found = Servers.start(given, "elsewhere", "fp32", 1, None, None)
    assert [worker.client.url for worker in found.workers] == urls
    assert [worker.info.version for worker in found.workers] == [worker.info.version for worker in servers.workers]
    found.close()
    assert all(generates(worker) for worker in servers.workers)
    with pytest.raises(UsageError, match="runs in float32, the trainer in bfloat16"):
        Servers.start(given, "elsewhere", "bf16", 1, None, None)


def test_a_killed_run_leaves_nothing_and_its_key_is_nowhere(
    sglang_python: Path, tiny_qwen3: Path, tmp_path: Path
) -> None:
    words = [sys.executable, "-c", RUN, str(sglang_python), str(tiny_qwen3), str(tmp_path), KEY]
    run = subprocess.Popen(words, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        while not (tmp_path / "url").exists():
            assert run.poll() is None and time.monotonic() < deadline, (tmp_path / "server_0.log").read_text()[-3000:]
            time.sleep(0.2)
        url = (tmp_path / "url").read_text()
        with pytest.raises(ServerError, match="401"):
            SGLangClient(url).get("/model_info", timeout_s=60)
        given = launch_config(Path(sys.executable), sglang_launch=False, sglang_url=[url])
        with pytest.raises(UsageError, match=f"{url} asks for an API key"):
            Servers.start(given, "elsewhere", "fp32", 1, None, "another")
        assert SGLangClient(url, KEY).get("/model_info", timeout_s=60)["model_path"] == str(tiny_qwen3)
        processes = psutil.Process(run.pid).children(recursive=True)
        assert len(processes) >= 4  # the supervisor, HTTP, a scheduler, a detokenizer
        assert KEY not in " ".join(word for process in processes for word in process.cmdline())
        log = (tmp_path / "server_0.log").read_text()
        assert "'api_key': '********'" in log
        assert KEY not in log
    finally:
        run.kill()
        run.wait()
    _, left = psutil.wait_procs(processes, timeout=300)
    assert left == []
    with pytest.raises(ServerError, match="ConnectError"):
        SGLangClient(url, KEY).get("/health", timeout_s=60)
