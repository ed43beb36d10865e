"""The entropy flow of a run: measured on a sample of a step's rollouts, written to its folder and to TensorBoard."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from megatron_bupo.analysis.entropy_flow import measure
from megatron_bupo.analysis.flow_file import METRICS, EntropyFlow, write_flow
from megatron_bupo.analysis.flow_plots import flow_figures
from megatron_bupo.config.train import TrainConfig
from megatron_bupo.errors import UsageError
from megatron_bupo.model.parallel_model import ParallelModel
from megatron_bupo.samples import Rollout
from megatron_bupo.training.tracker import Tracker

# Largest micro-batch: the states of all its layers are in memory at once, beside the optimizer's.
MAX_TOKENS = 4096


def flow_of_step(model: ParallelModel, rollouts: Sequence[Rollout], when: str, config: TrainConfig) -> EntropyFlow:
    """Measure the model as it is on a sample of `rollouts`; the flow's name ends with `when`. Collective.

    Raises:
        UsageError: the policy wrote fewer than two tokens of the sample, or a number is not finite. All ranks raise it.
    """
    sample = spread_sample(rollouts, config.monitor.entropy_flow_responses)
    measured = measure(model, sample, min(config.batch.max_tokens_per_micro_batch, MAX_TOKENS))
    return measured.summary(f"{Path(config.model.hf_model).resolve().name}, {when}")


def measure_flow(
    model: ParallelModel, rollouts: Sequence[Rollout], step: int, config: TrainConfig, tracker: Tracker | None
) -> None:
    """Measure the weights that wrote the rollouts of a step, and keep the flow with the run. Collective.

    A flow that cannot be measured ends no run: it is a warning.
    """
    try:
        flow = flow_of_step(model, rollouts, f"step {step}", config)
    except UsageError as error:  # the same on every rank
        if model.state.rank == 0:
            warnings.warn(f"the entropy flow of step {step} was not measured: {error}", stacklevel=1)
        return
    if tracker is not None:
        save = config.run.save
        folder = None if save is None else Path(save) / "entropy_flow" / f"step_{step:06d}"
        log_flow(tracker, folder, step, flow)


def spread_sample(rollouts: Sequence[Rollout], count: int) -> list[Rollout]:
    """`count` of the responses, spread evenly over the step: they are in the order of their prompts."""
    count = min(count, len(rollouts))
    return [rollouts[index * len(rollouts) // count] for index in range(count)]


def log_flow(tracker: Tracker, folder: Path | None, step: int, flow: EntropyFlow) -> None:
    """The numbers in FOLDER/entropy_flow.json; curves by layer and the figures in TensorBoard."""
    if folder is not None:
        write_flow(folder, flow)
    digits = len(str(len(flow.layers)))
    numbers = {
        f"entropy_flow_{name}/layer_{layer:0{digits}d}": value
        for name in METRICS
        for layer, value in enumerate(flow.column(name), start=1)
    }
    tracker.log_numbers({"entropy_flow/final_entropy": flow.final_entropy, **numbers}, step)
    try:
        figures = flow_figures({flow.model: flow})
        tracker.log_figures(((f"entropy_flow/{name}", figure) for name, figure in figures), step)
    except Exception as error:  # a run does not end because of a figure
        warnings.warn(f"the figures of {flow.model} were not drawn: {type(error).__name__}: {error}", stacklevel=1)
