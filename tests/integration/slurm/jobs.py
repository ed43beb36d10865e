"""Jobs of the example scripts: submit, watch, hold, look at what they left."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import psutil

from megatron_bupo.analysis.plots import read_metrics
from tests.integration.slurm.cluster import ENDED, Cluster, wait_for

RUN, HOLD = "run", "hold"
ROOT = Path(__file__).resolve().parents[3]


class Training:
    """One run of the tiny model, through any number of starts of its job.

    Args:
        folder: has everything of this run and of no other: model, configuration, log, outputs.
        settings: the scripts' environment variables.
    """

    def __init__(self, cluster: Cluster, folder: Path, settings: dict[str, str]) -> None:
        self.cluster, self.folder, self.settings = cluster, folder, settings
        self.run, self.hold, self.log_file = folder / RUN, folder / HOLD, folder / "job.log"

    def submit(self, script: str, *flags: str, resources: tuple[str, ...] = (), **settings: str) -> str:
        """The job's number. `flags` go to train, `resources` to sbatch, `settings` replace some of the script's."""
        words = ["sbatch", "--parsable", "--output", str(self.log_file), *resources, f"examples/slurm/{script}", *flags]
        return self.cluster.ask(*words, env=self.settings | settings, cwd=ROOT)

    def log(self) -> str:
        return self.log_file.read_text() if self.log_file.exists() else ""

    def metrics(self) -> list[dict[str, float]]:
        return read_metrics(self.run) if (self.run / "metrics.jsonl").exists() else []

    def hold_after(self, step: int) -> None:
        """Let the run go on until it is in the rewards of the step after this one; `hold` removed, to its end."""
        self.hold.write_text(str(step))

    def wait(self, what: str, done: Callable[[], object], job: str) -> None:
        """Until `done()`; AssertionError with the log if the job ends before, or takes too long."""

        def is_done() -> bool:
            if done():
                return True
            state = self.cluster.state(job)
            assert state not in ENDED, f"the job ended ({state}) before: {what}\n{self.log()}"
            return False

        wait_for(what, is_done, self.log)

    def wait_for_step(self, step: int, job: str) -> None:
        """Until the run has its checkpoint of this step."""
        self.wait(f"step {step}", lambda: (self.run / f"iter_{step:07d}" / "run_state.json").exists(), job)

    def wait_for_end(self, job: str) -> str:
        """The state that the job ends in."""
        wait_for(f"the end of job {job}", lambda: self.cluster.state(job) in ENDED, self.log)
        return self.cluster.state(job)

    def start_again(self, job: str) -> None:
        """Wait until a requeued job is back in the queue, and let it start now and not in two minutes.

        Not at once: a node refuses a job whose end and new start are in the same second.
        """
        self.wait("the requeue", lambda: self.cluster.state(job) == "PENDING", job)
        listed = self.cluster.ask("squeue", "--jobs", job, "--noheader", "--format", "%i").split()
        for component in listed:
            self.cluster.ask("scontrol", "update", f"JobId={component}", "StartTime=now+2")

    def processes(self, program: str = "") -> list[psutil.Process]:
        """Those of this run, and of nobody else: their command lines name its folder (or the model in it).

        `program` is a word that they must have as well. Slurm's own daemons and steps are not among them.
        """
        return [
            process
            for process in psutil.process_iter(["name", "cmdline"])
            if any(f"{self.folder}/" in word for word in process.info["cmdline"] or [])
            and (not program or program in process.info["cmdline"])
            and not process.info["name"].startswith("slurm")
        ]

    def went_on_after(self) -> list[int]:
        """The steps after which the starts of this run went on, as its log tells."""
        return [int(step) for step in re.findall(r"iter_\d+: going on after step (\d+)", self.log())]
