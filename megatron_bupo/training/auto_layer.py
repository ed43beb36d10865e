"""`train --internal-layer auto`: the layer of phase 1 from the entropy flow of the first rollouts."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from megatron_bupo.analysis.flow_file import FILE_NAME, EntropyFlow, read_flow
from megatron_bupo.architectures.architecture import Architecture
from megatron_bupo.config.train import TrainConfig
from megatron_bupo.errors import UsageError
from megatron_bupo.parallel.setup import ParallelState
from megatron_bupo.rollout.source import FirstStepKept
from megatron_bupo.training.run_state import layer_so_far, newest_checkpoint
from megatron_bupo.weights.hf_files import HFWeights

# In the run's folder: the entropy flow from which the layer was chosen.
CHOICE_FOLDER = "internal_layer"


def layer_of_run(config: TrainConfig) -> int | None:
    """The layer of phase 1: the given one, or for `auto` that of the run under --load; None if it is not chosen yet.

    Raises:
        UsageError: the run under --load has no internal phase.
    """
    if not config.schedule.is_auto:
        return config.schedule.layer
    layer = layer_so_far(config.run)
    if layer is None and config.run.load is not None and newest_checkpoint(config.run.load) is not None:
        raise UsageError(
            f"--internal-layer auto: the run in --load {config.run.load} trained no internal layer; choose one "
            "yourself with --internal-layer L"
        )
    return layer


def choice_so_far(config: TrainConfig, layer: int | None) -> EntropyFlow | None:
    """The flow from which the run under --load chose its layer; None if it did not choose, or the file is gone.

    Raises:
        UsageError: the file cannot be read.
    """
    if not config.schedule.is_auto or config.run.load is None or layer is None:
        return None
    path = Path(config.run.load) / CHOICE_FOLDER / FILE_NAME
    flow = read_flow(path) if path.is_file() else None
    return flow if flow is not None and flow.suggested_layer == layer else None


def choose_layer(
    config: TrainConfig,
    arch: Architecture,
    weights: HFWeights,
    converted: Path | None,
    source: FirstStepKept,
    state: ParallelState,
) -> EntropyFlow:
    """The flow of the starting model on the first step's rollouts, the same on every rank. Collective.

    Raises:
        UsageError: the flow suggests no layer.
    """
    from megatron_bupo.model.parallel_model import ParallelModel
    from megatron_bupo.model.scoring import ModelForEngine
    from megatron_bupo.training.flow_log import flow_of_step

    model = ParallelModel(arch, weights, config.parallel, state, config.model.dtype, converted)
    for_engine = ModelForEngine(model, config.batch.max_tokens_per_micro_batch)
    source.update_weights(for_engine, version="0")
    # All ranks take the first one's flow: rounding on another machine could suggest another layer.
    flows = [flow_of_step(model, source.first_step().rollouts, "start", config)]
    for_engine.release()  # before the memory for the trained model is taken
    dist.broadcast_object_list(flows, src=0, group=state.host_group)
    if flows[0].suggested_layer is None:
        why = "; ".join(flows[0].selection["reasons"])
        raise UsageError(f"--internal-layer auto: {why}; choose a layer yourself with --internal-layer L")
    return flows[0]


def describe_choice(flow: EntropyFlow) -> dict[str, object]:
    """The choice of a layer, as run.json has it."""
    return {
        "layer": flow.suggested_layer,
        "stages": flow.stages,
        "num_tokens": flow.num_tokens,
        "num_responses": flow.num_responses,
        "evidence": flow.selection,
    }
