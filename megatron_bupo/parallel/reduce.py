"""Numbers of the last stage's micro-batches, combined over micro-batches and data-parallel ranks, known everywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.distributed as dist
from torch import Tensor

from megatron_bupo.parallel.setup import ParallelState


def reduce_everywhere(
    state: ParallelState, collected: Sequence[Mapping[str, Tensor]], maxima: Sequence[str] = ()
) -> dict[str, float]:
    """Add up scalars by their names; of those in `maxima` the largest is taken. Collective.

    Args:
        collected: one mapping per micro-batch on the ranks of the last stage; ignored elsewhere.

    Returns:
        The same numbers on every rank, added in float64; a name that no micro-batch has is missing.
    """
    mine: dict[str, float] = {}
    for values in collected if state.reports else []:
        combine(mine, {name: float(value) for name, value in values.items()}, maxima)
    parts: list[dict[str, float]] = [{}] * state.world_size
    dist.all_gather_object(parts, mine, group=state.host_group)
    total: dict[str, float] = {}
    for part in parts:
        combine(total, part, maxima)
    return total


def combine(total: dict[str, float], values: Mapping[str, float], maxima: Sequence[str] = ()) -> None:
    """Count `values` into `total`: added, or for the names in `maxima` the larger one."""
    for name, value in values.items():
        held = total.get(name, value if name in maxima else 0.0)
        total[name] = max(held, value) if name in maxima else held + value
