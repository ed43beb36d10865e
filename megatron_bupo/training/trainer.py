"""One training step: `Trainer.step` is the algorithm on one screen, read it from the top."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch

from megatron_bupo.config.train import TrainConfig
from megatron_bupo.data.rollout_files import step_file, write_rollouts
from megatron_bupo.model.scoring import ModelForEngine
from megatron_bupo.parallel.reduce import reduce_everywhere
from megatron_bupo.policy_spec import PolicySpec
from megatron_bupo.rl.builtin import load_estimator
from megatron_bupo.rl.objective import taken_name
from megatron_bupo.rl.schedule import learning_rate
from megatron_bupo.rollout.source import RolloutSource
from megatron_bupo.samples import MicroBatch, Rollout
from megatron_bupo.training.actor import Actor, make_objective
from megatron_bupo.training.details import write_details
from megatron_bupo.training.flow_log import measure_flow
from megatron_bupo.training.metrics import (
    MAXIMA,
    full_policy_metrics,
    loss_metrics,
    means,
    observe,
    rollout_metrics,
)
from megatron_bupo.training.mini_batches import make_mini_batches
from megatron_bupo.training.phase_monitor import PhaseMonitor
from megatron_bupo.training.tracker import Metrics, Tracker


class Trainer:
    """BuPO: GRPO on an internal policy for the first steps, then on the full one (or any other schedule).

    The rollouts are the full policy's in every phase; the ratios are the trained policy's, both sides recomputed here
    (arXiv 2512.19673, section 4).

    Args:
        monitor: has the schedule, and says which policy a step trains.
        tracker: on the first rank, None elsewhere.

    Raises:
        UsageError: a loss or an estimator of the user's that cannot be loaded.
    """

    def __init__(
        self, config: TrainConfig, monitor: PhaseMonitor, actor: Actor, source: RolloutSource, tracker: Tracker | None
    ) -> None:
        self.config, self.monitor, self.actor, self.source, self.tracker = config, monitor, actor, source, tracker
        self.state = actor.state
        self.model_for_engine = ModelForEngine(actor, config.batch.max_tokens_per_micro_batch)
        self.estimator = load_estimator(config.algorithm.advantage_estimator)
        self.objective = make_objective(config.algorithm, config.rollout.rollout_max_response_len)
        self.temperature = config.rollout.rollout_temperature
        self._reference = actor.snapshot() if self.objective.needs_reference else None
        self._seconds: dict[str, float] = {}

    def step(self, step: int) -> Metrics:
        """Take one step: generate, score, update, send the weights to the engine. Returns its metrics. Collective."""
        started = time.perf_counter()
        self._seconds = {}
        self.actor.norms.begin(step)
        batch = self.source.rollouts(step)
        self._keep_rollouts(step, batch.rollouts)
        with self._timed("monitor"):
            spec, watched = self.monitor.policy_at(step, batch.rollouts)
        if self._flow_is_due(step):
            with self._timed("entropy_flow"):
                measure_flow(self.actor, batch.rollouts, step, self.config, self.tracker)
        mini_batches = make_mini_batches(batch.rollouts, self.estimator, self.config, self.state)
        with self._timed("old_logprobs"):
            self._score(mini_batches, spec)
        lr = self._learning_rate(step)
        with self._timed("update"):
            updates = [
                self.actor.update(batches, spec, self.objective, lr, self.temperature) for batches in mini_batches
            ]
        if folder := self.config.debug.dump_details:
            write_details(folder, step, batch.rollouts, list(chain(*mini_batches)), self.state)
        old = self._means_of_old(mini_batches)
        with self._timed("norms"):
            movement = self.actor.norms.movement()
        with self._timed("weight_sync"):
            self.send_weights(str(step))
        seconds = batch.seconds | self._seconds | {"step": time.perf_counter() - started}
        metrics = {
            "step": step,
            "phase": str(spec),
            **rollout_metrics(batch.rollouts, batch.reward_timeouts, seconds),
            "loss": [update.loss for update in updates],
            "grad_norm": [update.grad_norm for update in updates],
            "lr": lr,
            "entropy": old["entropy"],
            **watched,
            **(full_policy_metrics(old) if spec.is_full else {}),
            **movement,
        }
        reported = loss_metrics(updates)
        if taken := metrics.keys() & reported.keys():
            raise taken_name(self.objective.name, min(taken))
        return metrics | reported

    def send_weights(self, version: str) -> None:
        """Give the engine the present weights, by a name that no other weights of the run have. Collective."""
        self.actor.name_weights(version)
        self.source.update_weights(self.model_for_engine, version)

    def _score(self, mini_batches: list[list[MicroBatch]], spec: PolicySpec) -> None:
        """Give the micro-batches their old log-probs, and the reference's where the objective needs them.

        Those of the first mini-batch come from its own update: until then no optimizer step is taken, and its forward
        computes them anyway. Its ratios are exactly 1.
        """
        for batch, output in self._scored(mini_batches[1:], spec):
            batch.columns.keep_old(output.logprobs, output.entropy)
        if self._reference is not None:
            with self.actor.weights_of(self._reference):
                for batch, output in self._scored(mini_batches, spec):
                    batch.columns.ref_logprobs = output.logprobs

    def _means_of_old(self, mini_batches: list[list[MicroBatch]]) -> dict[str, float]:
        """The `means` of the policy from the start of the step, on every rank. Collective."""
        columns = [(batch.mask, batch.columns) for batches in mini_batches for batch in batches]
        seen = [
            observe(column.old_logprobs, column.old_entropy, mask, column.rollout_logprobs)
            for mask, column in columns
            if column.old_logprobs is not None and column.old_entropy is not None  # the last stage
        ]
        return means(reduce_everywhere(self.state, seen, MAXIMA))

    def _scored(self, mini_batches: list[list[MicroBatch]], spec: PolicySpec) -> Iterator[tuple[MicroBatch, Any]]:
        """Every micro-batch with the policy's output; nothing on a stage before the last."""
        for batches in mini_batches:
            outputs = self.actor.score(batches, [spec], self.temperature)[spec]
            yield from zip(batches if outputs else [], outputs, strict=True)

    def _learning_rate(self, step: int) -> float:
        optimizer = self.config.optimizer
        return learning_rate(
            step,
            lr=optimizer.lr,
            min_lr=optimizer.min_lr,
            lr_decay_style=optimizer.lr_decay_style,
            lr_warmup_iters=optimizer.lr_warmup_iters,
            train_iters=self.config.schedule.train_iters,
        )

    def _flow_is_due(self, step: int) -> bool:
        interval = self.config.monitor.entropy_flow_interval
        return interval is not None and step % interval == 0

    def _keep_rollouts(self, step: int, rollouts: list[Rollout]) -> None:
        folder = self.config.rollout.save_rollouts
        if folder and self.state.rank == 0:
            write_rollouts(step_file(folder, step), rollouts)
        if self.tracker is not None:
            self.tracker.log_samples(rollouts, step)

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        """Add the seconds that a part of the step takes; on a GPU its kernels are waited for."""
        started = time.perf_counter()
        yield
        if self.state.device.type == "cuda":
            torch.cuda.synchronize()
        self._seconds[part] = self._seconds.get(part, 0.0) + time.perf_counter() - started
