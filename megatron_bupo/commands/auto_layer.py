"""`train --internal-layer auto`: the layer of phase 1 from the entropy flow of the first rollouts."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_bupo.analysis.flow_file import EntropyFlow, read_flow, step_flow_file
from megatron_bupo.config import RunConfig, TrainConfig
from megatron_bupo.errors import UsageError
from megatron_bupo.model.architecture import Architecture
from megatron_bupo.parallel.setup import ParallelState
from megatron_bupo.rollout.source import FirstStepKept
from megatron_bupo.training.run_state import Start
from megatron_bupo.weights.hf_files import HFWeights


def choose_layer(
    config: TrainConfig,
    arch: Architecture,
    weights: HFWeights,
    converted: Path | None,
    source: FirstStepKept,
    state: ParallelState,
    dtype: torch.dtype,
) -> EntropyFlow:
    """Measure the starting model on the first step's rollouts. Collective; the same on every rank.

    Raises:
        UsageError: no layer suggests itself.
    """
    from megatron_bupo.analysis.flow_log import flow_of_step
    from megatron_bupo.model.parallel_model import ParallelModel

    model = ParallelModel(arch, weights, config.parallel, state, dtype, converted)
    if converted is not None:  # the engine has the model's weights
        source.update_weights(model.hf_tensors(), version="0")
    flow = flow_of_step(model, source.first_step().rollouts, 1, config)
    if flow.suggested_layer is None:
        why = "; ".join(flow.selection["reasons"])
        raise UsageError(f"--internal-layer auto: {why}; choose a layer yourself with --internal-layer L")
    return flow


def check_auto(config: TrainConfig, arch: Architecture, start: Start) -> None:
    """Raise UsageError where there is nothing to choose from, or no start to choose for."""
    if arch.num_layers < 2:
        raise UsageError(f"--internal-layer auto: {config.model.hf_model} has 1 layer; a choice needs 2 or more")
    if start.folder is not None:
        raise UsageError(
            f"--internal-layer auto: the run in --load {config.run.load} trained no internal layer; choose one "
            "yourself with --internal-layer L"
        )


def flow_of_choice(run: RunConfig) -> EntropyFlow | None:
    """What the run that goes on in its folder chose its layer from; None if it was moved away."""
    path = None if run.save is None else step_flow_file(run.save, 1)
    return read_flow(path) if path is not None and path.is_file() else None


def describe_choice(flow: EntropyFlow) -> dict[str, object]:
    """What run.json says of a layer that was chosen."""
    return {
        "layer": flow.suggested_layer,
        "stages": flow.stages,
        "num_tokens": flow.num_tokens,
        "num_responses": flow.num_responses,
        "evidence": flow.selection,
    }
