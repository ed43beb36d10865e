"""The training loop. `Trainer.step` is the algorithm on one screen: read it from the top."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_bupo.config.train import TrainConfig
from megatron_bupo.data.packing import pack_for, split_mini_batches
from megatron_bupo.data.rollout_files import step_file, write_rollouts
from megatron_bupo.errors import UsageError
from megatron_bupo.model.scoring import ModelForEngine, score_rollouts
from megatron_bupo.parallel.reduce import reduce_everywhere
from megatron_bupo.parallel.setup import ParallelState
from megatron_bupo.policy_spec import PolicySpec
from megatron_bupo.rl.advantages import advantages
from megatron_bupo.rl.losses import LossConfig
from megatron_bupo.rl.schedule import PolicySchedule, learning_rate
from megatron_bupo.rollout.source import RolloutSource
from megatron_bupo.samples import MicroBatch, Rollout
from megatron_bupo.training.actor import Actor
from megatron_bupo.training.flow_log import flow_of_step, log_flow
from megatron_bupo.training.metrics import (
    OBSERVED_MAXIMA,
    OBSERVED_SUMS,
    console_line,
    engine_alarm,
    full_policy_metrics,
    means,
    observe,
    response_metrics,
    rollout_metrics,
    update_metrics,
)
from megatron_bupo.training.tracker import Metrics, Tracker
from megatron_bupo.training.watch import PhaseNumbers, PhaseWatch

FULL = PolicySpec()


def loss_config(config: TrainConfig) -> LossConfig:
    """The loss of a run; dr-grpo brings its own aggregation."""
    algorithm = config.algorithm
    is_dr_grpo = algorithm.advantage_estimator == "dr-grpo"
    return LossConfig(
        clip_ratio_low=algorithm.clip_ratio_low,
        clip_ratio_high=algorithm.clip_ratio_high,
        dual_clip=algorithm.dual_clip,
        loss_aggregation="dr-grpo" if is_dr_grpo else algorithm.loss_aggregation,
        kl_loss_coef=algorithm.kl_loss_coef,
        kl_type=algorithm.kl_type,
        entropy_coef=algorithm.entropy_coef,
        max_response_len=config.rollout.rollout_max_response_len,
    )


class Trainer:
    """BuPO: GRPO on an internal policy for the first steps, then on the full one (or any other schedule).

    The rollouts are the full policy's in every phase; the ratios are the trained policy's, both sides recomputed here
    (arXiv 2512.19673, section 4).

    Args:
        ended: steps before which a phase of the schedule was ended early already; `schedule` is without the rest of it.
        watch: over the internal phase that the run is in.
    """

    def __init__(
        self,
        config: TrainConfig,
        schedule: PolicySchedule,
        actor: Actor,
        source: RolloutSource,
        state: ParallelState,
        tracker: Tracker | None,
        ended: tuple[int, ...] = (),
        watch: PhaseWatch | None = None,
    ) -> None:
        self.config, self.schedule, self.actor, self.source, self.state = config, schedule, actor, source, state
        self.tracker, self.ended, self.watch = tracker, ended, watch
        self.model_for_engine = ModelForEngine(actor, config.batch.max_tokens_per_micro_batch)
        self.loss = loss_config(config)
        self.temperature = config.rollout.rollout_temperature
        self._reference = actor.snapshot() if self.loss.kl_loss_coef else None
        self._seconds: dict[str, float] = {}

    def run(self, done: int = 0, save: Callable[[int], None] | None = None) -> None:
        """The steps after `done`, with a line on the console for each; `save` is called after those to keep."""
        last, interval = self.config.schedule.train_iters, self.config.run.save_interval
        with tqdm(total=last, initial=done, desc="train", unit="step", disable=self.state.rank > 0 or None) as bar:
            for step in range(done + 1, last + 1):
                metrics = self.step(step)
                if self.tracker is not None:
                    self.tracker.log(metrics)
                    if "internal_stop" in metrics:
                        bar.write(f"the internal phase ended before step {step}: {metrics['internal_stop']}")
                    bar.write(console_line(metrics, last))
                    alarm = engine_alarm(metrics, self.config.rollout.logprob_diff_alarm)
                    if alarm is not None:
                        bar.write(f"step {step:3d}/{last}  warning: {alarm}")
                bar.update()
                if save is not None and interval is not None and (step % interval == 0 or step == last):
                    save(step)

    def step(self, step: int) -> Metrics:
        """One rollout batch: generate, score, update, hand the weights to the engine."""
        started = time.perf_counter()
        self._seconds = {}
        with self._timed("norms"):
            before = self.actor.norms.snapshot()
        batch = self.source.rollouts(step)
        if self.config.rollout.save_rollouts and self.state.rank == 0:
            write_rollouts(step_file(self.config.rollout.save_rollouts, step), batch.rollouts)
        with self._timed("monitor"):
            spec, watched = self._policy(step, batch.rollouts)
        self._measure_flow(step, batch.rollouts)
        mini_batches = self._pack(batch.rollouts)
        with self._timed("old_logprobs"):
            scored = self._score_old(mini_batches, spec)
        lr = self._learning_rate(step)
        with self._timed("update"):
            updates = [self.actor.update(batches, spec, self.loss, lr, self.temperature) for batches in mini_batches]
        with self._timed("weight_sync"):
            self.source.update_weights(self.model_for_engine, version=str(step))
        with self._timed("norms"):
            movement = self._movement(before)
        seconds = batch.seconds | self._seconds | {"step": time.perf_counter() - started}
        return {
            "step": step,
            "phase": str(spec),
            **rollout_metrics(batch.rollouts, batch.reward_timeouts, seconds),
            **update_metrics(updates),
            "lr": lr,
            "entropy": scored["entropy"],
            **watched,
            **(full_policy_metrics(scored) if spec.is_full else {}),
            **movement,
        }

    def _policy(self, step: int, rollouts: list[Rollout]) -> tuple[PolicySpec, Metrics]:
        """The policy that this step trains, and in an internal phase what is seen of the full one before the update."""
        if self.schedule.at(step).is_full:
            self.watch = None
            return FULL, {}
        watched = self._watch_full_policy(step, rollouts)
        if "internal_stop" in watched:
            self.schedule = self.schedule.ended_before(step)
            self.ended, self.watch = (*self.ended, step), None
        return self.schedule.at(step), watched

    def _measure_flow(self, step: int, rollouts: list[Rollout]) -> None:
        """Every --entropy-flow-interval steps, of the weights that wrote the rollouts."""
        interval = self.config.run.entropy_flow_interval
        if interval is None or step % interval:
            return
        with self._timed("entropy_flow"):
            try:
                flow = flow_of_step(self.actor, rollouts, f"step {step}", self.config)
            except UsageError as error:  # the same on every rank; what only looks on ends no run
                if self.state.rank == 0:
                    warnings.warn(f"the entropy flow of step {step} was not measured: {error}", stacklevel=1)
                return
            if self.tracker is not None:
                save = self.config.run.save
                folder = None if save is None else Path(save) / "entropy_flow" / f"step_{step:06d}"
                log_flow(self.tracker, folder, step, flow)

    def _movement(self, before: list[Tensor]) -> Metrics:
        """How far the parameters went in this step, and how much of it bf16 hides from the engine."""
        drift = self.actor.norms.master_drift()
        norms = self.actor.norms.update_norms(before)
        return {
            **({} if drift is None else {"master_drift": drift}),
            **{f"update_norm/{part}": norm for part, norm in norms.items()},
        }

    def _pack(self, rollouts: list[Rollout]) -> list[list[MicroBatch]]:
        """Mini-batches of micro-batches of this data-parallel rank, with what the loss needs of every response."""
        rewards = [rollout.reward for rollout in rollouts]
        assert all(reward is not None for reward in rewards), "every response has a reward by now"
        values = advantages(
            [float(reward) for reward in rewards if reward is not None],
            [rollout.group for rollout in rollouts],
            self.config.algorithm.advantage_estimator,
        )
        size = self.config.batch.global_batch_size or len(rollouts)
        max_tokens = self.config.batch.max_tokens_per_micro_batch
        mini_batches = [
            pack_for(self.state, responses, max_tokens, offset)
            for offset, responses in split_mini_batches(rollouts, size)
        ]
        for batch in (batch for batches in mini_batches for batch in batches):
            chosen = values[batch.responses].to(self.state.device)
            batch.values["advantages"] = chosen[batch.segments]
            self._add_engine_logprobs(batch, rollouts)
        return mini_batches

    def _add_engine_logprobs(self, batch: MicroBatch, rollouts: list[Rollout]) -> None:
        """The engine's log-probs as a column; rollouts from elsewhere may lack them."""
        lists = [rollouts[index].rollout_logprobs for index in batch.responses]
        if all(logprobs is not None for logprobs in lists):
            flat = [value for logprobs in lists if logprobs is not None for value in logprobs]
            batch.values["rollout_logprobs"] = torch.tensor(flat, dtype=torch.float32, device=self.state.device)

    def _score_old(self, mini_batches: list[list[MicroBatch]], spec: PolicySpec) -> dict[str, float]:
        """Give every micro-batch its old (and reference) log-probs; what was seen of the policy on the way."""
        seen = [self._score(batches, spec, "old_logprobs") for batches in mini_batches]
        if self._reference is not None:
            with self.actor.weights_of(self._reference):
                for batches in mini_batches:
                    self._score(batches, spec, "ref_logprobs")
        return self._observed([sums for batches in seen for sums in batches])

    def _score(self, batches: list[MicroBatch], spec: PolicySpec, column: str) -> list[dict[str, Tensor]]:
        """Note the log-probs as a column of the micro-batches, on the last stage, which alone has outputs."""
        outputs = self.actor.score(batches, [spec], self.temperature)[spec]
        seen = []
        for batch, output in zip(batches if outputs else [], outputs, strict=True):
            batch.values[column] = output.logprobs
            seen.append(observe(batch, output))
        return seen

    def _watch_full_policy(self, step: int, rollouts: list[Rollout]) -> Metrics:
        """On the first responses: the full policy's entropy, its distance to the engine and to the phase's start.

        Every rank has the same numbers, and so the same reason to end the phase, if there is one.
        """
        sample = rollouts[: self.config.batch.monitor_responses]
        if not sample:
            return {}
        seen = self._full_policy(sample)
        # At its start a phase is where it began. No token of the probe may be trained: then nothing is compared.
        probed = {} if self.watch is None else self._full_policy(self.watch.probe)
        kl_start = probed.get("logprob_diff_k3", 0.0)
        responses = response_metrics(rollouts)
        now = PhaseNumbers(step, seen["entropy"], responses["response_len_mean"], responses["accuracy"], kl_start)
        if self.watch is None:
            self.watch = PhaseWatch(now, self._probe(sample))
        reason = self.watch.crossed(now, self.config.schedule.stop_bounds)
        metrics = {**full_policy_metrics(seen), "kl_start": kl_start}
        return metrics if reason is None else {**metrics, "internal_stop": reason}

    def _full_policy(self, rollouts: list[Rollout]) -> dict[str, float]:
        """The full policy's entropy, and its distance to the log-probs that the responses came with."""
        batches = pack_for(self.state, rollouts, self.config.batch.max_tokens_per_micro_batch)
        for batch in batches:
            self._add_engine_logprobs(batch, rollouts)
        return self._observed(self._score(batches, FULL, "full_logprobs"))

    def _probe(self, rollouts: list[Rollout]) -> list[Rollout]:
        """The responses with the full policy's log-probs of now."""
        max_tokens = self.config.batch.max_tokens_per_micro_batch
        scores = score_rollouts(self.actor, rollouts, FULL, self.temperature, max_tokens)
        return [
            replace(rollout, rollout_logprobs=score.logprobs) for rollout, score in zip(rollouts, scores, strict=True)
        ]

    def _observed(self, seen: list[dict[str, Tensor]]) -> dict[str, float]:
        return means(reduce_everywhere(self.state, seen, OBSERVED_SUMS, OBSERVED_MAXIMA))

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

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        """Seconds that a part of the step takes; on a GPU the queue is emptied before the clock is read."""
        started = time.perf_counter()
        yield
        if self.state.device.type == "cuda":
            torch.cuda.synchronize()
        self._seconds[part] = self._seconds.get(part, 0.0) + time.perf_counter() - started
