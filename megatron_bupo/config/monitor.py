"""The flags of what is watched while a run trains."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_bupo.config.data_files import check_data_files, data_set_names
from megatron_bupo.config.stop_bounds import StopBound
from megatron_bupo.errors import UsageError
from megatron_bupo.flags import Group, flag


@dataclass(frozen=True)
class MonitorConfig(Group):
    """what is watched"""

    monitor_responses: int = flag(
        "responses whose full policy is watched in an internal phase, now and at its start; 0 = off", 64, low=0
    )
    internal_stop: list[str] | None = flag(
        "end an internal phase when one is crossed: kl:X nats above, entropy:X nats away from, length:X times or 1/X "
        "of, accuracy:X below where the phase began",
        None,
        metavar="NAME:X",
    )
    norms_interval: int = flag(
        "steps between measurements of update_norm and master_drift; 0 = never, and no memory is kept for them",
        1,
        low=0,
    )
    entropy_flow_interval: int | None = flag("steps between measurements of the entropy flow", None, low=1)
    entropy_flow_responses: int = flag("responses of a step whose entropy flow is measured", 64, low=1)
    logprob_diff_alarm: float = flag(
        "warn when logprob_diff_mean, the engine against the trainer, is above this many nats; 0 = never", 0.1, low=0
    )

    def check(self) -> None:
        super().check()
        names = [bound.name for bound in self.stop_bounds]
        if len(set(names)) < len(names):
            raise UsageError(f"--internal-stop {' '.join(self.internal_stop or [])}: give each name once")
        if self.internal_stop and self.monitor_responses == 0:
            raise UsageError("--internal-stop with --monitor-responses 0: nothing is watched; give 1 response or more")

    @property
    def stop_bounds(self) -> list[StopBound]:
        """When an internal phase is to end early."""
        return [StopBound.parse(text) for text in self.internal_stop or []]


@dataclass(frozen=True)
class EvalConfig(Group):
    """evaluation while training"""

    eval_data: list[str] | None = flag(
        "parquet or JSON-lines files with questions that are answered before the first step and after the last",
        None,
        metavar="FILE",
    )
    eval_interval: int | None = flag("steps between evaluations, in the middle of the run too", None, low=1)
    eval_n_samples: int = flag("responses to each question of --eval-data", 1, low=1)

    def check(self) -> None:
        super().check()
        check_data_files(self.eval_data, "eval_data")
        data_set_names("eval_data", self.eval_data)
        if self.eval_data is None and self.eval_interval is not None:
            raise UsageError(f"--eval-interval {self.eval_interval}: goes only with --eval-data FILE")
        if self.eval_data is None and self.eval_n_samples > 1:
            raise UsageError(f"--eval-n-samples {self.eval_n_samples}: goes only with --eval-data FILE")

    def due_after(self, step: int, last: int) -> bool:
        """Whether there is an evaluation after a step of a run that ends with step `last`; 0 is its beginning."""
        if self.eval_data is None:
            return False
        return step in (0, last) or (self.eval_interval is not None and step % self.eval_interval == 0)
