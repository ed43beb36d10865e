"""What `train --dry-run` prints: the resolved run, before any process group or file exists."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from megatron_bupo.architectures.architecture import Architecture
from megatron_bupo.config.train import TrainConfig
from megatron_bupo.flags import Group, flag_name, shown
from megatron_bupo.rl.schedule import PolicySchedule
from megatron_bupo.training.memory import data_parallel_size, memory_estimate

_GB = 1e9


def describe_plan(
    config: TrainConfig, arch: Architecture, schedule: PolicySchedule, phases: str, world_size: int, done: int = 0
) -> str:
    """Flags, phases, layout, memory and files, as text for a person; `done` steps were taken before.

    `phases` is the schedule in words.
    """
    return "\n".join(
        [
            "flags",
            *(f"  {line}" for line in _flags(config)),
            "phases",
            f"  {phases}" + (f"; going on after step {done}" if done else ""),
            "layout",
            f"  {_layout(config, arch, world_size)}",
            "rollouts",
            f"  {_rollouts(config)}",
            f"  {_batches(config)}",
            "memory on the fullest rank, estimated (GB = 10^9 bytes)",
            *_memory(config, arch, schedule, world_size),
            "files that would be written",
            *(f"  {line}" for line in _files(config) or ["none: give --save DIR to keep the run"]),
        ]
    )


def _flags(group: Group) -> Iterator[str]:
    for declared in fields(group):  # type: ignore[arg-type]
        value = getattr(group, declared.name)
        if isinstance(value, Group):
            yield from _flags(value)
        elif value is not None:
            yield f"{flag_name(declared.name)} {shown(value)}"


def _layout(config: TrainConfig, arch: Architecture, world_size: int) -> str:
    parallel = config.parallel
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    virtual = parallel.num_virtual_stages_per_pipeline_rank
    data = data_parallel_size(parallel, world_size)
    stages = pipeline * virtual
    return (
        f"{tensor * pipeline * data} process(es) = TP {tensor} x PP {pipeline} x DP {data}; {arch.num_layers} layers "
        f"in {stages} stage(s) of {arch.num_layers // stages}; sequence parallelism "
        f"{'on' if parallel.sequence_parallel else 'off'}"
    )


def _rollouts(config: TrainConfig) -> str:
    rollout, servers = config.rollout, config.sglang
    if rollout.load_rollouts is not None:
        return f"replayed from {rollout.load_rollouts}"
    if rollout.rollout_engine == "local":
        return "the embedded engine, in every process"
    where = " ".join(servers.sglang_url or []) or f"{servers.sglang_num_servers} launched with the run"
    return f"SGLang servers: {where}; weights by {servers.weight_sync}"


def _batches(config: TrainConfig) -> str:
    rollout = config.rollout
    responses, updates = rollout.rollout_batch_size * rollout.n_samples_per_prompt, config.updates_per_step
    return (
        f"{responses} responses a step ({rollout.rollout_batch_size} prompts x {rollout.n_samples_per_prompt}), in "
        f"{updates} optimizer step(s) of {responses // updates}"
    )


def _memory(config: TrainConfig, arch: Architecture, schedule: PolicySchedule, world_size: int) -> Iterator[str]:
    """What the fullest phase takes, part by part, and the sums of the phases."""
    specs = schedule.specs
    phases = [memory_estimate(config, arch, world_size, specs[: number + 1]) for number in range(len(specs))]
    for name, size in max(phases, key=lambda sizes: sizes["sum"]).items():
        yield f"  {name:<32}{size / _GB:9.3f} GB"
    if len(specs) > 1:
        for spec, sizes in zip(specs, phases, strict=True):
            yield f"  {f'sum while {spec} trains':<32}{sizes['sum'] / _GB:9.3f} GB"


def _files(config: TrainConfig) -> list[str]:
    run, files = config.run, []
    if run.save:
        files += [str(Path(run.save) / name) for name in ("run.json", "metrics.jsonl")]
    if run.save and run.save_interval:
        files.append(f"{run.save}/iter_{run.save_interval:07d}/ ... (every {run.save_interval} steps and the last)")
        files += [f"{run.save}/latest_checkpointed_iteration.txt", f"{run.save}/hf/"]
    schedule = config.schedule
    if run.save_interval and config.monitor.monitor_responses and (schedule.internal_steps or schedule.policy_schedule):
        files.append(f"{run.save}/watch_step_000001.jsonl ... (with the checkpoints of an internal phase)")
    if run.save and schedule.is_auto:
        files.append(f"{run.save}/internal_layer/entropy_flow.json")
    if run.save and config.monitor.entropy_flow_interval:
        every = config.monitor.entropy_flow_interval
        files.append(f"{run.save}/entropy_flow/step_{every:06d}/entropy_flow.json ... (every {every} steps)")
    board = run.tensorboard_dir or (str(Path(run.save) / "tensorboard") if run.save else None)
    if board:
        files.append(f"{board}/ (TensorBoard)")
    if config.sglang.sglang_launch and run.save:
        files.append(f"{run.save}/sglang/server_0.log ... ({config.sglang.sglang_num_servers} server(s))")
    if config.rollout.save_rollouts:
        files.append(f"{config.rollout.save_rollouts}/step_000001.jsonl ... ({config.schedule.train_iters} files)")
    if config.debug.dump_details:
        files.append(f"{config.debug.dump_details}/step_000001.jsonl ... ({config.schedule.train_iters} files)")
    if config.debug.profiled:
        files.append(f"{run.save}/profile/step_{config.debug.profiled[0]:06d}_rank_0.json.gz ...")
    if run.save_hf:
        files.append(f"{run.save_hf}/ (HuggingFace folder)")
    return files
