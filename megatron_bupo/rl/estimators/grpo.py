"""(R - mean) / (std + 1e-6) within each group, with the unbiased standard deviation (arXiv 2512.19673)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_bupo.rl.advantage import AdvantageInputs, standardized

if TYPE_CHECKING:
    from torch import Tensor

NAME, NEEDS_GROUPS, AGGREGATION = "grpo", True, None


def advantages(inputs: AdvantageInputs) -> Tensor:
    return inputs.by_group(standardized)
