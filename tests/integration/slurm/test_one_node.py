"""examples/slurm/one_node.sbatch on a real Slurm, with a real SGLang server on the CPU."""

from __future__ import annotations

import pytest

from tests.integration.slurm.cluster import wait_for
from tests.integration.slurm.jobs import Training


def test_a_preempted_job_goes_on_by_itself(training: Training) -> None:
    """A job of more priority takes all nodes. Afterwards the same job ends the run: every step once, none beside it."""
    training.hold_after(2)
    job = training.submit("one_node.sbatch")
    training.wait_for_step(2, job)
    training.cluster.ask("sbatch", "--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=true")
    training.wait("the requeue", lambda: training.cluster.state(job) == "PENDING", job)
    training.hold.unlink()
    # Two trainers in one folder would be the end of it; servers that stay would keep their GPUs.
    wait_for("the end of the first start", lambda: not training.processes())
    training.start_again(job)
    assert training.wait_for_end(job) == "COMPLETED", training.log()

    assert [step["step"] for step in training.metrics()] == [1, 2, 3, 4]
    assert max(step["logprob_diff_max"] for step in training.metrics()) < 1e-4
    assert "back to the queue" in training.log()
    assert training.went_on_after() == [2]
    assert len(list((training.run / "logs").glob("*/attempt_0/0/stdout.log"))) == 2  # of rank 0, for each start
    assert (training.run / "sglang" / "server_0.log").stat().st_size > 0
    wait_for("the end of the servers", lambda: not training.processes())


def test_a_server_that_cannot_start_ends_the_job(training: Training) -> None:
    job = training.submit("one_node.sbatch", SGLANG_ARGS="--no-such-flag")
    assert training.wait_for_end(job) == "FAILED"
    assert training.cluster.exit_code(job) == 1
    assert "server_0" in training.log()


@pytest.mark.parametrize(
    ("settings", "gpus", "told"),
    [
        ({}, 4, "2 process(es) on GPU 0,1, --sglang-num-servers 2 --sglang-gpus 2 3"),
        ({"TRAIN_PROCESSES": "1"}, 4, "1 process(es) on GPU 0, --sglang-num-servers 3 --sglang-gpus 1 2 3"),
        ({"SERVER_GPUS": "2"}, 4, "2 process(es) on GPU 0,1, --sglang-num-servers 1 --sglang-gpus 2,3"),
        ({}, 1, "1 GPU(s): too few for TRAIN_PROCESSES=0 and a server of SERVER_GPUS=1"),
    ],
)
def test_gpus_are_shared_out(training: Training, settings: dict[str, str], gpus: int, told: str) -> None:
    job = training.submit("one_node.sbatch", "--lr", "none", resources=(f"--gpus-per-node={gpus}",), **settings)
    assert training.wait_for_end(job) == "FAILED"
    assert told in training.log()
