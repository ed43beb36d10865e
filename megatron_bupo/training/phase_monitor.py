"""Watches the full policy while an internal one is trained, and ends the phase when a bound is crossed.

Before the update of every internal step, on the first --monitor-responses responses: the full policy's entropy, its
distance to the engine, and how far it has moved from where the phase began (watch.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from megatron_bupo.config.monitor import MonitorConfig
from megatron_bupo.model.parallel_model import ParallelModel
from megatron_bupo.model.scoring import Score, score_rollouts
from megatron_bupo.parallel.reduce import combine
from megatron_bupo.policy_spec import PolicySpec
from megatron_bupo.rl.schedule import PolicySchedule
from megatron_bupo.samples import Rollout
from megatron_bupo.training.metrics import MAXIMA, full_policy_metrics, means, observe, response_metrics
from megatron_bupo.training.watch import PhaseNumbers, PhaseWatch

FULL = PolicySpec()


class PhaseMonitor:
    """Decides which policy a step trains. Every rank has the same numbers, and so decides the same.

    Args:
        schedule: the run's, without the rest of phases that were ended early.
        max_tokens: of a micro-batch.
        ended: steps before which a phase was ended early.
        watch: of the internal phase that the run is in.
    """

    def __init__(
        self,
        config: MonitorConfig,
        schedule: PolicySchedule,
        model: ParallelModel,
        temperature: float,
        max_tokens: int,
        ended: tuple[int, ...] = (),
        watch: PhaseWatch | None = None,
    ) -> None:
        self._num_responses, self._bounds = config.monitor_responses, config.stop_bounds
        self._model, self._temperature, self._max_tokens = model, temperature, max_tokens
        self.schedule, self.ended, self.watch = schedule, ended, watch

    def policy_at(self, step: int, rollouts: list[Rollout]) -> tuple[PolicySpec, dict[str, Any]]:
        """The policy that a step trains, and in an internal phase the metrics of the full one. Collective."""
        if self.schedule.at(step).is_full:
            self.watch = None
            return FULL, {}
        metrics = self._measure(step, rollouts) if self._num_responses else {}
        if "internal_stop" in metrics:
            self.schedule = self.schedule.ended_before(step)
            self.ended, self.watch = (*self.ended, step), None
        return self.schedule.at(step), metrics

    def _measure(self, step: int, rollouts: list[Rollout]) -> dict[str, Any]:
        sample = rollouts[: self._num_responses]
        scores = self._score(sample)
        seen = _compare(sample, scores)
        # 0 in the first step of a phase, and where the mask leaves no token of the probe to compare.
        probed = {} if self.watch is None else _compare(self.watch.probe, self._score(self.watch.probe))
        kl_start = probed.get("logprob_diff_k3", 0.0)
        responses = response_metrics(rollouts)
        now = PhaseNumbers(step, seen["entropy"], responses["response_len_mean"], responses["accuracy"], kl_start)
        if self.watch is None:
            pairs = zip(sample, scores, strict=True)
            self.watch = PhaseWatch(now, [replace(one, rollout_logprobs=score.logprobs) for one, score in pairs])
        reason = self.watch.crossed(now, self._bounds)
        metrics = {**full_policy_metrics(seen), "kl_start": kl_start}
        return metrics if reason is None else {**metrics, "internal_stop": reason}

    def _score(self, rollouts: list[Rollout]) -> list[Score]:
        return score_rollouts(self._model, rollouts, FULL, self._temperature, self._max_tokens)


def _compare(rollouts: Sequence[Rollout], scores: Sequence[Score]) -> dict[str, float]:
    """Entropy of scored responses, and the distance of the scores to the log-probs that the responses came with."""
    total: dict[str, float] = {}
    for rollout, score in zip(rollouts, scores, strict=True):
        known = rollout.rollout_logprobs
        logprobs, entropy, mask = (torch.tensor(column) for column in (score.logprobs, score.entropy, rollout.mask))
        seen = observe(logprobs, entropy, mask, None if known is None else torch.tensor(known))
        combine(total, {name: float(value) for name, value in seen.items()}, MAXIMA)
    return means(total)
