"""The whole logits of a short text, under any policy and in any layout: for checks, never for training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_bupo.model.build import HiddenStateModel
from megatron_bupo.model.policy import run_schedule, unembedding_weight
from megatron_bupo.parallel.setup import ParallelState
from megatron_bupo.policy_spec import PolicySpec
from megatron_bupo.samples import MicroBatch


def policy_logits(
    chunks: Sequence[HiddenStateModel], tokens: Tensor, spec: PolicySpec, state: ParallelState, vocab_size: int
) -> Tensor | None:
    """Logits [S, V] of the token ids [S] on the last stage's ranks, in the model's dtype; None elsewhere. A collective.

    S must be a multiple of TP under sequence parallelism.
    """
    empty = torch.zeros(0, dtype=torch.int64)
    cu_seqlens = torch.tensor([0, len(tokens)], dtype=torch.int32)
    batch = MicroBatch(tokens, cu_seqlens, empty, empty, empty, empty.float(), []).to(state.device)

    def last_stage(view: HiddenStateModel, hidden: Tensor, batch: MicroBatch) -> tuple[Tensor, Callable[..., Any]]:
        if view.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden)
        part = (hidden.squeeze(1) @ unembedding_weight(view).T).contiguous()
        parts = [torch.empty_like(part) for _ in range(state.tp_size)]
        dist.all_gather(parts, part, group=state.tp_group)
        return torch.cat(parts, dim=1)[:, :vocab_size], lambda logits, non_loss_data: logits

    # Virtual stages want a multiple of PP micro-batches.
    outputs = run_schedule(chunks, [batch] * state.pp_size, spec, state, last_stage, forward_only=True)
    return outputs[0] if outputs else None
