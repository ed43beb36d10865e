"""The watch over an internal phase: how far training has taken the full policy from where the phase began.

In the paper 30 internal steps help Qwen3-4B, 50 hurt and 70 ruin it (arXiv 2512.19673). The watch keeps the numbers of
the phase's first step and compares later steps with them. A phase is all internal steps in a row, of any policies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_bupo.config.stop_bounds import StopBound
from megatron_bupo.data.rollout_files import read_rollouts, write_rollouts
from megatron_bupo.errors import UsageError
from megatron_bupo.samples import Rollout


@dataclass(frozen=True)
class PhaseNumbers:
    """The watched numbers of one step, before its update, by their names in metrics.jsonl.

    `entropy_full` and `kl_start` in nats a token, `response_len_mean` in tokens, `accuracy` from 0 to 1.
    """

    step: int
    entropy_full: float
    response_len_mean: float
    accuracy: float
    kl_start: float = 0.0


@dataclass(frozen=True)
class PhaseWatch:
    """Where an internal phase began: the numbers of its first step, and the probe.

    The probe is the first responses of that step. The full policy wrote them, and `rollout_logprobs` has its log-probs
    as the trainer computed them then. Scored again later, they give KL(start || now) without a second copy of the
    weights: the token mean of exp(d) - d - 1 with d = log-prob now - log-prob at the start (k3; Schulman,
    "Approximating KL divergence", 2020) is unbiased, because the tokens are samples of the start (without a top-p).
    """

    first: PhaseNumbers
    probe: list[Rollout]

    def crossed(self, now: PhaseNumbers, bounds: Sequence[StopBound]) -> str | None:
        """Why the phase ends, such as 'kl_start 0.31 above 0.1 (kl:0.1)', or None."""
        reasons = [_reason(bound, self.first, now) for bound in bounds]
        return "; ".join(reason for reason in reasons if reason is not None) or None

    def write(self, save: Path) -> None:
        """Write the probe to the run's folder: a run that goes on from a checkpoint reads it."""
        write_rollouts(_probe_file(save, self.first.step), self.probe)

    @classmethod
    def read(cls, save: Path, first: PhaseNumbers) -> PhaseWatch:
        """The watch over the phase that began with `first`; the probe is equal to the bit.

        Raises:
            UsageError: the probe is missing or broken.
        """
        try:
            return cls(first, read_rollouts(_probe_file(save, first.step)))
        except UsageError as error:
            raise UsageError(
                f"{error}: the watch over the internal phase needs it; put the file back, or go on with "
                "--monitor-responses 0"
            ) from error


def _probe_file(save: Path, step: int) -> Path:
    return save / f"watch_step_{step:06d}.jsonl"


def _reason(bound: StopBound, first: PhaseNumbers, now: PhaseNumbers) -> str | None:
    """The number that is over the bound, in words, or None."""
    if bound.name == "kl":
        size = now.kl_start
        told = f"kl_start {size:.4g} above {bound.limit:g}"
    elif bound.name == "entropy":
        size = abs(now.entropy_full - first.entropy_full)
        told = f"entropy_full {now.entropy_full:.4g}, {size:.4g} nats from the {first.entropy_full:.4g}"
    elif bound.name == "length":
        ratio = now.response_len_mean / first.response_len_mean
        size = max(ratio, 1 / ratio)
        times = f"{size:.4g} times" if ratio > 1 else f"1/{size:.4g} of"
        told = f"response_len_mean {now.response_len_mean:.4g}, {times} the {first.response_len_mean:.4g}"
    else:
        assert bound.name == "accuracy", bound
        size = first.accuracy - now.accuracy
        told = f"accuracy {now.accuracy:.4g}, {size:.4g} below the {first.accuracy:.4g}"
    if size <= bound.limit:  # False for NaN: then the policy is ruined
        return None
    return f"{told} ({bound})" if bound.name == "kl" else f"{told} of step {first.step} ({bound})"
