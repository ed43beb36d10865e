"""examples/slurm/several_nodes.sbatch on a real Slurm: two training nodes, a rollout node with a real SGLang server."""

from __future__ import annotations

import re
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from tests.integration.slurm.cluster import HANG_S, wait_for
from tests.integration.slurm.jobs import Training

LAYOUT = ("--nodes=2", ":", "--nodes=1")
PP2 = ("--pipeline-model-parallel-size", "2", "--sglang-health-timeout", "20")


def test_two_pipeline_stages_and_a_server(training: Training) -> None:
    """The server is killed, then the job is requeued; the run ends with every step once, and with it the server."""
    training.hold_after(1)
    job = training.submit("several_nodes.sbatch", *PP2, resources=LAYOUT)
    training.wait_for_step(1, job)
    (server,) = training.processes("sglang.launch_server")
    command = " ".join(server.cmdline())
    host, port = re.findall(r"servers at (\w+):(\d+)", training.log())[0]
    assert f"--host {host} --port {port} " in command
    with pytest.raises(HTTPError, match="401"):  # it wants the key
        urlopen(f"http://127.0.0.1:{port}/model_info", timeout=HANG_S)
    server.kill()
    training.hold_after(2)
    training.wait_for_step(2, job)
    training.cluster.ask("scontrol", "requeue", job)
    training.start_again(job)
    training.hold.unlink()
    assert training.wait_for_end(job) == "COMPLETED", training.log()

    assert [step["step"] for step in training.metrics()] == [1, 2, 3, 4]
    assert max(step["logprob_diff_max"] for step in training.metrics()) < 1e-4
    assert training.went_on_after() == [2]
    assert f"the server at {host}:{port} ended" in training.log()
    for node in ("node1", "node2"):
        assert len(list((training.run / "logs" / node).glob("*/attempt_0/0/stdout.log"))) == 2  # one for each start
    # No command line had the key, and nobody else can read it.
    log = training.run / "sglang" / f"server_{host}.log"
    keys = set(re.findall(r"api_key'?[:=] ?'(\w+)'", log.read_text()))
    assert keys, "the servers had no key"
    assert not any(key in command or key in training.log() for key in keys)
    assert (training.run / "sglang").stat().st_mode & 0o077 == 0
    assert not list(training.run.glob(".servers-*"))
    wait_for("the end of the server", lambda: not training.processes())


def test_servers_that_are_lost_end_the_job(training: Training) -> None:
    """A "server" that says its flags and ends; on the way: every node's GPUs reach what runs there."""
    gpus = ("--gpus-per-node=2", ":", "--gpus-per-node=4")
    job = training.submit("several_nodes.sbatch", resources=gpus, SGLANG_PYTHON="/bin/echo", SERVER_RESTARTS="1")
    assert training.wait_for_end(job) == "FAILED"
    assert training.cluster.exit_code(job) == 1
    assert "2 process(es) on each of node1," in training.log()
    assert len(re.findall("the server at node2:.* ended", training.log())) == 2
    assert "had its SERVER_RESTARTS=1: the job ends" in training.log()
    flags = (training.run / "sglang" / "server_node2.log").read_text().splitlines()
    assert len(flags) == 2 and all(" --tp 4 " in line for line in flags)


@pytest.mark.parametrize(
    ("script", "settings", "flags", "told"),
    [
        ("one_node", {"CONFIG": ""}, (), r"one_node.sbatch: CONFIG=: not there, seen from /.*"),
        ("several_nodes", {"CONFIG": "no.yaml"}, (), r"several_nodes.sbatch: CONFIG=no.yaml: not there, .*"),
        ("several_nodes", {"HF_MODEL": "/no"}, (), r"several_nodes.sbatch: HF_MODEL=/no: not there, .*"),
        ("several_nodes", {"DTYPE": "bf16"}, (), r".*DTYPE=bf16: must be bfloat16 or float32"),
        ("one_node", {}, ("--hf-model", "/no"), r"megatron-bupo: error: --hf-model /no: .*"),
        ("several_nodes", {}, ("--pipeline-model-parallel-size", "2"), r"megatron-bupo: error: 1 process\(es\) for .*"),
    ],
)
def test_what_is_wrong_ends_the_job_with_one_line(
    training: Training, script: str, settings: dict[str, str], flags: tuple[str, ...], told: str
) -> None:
    job = training.submit(f"{script}.sbatch", *flags, resources=(), **settings)
    assert training.wait_for_end(job) == "FAILED"
    assert training.cluster.exit_code(job) == 2
    lines = [line for line in training.log().splitlines() if ": start 1 of job" not in line]
    assert len(lines) == 1 and re.fullmatch(told, lines[0]), training.log()
    assert not training.run.exists()
