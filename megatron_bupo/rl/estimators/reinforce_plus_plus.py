"""(R - mean) / (std + 1e-6) over all responses of the step; groups play no part (arXiv 2501.03262)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_bupo.rl.advantage import AdvantageInputs, standardized, unless_equal

if TYPE_CHECKING:
    from torch import Tensor

NAME, NEEDS_GROUPS, AGGREGATION = "reinforce++", False, None


def advantages(inputs: AdvantageInputs) -> Tensor:
    return unless_equal(inputs.rewards, standardized)
