"""From the responses of a step to the micro-batches of its optimizer steps."""

from __future__ import annotations

import torch

from megatron_bupo.config.train import TrainConfig
from megatron_bupo.data.packing import pack_for, split_mini_batches
from megatron_bupo.parallel.setup import ParallelState
from megatron_bupo.rl.advantage import Estimator, compute_advantages
from megatron_bupo.samples import MicroBatch, Rollout


def make_mini_batches(
    rollouts: list[Rollout], estimator: Estimator, config: TrainConfig, state: ParallelState
) -> list[list[MicroBatch]]:
    """For each optimizer step this data-parallel rank's micro-batches, with advantages and the engine's log-probs.

    Args:
        estimator: of rl.builtin.load_estimator.
    """
    advantages = compute_advantages(estimator, config.algorithm.advantage_estimator, rollouts).to(state.device)
    size = config.batch.global_batch_size or len(rollouts)
    max_tokens = config.batch.max_tokens_per_micro_batch
    mini_batches = [
        pack_for(state, responses, max_tokens, offset) for offset, responses in split_mini_batches(rollouts, size)
    ]
    for batch in (batch for batches in mini_batches for batch in batches):
        batch.columns.advantages = advantages[batch.responses][batch.segments]
        engine = [rollouts[index].rollout_logprobs for index in batch.responses]
        if None not in engine:  # replayed rollouts may lack them
            flat = [value for logprobs in engine for value in logprobs or ()]
            batch.columns.rollout_logprobs = torch.tensor(flat, dtype=torch.float32, device=state.device)
    return mini_batches
