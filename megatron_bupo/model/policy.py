"""Log-probs and entropy of the responses under any policy of the model: `run_policy` is the one way to them.

Old, reference and current log-probs, the loss, `score` and the analysis all come here. Under pipeline parallelism the
functions run inside megatron-core's schedule: every stage returns its hidden state, the last one unembeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megatron_bupo.model.build import HiddenStateModel
from megatron_bupo.model.views import view_for
from megatron_bupo.ops.attention import PackedSequences
from megatron_bupo.ops.unembedding import logprob_and_entropy
from megatron_bupo.parallel.setup import ParallelState
from megatron_bupo.policy_spec import PolicySpec
from megatron_bupo.samples import MicroBatch


@dataclass
class PolicyOutput:
    """Per response row of one micro-batch: log-prob of the target and entropy, nats, fp32 [R] each."""

    logprobs: Tensor
    entropy: Tensor


# On the last stage, from an output: (loss sum, count, a value that the caller collects).
LossFunction = Callable[[MicroBatch, PolicyOutput], tuple[Tensor, Tensor, Any]]
# On the last stage, from its hidden state: the input of the schedule's loss function, and that function.
LastStage = Callable[[HiddenStateModel, Tensor, MicroBatch], tuple[Any, Callable[..., Any]]]


def unembedding_weight(model: HiddenStateModel) -> Tensor:
    """W of this tensor-parallel rank, [V_local, H], on the last stage; tied embeddings share it."""
    if model.share_embeddings_and_output_weights:
        return model.shared_embedding_or_output_weight()
    return model.output_layer.weight


def response_rows(model: HiddenStateModel, hidden: Tensor, batch: MicroBatch) -> Tensor:
    """The rows [R, H] that predict `batch`'s targets, of a hidden state [T, 1, H] ([T / TP, 1, H] under SP).

    What is computed from them is this tensor-parallel rank's share of their gradient: exactly one of the two region
    functions sums it.
    """
    if model.config.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
    rows = hidden.squeeze(1).index_select(0, batch.rows)
    return rows if model.config.sequence_parallel else copy_to_tensor_model_parallel_region(rows)


def unembed(
    model: HiddenStateModel, hidden: Tensor, batch: MicroBatch, temperature: float, vocab_size: int
) -> PolicyOutput:
    """Log-probs and entropies of `batch`'s targets from the hidden state [T, 1, H] ([T / TP, 1, H] under SP)."""
    logprobs, entropy = logprob_and_entropy(
        response_rows(model, hidden, batch),
        unembedding_weight(model),
        batch.targets,
        temperature=temperature,
        vocab_size=vocab_size,
        group=model.pg_collection.tp,
    )
    return PolicyOutput(logprobs, entropy)


def run_schedule(
    chunks: Sequence[HiddenStateModel],
    batches: Sequence[MicroBatch],
    spec: PolicySpec,
    state: ParallelState,
    last_stage: LastStage,
    *,
    forward_only: bool,
) -> list[Any]:
    """Run micro-batches through the model cut to the policy `spec`, under megatron-core's pipeline schedule.

    Under pipeline parallelism all micro-batches have one length. Forward only, nothing is recorded for autograd.

    Returns:
        On the last stage, per micro-batch, what the function from `last_stage` returns; elsewhere [].
    """
    views = [view_for(chunk, spec) for chunk in chunks]
    lengths = {len(batch.tokens) for batch in batches}
    assert state.pp_size == 1 or len(lengths) == 1, f"micro-batches of several lengths in a pipeline: {lengths}"

    def forward_step(data: Iterator[MicroBatch], view: HiddenStateModel) -> tuple[Any, Callable[..., Any] | None]:
        batch = next(data)
        # transformer-engine's rope and attention are kernels; megatron-core's own rope takes the lengths as numbers.
        sequences = PackedSequences.of(
            batch.cu_seqlens, batch.tokens.device, read_on_device=view.config.apply_rope_fusion
        )
        hidden = view(
            input_ids=batch.tokens[None],
            position_ids=None,  # rope counts from 0 in every packed sequence
            attention_mask=None,
            packed_seq_params=sequences,
        )
        return last_stage(view, hidden, batch) if view.post_process else (hidden, None)

    run = partial(
        get_forward_backward_func(),
        forward_step_func=forward_step,
        data_iterator=[iter(batches) for _ in views] if len(views) > 1 else iter(batches),
        model=views if len(views) > 1 else views[0],
        num_microbatches=len(batches),
        seq_length=len(batches[0].tokens),
        micro_batch_size=1,
    )
    if not forward_only:
        return run(forward_only=False)
    with torch.no_grad():
        return run(forward_only=True, collect_non_loss_data=True)


def run_policy(
    chunks: Sequence[HiddenStateModel],
    batches: Sequence[MicroBatch],
    spec: PolicySpec,
    state: ParallelState,
    *,
    temperature: float,
    vocab_size: int,
    loss_function: LossFunction | None = None,
) -> list[Any]:
    """Log-probs and entropies of micro-batches under the policy `spec`.

    With `loss_function` the backward runs too, and gradients accumulate where the parameters keep them.

    Returns:
        On the last stage, per micro-batch, the third value of `loss_function` or the PolicyOutput; elsewhere [].
    """

    def last_stage(view: HiddenStateModel, hidden: Tensor, batch: MicroBatch) -> tuple[Any, Callable[..., Any]]:
        output = unembed(view, hidden, batch, temperature, vocab_size)
        if loss_function is None:
            return output, lambda result, non_loss_data: result
        return hidden, lambda _: loss_function(batch, output)

    return run_schedule(chunks, batches, spec, state, last_stage, forward_only=loss_function is None)
