"""The whole logits of a short text, under any policy and in any layout: for checks, never for training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_bupo.model.build import HiddenStateModel
from megatron_bupo.model.policy import packed_sequences
from megatron_bupo.model.truncated import view_for
from megatron_bupo.parallel.setup import ParallelState
from megatron_bupo.policy_spec import PolicySpec
from megatron_bupo.samples import MicroBatch


@torch.no_grad()
def policy_logits(
    chunks: Sequence[HiddenStateModel], tokens: Tensor, spec: PolicySpec, state: ParallelState, vocab_size: int
) -> Tensor | None:
    """Logits [S, V] of the token ids [S] on the last stage's ranks, in the model's dtype; None elsewhere. A collective.

    S must be a multiple of TP under sequence parallelism.
    """
    views = [view_for(chunk, spec) for chunk in chunks]
    empty = torch.zeros(0, dtype=torch.int64)
    cu_seqlens = torch.tensor([0, len(tokens)], dtype=torch.int32)
    batch = MicroBatch(tokens, cu_seqlens, empty, empty, empty, empty.float(), []).to(state.device)
    # Virtual stages want a multiple of PP micro-batches.
    batches = [batch] * state.pp_size

    def forward_step(data: Iterator[MicroBatch], view: HiddenStateModel) -> tuple[Tensor, Callable[..., Any] | None]:
        batch = next(data)
        hidden = view(
            input_ids=batch.tokens[None],
            position_ids=None,
            attention_mask=None,
            packed_seq_params=packed_sequences(batch),
        )
        if not view.post_process:
            return hidden, None
        return _unembed(view, hidden, state, vocab_size), lambda logits, non_loss_data: logits

    outputs = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(batches) for _ in views] if len(views) > 1 else iter(batches),
        model=views if len(views) > 1 else views[0],
        num_microbatches=len(batches),
        seq_length=len(tokens),
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    return outputs[0] if outputs else None


def _unembed(view: HiddenStateModel, hidden: Tensor, state: ParallelState, vocab_size: int) -> Tensor:
    if view.config.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden)
    weight = view.shared_embedding_or_output_weight() if view.share_embeddings_and_output_weights else None
    part = hidden.squeeze(1) @ (view.output_layer.weight if weight is None else weight).T
    parts = [torch.empty_like(part) for _ in range(state.tp_size)]
    dist.all_gather(parts, part.contiguous(), group=state.tp_group)
    return torch.cat(parts, dim=1)[:, :vocab_size]
