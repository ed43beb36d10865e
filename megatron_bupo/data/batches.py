"""Micro-batches as a layout needs them."""

from __future__ import annotations

from megatron_bupo.data.packing import pack
from megatron_bupo.parallel.setup import ParallelState
from megatron_bupo.samples import MicroBatch, Rollout


def pack_for(state: ParallelState, rollouts: list[Rollout], max_tokens: int, offset: int = 0) -> list[MicroBatch]:
    """This data-parallel rank's micro-batches of one mini-batch, on its device.

    Sequence parallelism wants lengths that TP divides, a pipeline one length for all, virtual stages a number of
    micro-batches that PP divides.
    """
    every_rank = pack(
        rollouts,
        max_tokens=max_tokens,
        dp_size=state.dp_size,
        multiple=state.tp_size if state.sequence_parallel else 1,
        equal_length=state.pp_size > 1,
        group_count_multiple=state.pp_size if state.vpp_size > 1 else 1,
        offset=offset,
    )
    return [batch.to(state.device) for batch in every_rank[state.dp_rank]]
