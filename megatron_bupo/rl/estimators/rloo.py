"""R minus the mean reward of the other responses of the group (arXiv 2402.14740)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_bupo.rl.advantage import AdvantageInputs

if TYPE_CHECKING:
    from torch import Tensor

NAME, NEEDS_GROUPS, AGGREGATION = "rloo", True, None


def advantages(inputs: AdvantageInputs) -> Tensor:
    return inputs.by_group(lambda rewards: rewards - (rewards.sum() - rewards) / (len(rewards) - 1))
