"""A training run from its model to its last checkpoint: the loop around `Trainer.step`, and what it leaves behind."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from tqdm import tqdm

from megatron_bupo.analysis.flow_file import write_flow
from megatron_bupo.evaluation.in_training import evaluate_now
from megatron_bupo.model.kernels import kernels_line
from megatron_bupo.parallel.setup import ParallelState
from megatron_bupo.rollout.source import FirstStepKept, GradedGeneration, PromptedSource, RolloutSource
from megatron_bupo.training.actor import Actor
from megatron_bupo.training.auto_layer import CHOICE_FOLDER, choose_layer, describe_choice
from megatron_bupo.training.checkpoint import load_checkpoint, save_checkpoint
from megatron_bupo.training.details import profiled
from megatron_bupo.training.flow_log import log_flow
from megatron_bupo.training.metrics import console_lines
from megatron_bupo.training.phase_monitor import PhaseMonitor
from megatron_bupo.training.prepare import PreparedRun
from megatron_bupo.training.run_record import describe_run
from megatron_bupo.training.run_state import RunState, cut_metrics
from megatron_bupo.training.tracker import Metrics, Tracker
from megatron_bupo.training.trainer import Trainer
from megatron_bupo.weights.hf_folder import HFFolder, write_hf_folder


def train(run: PreparedRun, source: RolloutSource, state: ParallelState) -> None:
    """Choose the layer if it is open, build the model, take the steps that are left, export. Collective.

    Raises:
        UsageError: the flow suggests no layer; a reward, loss or estimator that returns something else than it must.
    """
    graded = source.graded if isinstance(source, PromptedSource) else None
    if run.layer_is_open:
        assert run.weights is not None
        source = kept = FirstStepKept(source)
        flow = choose_layer(run.config, run.arch, run.weights, run.start.converted, kept, state)
        run = run.with_layer_of(flow)
    config, start, weights = run.config, run.start, run.weights
    assert weights is not None, "only a dry run goes without"
    actor = Actor(
        run.arch,
        weights,
        config.parallel,
        config.optimizer,
        state,
        config.model.dtype,
        run.schedule.specs,
        start.converted,
        norms_interval=config.monitor.norms_interval,
        steps=start.state.optimizer_steps if start.state is not None else None,
    )
    tracker = _open_tracker(run, actor.kernels()) if state.rank == 0 else None
    temperature, max_tokens = config.rollout.rollout_temperature, config.batch.max_tokens_per_micro_batch
    monitor = PhaseMonitor(config.monitor, run.schedule, actor, temperature, max_tokens, start.ended, start.watch)
    trainer = Trainer(config, monitor, actor, source, tracker)
    if start.folder is not None and start.state is not None:
        load_checkpoint(actor, start.folder, start.state)
        if tracker is not None:
            print(f"{start.folder}: going on after step {start.done}")
    try:
        # The engine may have weights of another run.
        trainer.send_weights(str(start.done))
        _take_steps(run, trainer, graded)
    finally:
        if tracker is not None:
            tracker.close()
    if config.run.save_hf:
        _export(actor, config.model.hf_model, config.run.save_hf)


def _take_steps(run: PreparedRun, trainer: Trainer, graded: GradedGeneration | None) -> None:
    """The steps that are left, with metrics, lines on the console, evaluations and checkpoints."""
    config, tracker, done = run.config, trainer.tracker, run.start.done
    last, interval = config.schedule.train_iters, config.run.save_interval
    is_first = trainer.state.rank == 0
    with tqdm(total=last, initial=done, desc="train", unit="step", disable=None if is_first else True) as bar:
        if done == 0:
            evaluated, lines = _evaluate(run, graded, 0)
            if evaluated:
                _report(tracker, bar, {"step": 0, **evaluated}, lines)
        for step in range(done + 1, last + 1):
            with _look_at(run, step, trainer.state.rank):
                metrics = trainer.step(step)
            evaluated, lines = _evaluate(run, graded, step)
            lines = [*console_lines(metrics, last, config.monitor.logprob_diff_alarm), *lines]
            _report(tracker, bar, metrics | evaluated, lines)
            bar.update()
            if interval is not None and (step % interval == 0 or step == last):
                _save(run, trainer, step)


def _look_at(run: PreparedRun, step: int, rank: int) -> AbstractContextManager[None]:
    if step not in run.config.debug.profiled:
        return nullcontext()
    return profiled(Path(str(run.config.run.save)) / "profile", step, rank)


def _evaluate(run: PreparedRun, graded: GradedGeneration | None, step: int) -> tuple[Metrics, list[str]]:
    """The metrics of an evaluation with the weights after `step`, and lines about them; nothing if none is due."""
    last = run.config.schedule.train_iters
    if not run.config.evaluation.due_after(step, last):
        return {}, []
    assert graded is not None, "TrainConfig refuses --eval-data without an engine"
    metrics, lines = evaluate_now(run.eval_sets, graded)
    return metrics, [f"step {step:3d}/{last}  {line}" for line in lines]


def _report(tracker: Tracker | None, bar: tqdm, metrics: Metrics, lines: list[str]) -> None:
    if tracker is not None:
        tracker.log(metrics)
        for line in lines:
            bar.write(line)


def _save(run: PreparedRun, trainer: Trainer, step: int) -> None:
    """SAVE/iter_<step>, and beside it what the watch over an internal phase compares with."""
    flags, monitor = run.config.run, trainer.monitor
    assert flags.save is not None
    folder, watch = Path(flags.save), monitor.watch
    if watch is not None and trainer.state.rank == 0:
        watch.write(folder)
    converted = run.start.converted
    run_state = RunState(
        step,
        run.identity,
        {},
        str(converted.resolve()) if converted else None,
        monitor.ended,
        watch.first if watch is not None else None,
    )
    save_checkpoint(trainer.actor, folder, run_state, Path(run.config.model.hf_model), flags.keep)


def _open_tracker(run: PreparedRun, kernels: dict[str, str]) -> Tracker:
    """The tracker, with run.json and the flow that the layer was chosen from written."""
    flags, flow = run.config.run, run.flow
    if flags.save:
        cut_metrics(Path(flags.save), run.start.done)
    tracker = Tracker(flags.save, flags.tensorboard_dir, run.start.done)
    folder = Path(flags.save) / CHOICE_FOLDER if flags.save else None
    if flow is not None and run.start.folder is None:
        chosen, tokens, why = flow.suggested_layer, flow.num_tokens, flow.selection["reasons"][1]
        print(f"internal layer {chosen}, chosen on {tokens} tokens: {why}; {flow.selection['stability']}")
        log_flow(tracker, folder, 0, flow)
    elif flow is not None and folder is not None:
        write_flow(folder, flow)
    choice = None if flow is None else describe_choice(flow)
    phases, changes = run.schedule.describe(), run.start.changes
    tracker.write_run(describe_run(run.config, phases, run.identity, changes, kernels, choice))
    print(kernels_line(kernels))
    return tracker


def _export(actor: Actor, hf_model: str, folder: str) -> None:
    if actor.state.rank == 0:
        write_hf_folder(actor.hf_tensors(), HFFolder.like(hf_model, actor.dtype), folder)
    else:
        for _ in actor.hf_tensors():  # every rank takes part in gathering them
            continue
