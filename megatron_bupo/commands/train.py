"""`train`: BuPO or GRPO training, or with --dry-run the plan of it."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_bupo.analysis.flow_file import EntropyFlow, write_flow
from megatron_bupo.architectures.architecture import Architecture, check_layout
from megatron_bupo.architectures.table import table_for
from megatron_bupo.config import launch
from megatron_bupo.config.train import TrainConfig
from megatron_bupo.data.prompts import PromptSet, check_positions, load_prompts
from megatron_bupo.data.rollout_files import check_replay, replay_fingerprints
from megatron_bupo.data.tokenizer import load_tokenizer
from megatron_bupo.errors import UsageError
from megatron_bupo.parallel.setup import ParallelState, parallel_state
from megatron_bupo.rl.builtin import load_estimator, load_loss
from megatron_bupo.rl.schedule import PolicySchedule
from megatron_bupo.rollout.source import FirstStepKept, RolloutSource
from megatron_bupo.rollout.start import check_source, make_source
from megatron_bupo.training.auto_layer import (
    CHOICE_FOLDER,
    choice_so_far,
    choose_layer,
    describe_choice,
    layer_of_run,
)
from megatron_bupo.training.run_record import changed_flags, describe_run, fingerprint
from megatron_bupo.training.run_state import RunIdentity, RunState, Start, cut_metrics, find_start
from megatron_bupo.training.tracker import Tracker
from megatron_bupo.weights.checkpoint_tree import HF
from megatron_bupo.weights.hf_files import HFWeights, write_hf_folder


def run(config: TrainConfig) -> None:
    """Check everything that can be checked without a process group, then train.

    Raises:
        UsageError: bad input, before anything was started or written.
    """
    arch = Architecture.from_hf(config.model.hf_model)
    check_layout(arch, config.parallel)
    layer = layer_of_run(config)
    is_open = config.schedule.is_auto and layer is None
    if arch.num_layers < 2 and (is_open or config.monitor.entropy_flow_interval):
        given = "--internal-layer auto" if is_open else "--entropy-flow-interval"
        raise UsageError(f"{given}: {config.model.hf_model} has 1 layer; an entropy flow needs 2 or more")
    schedule = _schedule(config, 1 if is_open else layer)  # for the checks any layer will do
    schedule.check(arch.num_layers)
    weights = HFWeights(config.model.hf_model)
    weights.check(table_for(arch))
    _check_export(config)
    # A file of the user's that fails when it is run fails now, and not on some rank later.
    load_loss(config.algorithm.loss, config.algorithm.losses)
    load_estimator(config.algorithm.advantage_estimator)
    prompts = _check_data(config, arch)
    check_source(config)
    identity = _identity(config, schedule, prompts)
    start = find_start(config.run, identity, watched=config.monitor.monitor_responses > 0)
    if start.folder is not None:
        changed = changed_flags(config, start.folder.parent)
        start = replace(start, changes=(*start.changes, *changed))
        if changed and launch.rank() == 0:
            print(f"{start.folder}: goes on with other flags than it was started with ({'; '.join(changed)})")
    flow = choice_so_far(config, layer)
    for step in start.ended:
        schedule = schedule.ended_before(step)
    if config.run.dry_run:
        if launch.rank() == 0:
            from megatron_bupo.training.plan import describe_plan

            phases = schedule.describe()
            if is_open:
                stand_in = str(schedule.specs[0])
                phases = phases.replace(stand_in, stand_in.replace(":1", ":auto"))
            print(describe_plan(config, arch, phases, launch.world_size(), start.done))
        return
    dtype = torch.bfloat16 if config.model.bf16 else torch.float32
    with (
        parallel_state(config.parallel, config.run.seed) as state,
        closing(make_source(config, arch, prompts, state, dtype)) as source,
    ):
        if is_open:
            source = kept = FirstStepKept(source)
            flow = choose_layer(config, arch, weights, start.converted, kept, state, dtype)
            schedule = _schedule(config, flow.suggested_layer)
            identity = _identity(config, schedule, prompts)
        _train(_Run(config, arch, weights, dtype, schedule, identity, start, flow), source, state)


@dataclass(frozen=True)
class _Run:
    """What is known of a run before its model is built; `flow` is what `auto` chose the layer from."""

    config: TrainConfig
    arch: Architecture
    weights: HFWeights
    dtype: torch.dtype
    schedule: PolicySchedule
    identity: RunIdentity
    start: Start
    flow: EntropyFlow | None


def _schedule(config: TrainConfig, layer: int | None) -> PolicySchedule:
    flags = config.schedule
    schedule = PolicySchedule.from_flags(
        train_iters=flags.train_iters,
        internal_layer=layer,
        internal_steps=flags.internal_steps,
        internal_module=flags.internal_module,
        internal_policy_norm=flags.internal_policy_norm,
        policy_schedule=flags.policy_schedule,
    )
    if config.monitor.internal_stop:
        schedule.check_stop()
    return schedule


def _check_export(config: TrainConfig) -> None:
    """The export takes a name that is not there: said now, not after the training."""
    run, rollout = config.run, config.rollout
    if run.save_hf is None:
        return
    if Path(run.save_hf).exists():
        raise UsageError(f"--save-hf {run.save_hf}: exists; give the name of a new folder")
    outputs = (
        ("--save", run.save),
        ("--tensorboard-dir", run.tensorboard_dir),
        ("--save-rollouts", rollout.save_rollouts),
    )
    export = Path(run.save_hf).resolve()
    if run.save is not None and export == Path(run.save).resolve() / HF:
        raise UsageError(f"--save-hf {run.save_hf}: checkpoints keep config and tokenizer there; give another name")
    for name, path in outputs:
        if path is not None and export in (Path(path).resolve(), *Path(path).resolve().parents):
            raise UsageError(f"--save-hf {run.save_hf}: {name} {path} lies there; give a folder of its own")


def _check_data(config: TrainConfig, arch: Architecture) -> PromptSet | None:
    """The prompts, or None for a replay, whose files are looked through to the last line."""
    rollout = config.rollout
    if rollout.load_rollouts is not None:
        num_responses = rollout.rollout_batch_size * rollout.n_samples_per_prompt
        check_replay(rollout.load_rollouts, config.schedule.train_iters, num_responses, arch.vocab_size)
        return None
    assert config.data.prompt_data is not None
    tokenizer = load_tokenizer(config.model.hf_model)
    is_first = launch.rank() == 0
    prompts = load_prompts(
        config.data.prompt_data, tokenizer, config.data.rollout_max_prompt_len, show_progress=is_first
    )
    if prompts.num_dropped and is_first:
        longest = config.data.rollout_max_prompt_len
        print(f"prompts: {len(prompts)} kept, {prompts.num_dropped} dropped (over {longest} tokens)")
    if rollout.rollout_batch_size > len(prompts):
        raise UsageError(
            f"--rollout-batch-size {rollout.rollout_batch_size}: the data have {len(prompts)} prompts of at most "
            f"{config.data.rollout_max_prompt_len} tokens; lower it or give more data"
        )
    check_positions(prompts, rollout.rollout_max_response_len, arch.max_position_embeddings)
    return prompts


def _identity(config: TrainConfig, schedule: PolicySchedule, prompts: PromptSet | None) -> RunIdentity:
    """What makes this run this run: a resume compares it."""
    steps = config.schedule.train_iters
    folder = config.rollout.load_rollouts
    return RunIdentity(
        model=fingerprint(Path(config.model.hf_model)),
        dtype="bf16" if config.model.bf16 else "fp32",
        data=prompts.fingerprint() if prompts is not None else "",
        replay=tuple(replay_fingerprints(str(folder), steps)) if prompts is None else (),
        seed=config.run.seed,
        rollout_batch_size=config.rollout.rollout_batch_size,
        n_samples_per_prompt=config.rollout.n_samples_per_prompt,
        phases=tuple(str(schedule.at(step)) for step in range(1, steps + 1)),
    )


def _track(run: _Run, state: ParallelState) -> Tracker | None:
    """The tracker of the first rank, with what is known of the run written down."""
    if state.rank > 0:
        return None
    flags, flow = run.config.run, run.flow
    if flags.save:
        cut_metrics(Path(flags.save), run.start.done)
    tracker = Tracker(flags.save, flags.tensorboard_dir, run.start.done)
    folder = Path(flags.save) / CHOICE_FOLDER if flags.save else None
    if flow is not None and run.start.folder is None:
        from megatron_bupo.training.flow_log import log_flow

        chosen, tokens, why = flow.suggested_layer, flow.num_tokens, flow.selection["reasons"][1]
        print(f"internal layer {chosen}, chosen on {tokens} tokens: {why}; {flow.selection['stability']}")
        log_flow(tracker, folder, 0, flow)
    elif flow is not None and folder is not None:
        write_flow(folder, flow)
    choice = None if flow is None else describe_choice(flow)
    tracker.write_run(describe_run(run.config, run.schedule.describe(), run.identity, run.start.changes, choice))
    return tracker


def _train(run: _Run, source: RolloutSource, state: ParallelState) -> None:
    # These import megatron-core, which is quiet about what it misses only when parallel_state has imported it.
    from megatron_bupo.training.actor import Actor
    from megatron_bupo.training.checkpoint import load_checkpoint, save_checkpoint
    from megatron_bupo.training.phase_monitor import PhaseMonitor
    from megatron_bupo.training.trainer import Trainer

    config, start, flags = run.config, run.start, run.config.run
    specs = run.schedule.specs
    actor = Actor(run.arch, run.weights, config.parallel, config.optimizer, state, run.dtype, specs, start.converted)
    tracker = _track(run, state)
    monitor = PhaseMonitor(
        config.monitor,
        run.schedule,
        actor,
        config.rollout.rollout_temperature,
        config.batch.max_tokens_per_micro_batch,
        start.ended,
        start.watch,
    )
    trainer = Trainer(config, monitor, actor, source, tracker)
    if start.folder is not None and start.state is not None:
        load_checkpoint(actor, start.folder, start.state)
        if tracker is not None:
            print(f"{start.folder}: going on after step {start.done}")

    def save(step: int) -> None:
        assert flags.save is not None
        folder = Path(flags.save)
        converted = str(start.converted.resolve()) if start.converted else None
        watch = monitor.watch
        if watch is not None and state.rank == 0:
            watch.write(folder)
        phase_start = watch.first if watch is not None else None
        run_state = RunState(step, run.identity, {}, converted, monitor.ended, phase_start)
        save_checkpoint(actor, folder, run_state, Path(config.model.hf_model), flags.keep)

    try:
        source.update_weights(trainer.model_for_engine, version=str(start.done))  # whatever the engine has so far
        trainer.run(start.done, save if flags.save_interval else None)
    finally:
        if tracker is not None:
            tracker.close()
    if flags.save_hf:
        if state.rank == 0:
            write_hf_folder(actor.hf_tensors(), config.model.hf_model, flags.save_hf, run.dtype)
        else:
            for _ in actor.hf_tensors():  # every rank takes part in gathering them
                continue
