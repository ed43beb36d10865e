"""Numbers of the last stage's micro-batches, combined over micro-batches and data-parallel ranks, known everywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bupo.parallel.setup import ParallelState


def reduce_everywhere(
    state: ParallelState,
    collected: Sequence[Mapping[str, Tensor]],
    sums: Sequence[str],
    maxima: Sequence[str] = (),
) -> dict[str, float]:
    """Add up the scalars named in `sums`, take the largest of those in `maxima` (which are >= 0).

    Args:
        collected: one mapping per micro-batch on the ranks of the last stage; ignored elsewhere.

    Returns:
        The same float64 numbers on every rank.
    """
    reporting = collected if state.reports else []
    total = torch.zeros(len(sums), dtype=torch.float64)
    largest = torch.zeros(len(maxima), dtype=torch.float64)
    for values in reporting:
        for index, name in enumerate(sums):
            total[index] += float(values[name])
        for index, name in enumerate(maxima):
            largest[index] = max(float(largest[index]), float(values[name]))
    dist.all_reduce(total)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return dict(zip([*sums, *maxima], [*total.tolist(), *largest.tolist()], strict=True))
