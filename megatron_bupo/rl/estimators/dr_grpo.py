"""R - mean within each group; the loss is a token sum over batch x max response length (arXiv 2503.20783)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_bupo.rl.advantage import AdvantageInputs

if TYPE_CHECKING:
    from torch import Tensor

NAME, NEEDS_GROUPS, AGGREGATION = "dr-grpo", True, "dr-grpo"


def advantages(inputs: AdvantageInputs) -> Tensor:
    return inputs.by_group(lambda rewards: rewards - rewards.mean())
