"""A model on its ranks, loaded from a HuggingFace folder: enough to score, and the base of what trains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from megatron_bupo.architectures.architecture import Architecture
from megatron_bupo.architectures.mapping import Shard
from megatron_bupo.architectures.table import table_for
from megatron_bupo.config.train import ParallelConfig
from megatron_bupo.model.build import HiddenStateModel, build_model
from megatron_bupo.model.kernels import kernels_of
from megatron_bupo.model.policy import PolicyOutput, run_policy
from megatron_bupo.parallel.setup import ParallelState
from megatron_bupo.parallel.shared_work import on_every_rank
from megatron_bupo.policy_spec import PolicySpec
from megatron_bupo.samples import MicroBatch
from megatron_bupo.weights.dist_checkpoint import load_model
from megatron_bupo.weights.hf_files import HFWeights
from megatron_bupo.weights.sharding import global_named_parameters, hf_tensors, load_hf


class ParallelModel:
    """The model chunks of this rank with the weights of a HuggingFace folder, read slice by slice.

    Args:
        weights: of the folder.
        dtype: of parameters and activations.
        converted: a distributed checkpoint to take the weights from instead.
    """

    def __init__(
        self,
        arch: Architecture,
        weights: HFWeights,
        parallel: ParallelConfig,
        state: ParallelState,
        dtype: torch.dtype,
        converted: Path | None = None,
    ) -> None:
        self.arch = arch
        self.state = state
        self.chunks: list[HiddenStateModel] = build_model(arch, parallel, state, dtype)
        if converted is None:
            shard = Shard(state.tp_rank, state.tp_size)
            on_every_rank(lambda: load_hf(self.named_parameters(), weights, arch, shard), state.host_group)
        else:
            load_model(self.chunks, converted, table_for(arch))

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """(name with the global index of its layer, parameter) of every chunk of this rank."""
        return list(global_named_parameters(self.chunks))

    def kernels(self) -> dict[str, str]:
        """Part of the computation -> the library, with its version, whose kernels compute it on this rank."""
        return kernels_of(self.chunks[0], self.state.device)

    def score(
        self, batches: Sequence[MicroBatch], specs: Sequence[PolicySpec], temperature: float
    ) -> dict[PolicySpec, list[PolicyOutput]]:
        """Log-probs and entropies of every policy in `specs`, without gradient.

        Returns:
            For each, one output per micro-batch on the last stage, none elsewhere.
        """
        vocab_size = self.arch.vocab_size
        return {
            spec: run_policy(self.chunks, batches, spec, self.state, temperature=temperature, vocab_size=vocab_size)
            for spec in specs
        }

    def hf_tensors(self, since: str | None = None) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the model in HuggingFace's names and layout, whole, on every rank in the same order.

        Args:
            since: a version of the weights: those that are the same in it may be left out.
        """
        return hf_tensors(self.named_parameters(), self.arch, self.state.tp_group, self.state.pp_group)
