"""What TensorBoard shows of a run beside its numbers: a first page, samples of the rollouts, flags to compare by."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megatron_bupo.samples import Rollout
from megatron_bupo.training.run_record import leaves

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

# The page "Custom Scalars": title of a chart -> the metrics in it.
FIRST_PAGE = {
    "reward and accuracy": ["reward_mean", "accuracy"],
    "evaluation (avg@n)": ["eval/.*/avg_at_n$"],
    "entropy, trained and full policy (nats)": ["entropy$", "entropy_full"],
    "response length (tokens)": ["response_len_mean"],
    "KL from the start of the internal phase (nats)": ["kl_start"],
    "engine against trainer (nats)": ["logprob_diff_mean", "logprob_diff_max"],
    "throughput (tokens/s)": ["tokens_per_s"],
    "trained layer (0: the full policy)": ["trained_layer"],
}
_SHOWN = 6000  # characters of a sample; of a longer one the beginning and the end
_METRICS = ("reward_mean", "accuracy")  # beside the flags on the page "HParams"


def add_first_page(board: SummaryWriter) -> None:
    """The charts of FIRST_PAGE, on the page "Custom Scalars"."""
    board.add_custom_scalars({"run": {title: ["Multiline", tags] for title, tags in FIRST_PAGE.items()}})


def add_flags(board: SummaryWriter, flags: Mapping[str, Any]) -> None:
    """The flags of a run, in groups as run.json has them, on the page "HParams", where runs are compared by them."""
    from torch.utils.tensorboard.summary import hparams

    values = {name: value if isinstance(value, bool | int | float) else str(value) for name, value in leaves(flags)}
    writer: Any = board.file_writer  # typed as None, which it is once the board is closed
    for summary in hparams(values, dict.fromkeys(_METRICS, 0.0)):
        writer.add_summary(summary)


def samples(rollouts: Sequence[Rollout], step: int) -> Iterator[tuple[str, str]]:
    """The best, the worst and a random response of a step, as (name, Markdown); the choice depends on the step."""
    by_reward = sorted(rollouts, key=lambda rollout: rollout.reward or 0.0)
    for name, rollout in (
        ("best", by_reward[-1]),
        ("worst", by_reward[0]),
        ("random", random.Random(step).choice(rollouts)),
    ):
        head = f"reward {rollout.reward}, {len(rollout.response_tokens)} tokens, answer {rollout.answer}"
        yield f"rollouts/{name}", "\n\n".join([head, _block(rollout.prompt or ""), _block(rollout.response or "")])


def _block(text: str) -> str:
    """Text as it stands, as an indented block of Markdown."""
    if len(text) > _SHOWN:
        half = _SHOWN // 2
        text = f"{text[:half]}\n[... {len(text) - _SHOWN} characters ...]\n{text[-half:]}"
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])
