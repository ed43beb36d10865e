"""The metrics of a step, by their names in metrics.jsonl and TensorBoard."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from megatron_bupo.rl.advantage import num_zero_spread_groups
from megatron_bupo.rl.divergence import logprob_difference
from megatron_bupo.samples import Rollout
from megatron_bupo.training.actor import UpdateResult

MAXIMA = ("logprob_diff_max",)
"""Of what `observe` returns these are combined by their maximum, the others are added up."""


def observe(logprobs: Tensor, entropy: Tensor, mask: Tensor, rollout_logprobs: Tensor | None) -> dict[str, Tensor]:
    """Sums over the trained tokens (mask above 0) of columns [R], and how far the engine is from the trainer.

    The numbers of the engine are missing where its log-probs are not known.
    """
    trained = mask > 0
    sums = {"entropy": entropy[trained].double().sum(), "num_tokens": trained.sum()}
    if rollout_logprobs is None:
        return sums
    difference = logprob_difference(rollout_logprobs, logprobs, mask)
    return sums | {**difference, "num_tokens": sums["num_tokens"], "num_compared": difference["num_tokens"]}


def means(observed: dict[str, float]) -> dict[str, float]:
    """Token means of the sums from `observe`; the difference to the engine only where there were tokens to compare."""
    result = {"entropy": observed["entropy"] / max(observed["num_tokens"], 1)}
    if observed.get("num_compared"):
        result["logprob_diff_mean"] = observed["logprob_diff"] / observed["num_compared"]
        result["logprob_diff_max"] = observed["logprob_diff_max"]
        result["logprob_diff_k3"] = observed["logprob_diff_k3"] / observed["num_compared"]
    return result


def full_policy_metrics(seen: dict[str, float]) -> dict[str, float]:
    """The full policy's numbers from `means`, by their names in metrics.jsonl."""
    engine = {name: value for name, value in seen.items() if name.startswith("logprob_diff")}
    return {"entropy_full": seen["entropy"], **engine}


def engine_alarm(metrics: dict[str, Any], bound: float) -> str | None:
    """The warning if the engine's log-probs differ from the trainer's by more than `bound` nats on average; 0 = never.

    >>> engine_alarm({"logprob_diff_mean": 0.25, "logprob_diff_max": 3.0}, bound=0.1)
    'the engine is 0.25 nats from the trainer on average (at most 3), above --logprob-diff-alarm 0.1'
    """
    mean = metrics.get("logprob_diff_mean")
    # Not `mean > bound`: NaN must warn too.
    if mean is None or bound == 0 or mean <= bound:
        return None
    return (
        f"the engine is {mean:.3g} nats from the trainer on average (at most {metrics['logprob_diff_max']:.3g}), "
        f"above --logprob-diff-alarm {bound:g}"
    )


def response_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Mean reward, accuracy (share of rewards of at least 1) and mean length in tokens."""
    rewards = [rollout.reward for rollout in rollouts if rollout.reward is not None]
    return {
        "reward_mean": sum(rewards) / len(rewards),
        "accuracy": sum(reward >= 1 for reward in rewards) / len(rewards),
        "response_len_mean": sum(len(rollout.response_tokens) for rollout in rollouts) / len(rollouts),
    }


def rollout_metrics(rollouts: Sequence[Rollout], timeouts: int, seconds: dict[str, float]) -> dict[str, Any]:
    """The metrics of a step that need its responses and times alone.

    `num_tokens` counts prompts and responses; `truncated_frac` the responses that ended by their length.
    """
    rewards = [float(rollout.reward) for rollout in rollouts if rollout.reward is not None]
    num_tokens = sum(rollout.num_tokens for rollout in rollouts)
    return {
        **response_metrics(rollouts),
        "truncated_frac": sum(rollout.finish_reason == "length" for rollout in rollouts) / len(rollouts),
        "zero_spread_groups": num_zero_spread_groups(rewards, [rollout.group for rollout in rollouts]),
        "reward_timeouts": timeouts,
        "num_tokens": num_tokens,
        "tokens_per_s": num_tokens / seconds["step"],
        **{f"time/{part}": value for part, value in seconds.items()},
    }


def loss_metrics(updates: Sequence[UpdateResult]) -> dict[str, float]:
    """What the loss reports, as means over the trained tokens of all optimizer steps of a step."""
    tokens = max(sum(update.sums["num_tokens"] for update in updates), 1)
    names = {name: None for update in updates for name in update.sums if name != "num_tokens"}
    return {name: sum(update.sums.get(name, 0.0) for update in updates) / tokens for name in names}


def console_lines(metrics: dict[str, Any], num_steps: int, alarm_above: float) -> Iterator[str]:
    """What is printed of a step: its numbers, why an internal phase ended before it, and an alarm (`engine_alarm`)."""
    step = metrics["step"]
    if "internal_stop" in metrics:
        yield f"the internal phase ended before step {step}: {metrics['internal_stop']}"
    yield console_line(metrics, num_steps)
    alarm = engine_alarm(metrics, alarm_above)
    if alarm is not None:
        yield f"step {step:3d}/{num_steps}  warning: {alarm}"


def console_line(metrics: dict[str, Any], num_steps: int) -> str:
    """The line on the console for one step.

    >>> console_line({"step": 3, "phase": "layer:2", "reward_mean": 0.5, "loss": [0.1, 0.3], "grad_norm": [1.0, 2.0],
    ...     "entropy": 1.25, "response_len_mean": 7.5, "tokens_per_s": 812.0, "time/step": 2.0}, 40)
    'step   3/40  layer:2   reward 0.500  loss 0.2000  grad 1.500  entropy 1.250  length 7.5  2.0 s, 812 tokens/s'
    """
    loss, grad_norm = (sum(metrics[name]) / len(metrics[name]) for name in ("loss", "grad_norm"))
    return (
        f"step {metrics['step']:3d}/{num_steps}  {metrics['phase']:<8}  reward {metrics['reward_mean']:.3f}  "
        f"loss {loss:.4f}  grad {grad_norm:.3f}  entropy {metrics['entropy']:.3f}  "
        f"length {metrics['response_len_mean']:.1f}  {metrics['time/step']:.1f} s, "
        f"{metrics['tokens_per_s']:.0f} tokens/s"
    )
