"""The trained model on its ranks: scoring, the update, and its weights in HuggingFace's names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from torch import Tensor

from megatron_bupo.architectures.architecture import Architecture
from megatron_bupo.architectures.table import table_for
from megatron_bupo.config.train import AlgorithmConfig, OptimizerConfig, ParallelConfig
from megatron_bupo.model.kernels import library_of
from megatron_bupo.model.parallel_model import ParallelModel
from megatron_bupo.model.policy import PolicyOutput, run_policy
from megatron_bupo.parallel.cpu import give_freed_memory_back
from megatron_bupo.parallel.reduce import reduce_everywhere
from megatron_bupo.parallel.setup import ParallelState
from megatron_bupo.policy_spec import PolicySpec
from megatron_bupo.rl.builtin import load_loss
from megatron_bupo.rl.loss import LossInputs
from megatron_bupo.rl.objective import Objective
from megatron_bupo.samples import MicroBatch
from megatron_bupo.training.norms import ParameterNorms
from megatron_bupo.training.optimizer import PhaseOptimizer, trains
from megatron_bupo.training.optimizer_state import OptimizerState, steps_of
from megatron_bupo.weights.hf_files import HFWeights
from megatron_bupo.weights.sharding import hf_tensors


@dataclass(frozen=True)
class UpdateResult:
    """One optimizer step: the minimised objective, the gradient norm before clipping, sums over the trained tokens."""

    loss: float
    grad_norm: float
    sums: dict[str, float]


def loss_inputs(batch: MicroBatch, output: PolicyOutput) -> LossInputs:
    """What the loss is given of a micro-batch whose columns are known, and of the trained policy's outputs."""
    columns = batch.columns
    assert columns.old_logprobs is not None and columns.advantages is not None, "a step scores before it updates"
    return LossInputs(
        logprobs=output.logprobs,
        entropy=output.entropy,
        old_logprobs=columns.old_logprobs,
        advantages=columns.advantages,
        response_mask=batch.mask > 0,
        tokens=batch.targets,
        segments=batch.segments,
        num_responses=len(batch.responses),
        ref_logprobs=columns.ref_logprobs,
        rollout_logprobs=columns.rollout_logprobs,
    )


def make_objective(algorithm: AlgorithmConfig, max_response_len: int) -> Objective:
    """What the flags say to minimise. Raises UsageError: a loss of the user's that cannot be loaded."""
    loss = load_loss(algorithm.loss, algorithm.losses)
    return Objective(loss, algorithm.loss, algorithm.objective, algorithm.aggregation, max_response_len)


class Actor(ParallelModel):
    """A ParallelModel that trains, under the policies of a schedule.

    Args:
        specs: every policy that the schedule trains; the optimizer's groups are cut along them.
        norms_interval: see ParameterNorms.
        steps: of a run that goes on, the steps taken on each parameter (RunState.optimizer_steps).
    """

    def __init__(
        self,
        arch: Architecture,
        weights: HFWeights,
        parallel: ParallelConfig,
        optimizer: OptimizerConfig,
        state: ParallelState,
        dtype: torch.dtype,
        specs: Sequence[PolicySpec],
        converted: Path | None = None,
        *,
        norms_interval: int = 1,
        steps: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(arch, weights, parallel, state, dtype, converted)
        self.dtype = dtype
        self._overlaps = optimizer.overlap_grad_reduce
        self._ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=optimizer.use_distributed_optimizer,
            overlap_grad_reduce=self._overlaps,
        )
        self._wrapped = [DistributedDataParallel(chunk.config, self._ddp_config, chunk) for chunk in self.chunks]
        if self._overlaps:  # in the last micro-batch alone
            waits = [chunk.no_sync for chunk in self._wrapped]
            self.chunks[0].config.no_sync_func = waits if len(waits) > 1 else waits[0]
        self._table = table_for(arch)
        self.optimizer = PhaseOptimizer(
            optimizer,
            self._wrapped,
            self.named_parameters(),
            specs,
            dtype,
            lambda name: steps_of(self._table.local_name(name), steps) if steps else 0,
        )
        self._trained_since: dict[str | None, set[PolicySpec]] = {}
        self.norms = ParameterNorms(
            self.named_parameters(),
            specs,
            state,
            dtype,
            sharded_masters=optimizer.use_distributed_optimizer,
            interval=norms_interval,
        )

    @property
    def overlaps_now(self) -> bool:
        """Whether gradients are summed during the backward in the current phase (--overlap-grad-reduce)."""
        return bool(self._ddp_config.overlap_grad_reduce)

    def kernels(self) -> dict[str, str]:
        """As ParallelModel's, and the optimizer's."""
        return super().kernels() | {"optimizer": library_of(self.optimizer.kind)}

    def name_weights(self, version: str) -> None:
        """Give the present weights a name, by which `hf_tensors` knows what has changed since."""
        self._trained_since[version] = set()

    def hf_tensors(self, since: str | None = None) -> Iterator[tuple[str, Tensor]]:
        """As of ParallelModel; with the name of earlier weights only what a policy has trained since."""
        specs = self._trained_since.get(since)
        groups = self.state.tp_group, self.state.pp_group
        # Without a step nothing has changed, but an engine expects something.
        wanted = None if not specs else lambda name: any(trains(spec, name) for spec in specs)
        return hf_tensors(self.named_parameters(), self.arch, *groups, wanted)

    def optimizer_state(self) -> OptimizerState:
        """What Adam keeps, to be saved or restored."""
        parameters, dp_group = self.named_parameters(), self.state.dp_group
        return OptimizerState(self.optimizer.megatron, parameters, self.dtype, dp_group, self._table)

    def update(
        self, batches: Sequence[MicroBatch], spec: PolicySpec, objective: Objective, lr: float, temperature: float
    ) -> UpdateResult:
        """One optimizer step on one mini-batch, of which `batches` are this data-parallel rank's micro-batches.

        Their columns have advantages, and on the last stage ref_logprobs with a KL term. Those of a micro-batch that
        has no old log-probs yet are set here: its weights are still the old ones, and so is its forward.
        """
        # In an internal phase the gradients above l never come, and an overlapped reduction would wait for them.
        self._ddp_config.overlap_grad_reduce = self._overlaps and spec.is_full
        for chunk in self._wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

        def loss_of(batch: MicroBatch, output: PolicyOutput) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            if batch.columns.old_logprobs is None:
                batch.columns.keep_old(output.logprobs.detach(), output.entropy.detach())
            sums = objective(loss_inputs(batch, output))
            return sums.total, sums.count, sums.metrics

        collected = run_policy(
            self.chunks,
            batches,
            spec,
            self.state,
            temperature=temperature,
            vocab_size=self.arch.vocab_size,
            loss_function=loss_of,
        )
        sums = reduce_everywhere(self.state, collected)
        objective.check_finite(sums.pop("num_bad"), sums["num_tokens"])
        if self.state.device.type == "cpu":
            give_freed_memory_back()
        # The count of this rank: Megatron sums it over the data-parallel ranks and divides the gradients by it.
        count = torch.zeros([], dtype=torch.int, device=self.state.device)
        for values in collected:
            count += values["count"]
        finalize_model_grads(self._wrapped, count)
        self.norms.keep(spec)  # the activations are gone: with one update a step this takes their memory
        grad_norm = self.optimizer.step(spec, lr)
        for specs in self._trained_since.values():
            specs.add(spec)
        return UpdateResult(sums.pop("loss") / max(sums.pop("count"), 1), grad_norm, sums)

    @contextmanager
    def weights_of(self, reference: Sequence[Tensor]) -> Iterator[None]:
        """Run with other parameter values (from `snapshot`), for the reference policy of a KL term."""
        parameters = [param for _, param in self.named_parameters()]
        current = [param.detach().clone() for param in parameters]
        with torch.no_grad():
            for param, value in zip(parameters, reference, strict=True):
                param.copy_(value)
            try:
                yield
            finally:
                for param, value in zip(parameters, current, strict=True):
                    param.copy_(value)

    def snapshot(self) -> list[Tensor]:
        """A copy of this rank's parameter values, in main memory."""
        return [param.detach().to("cpu", copy=True) for _, param in self.named_parameters()]
