"""What `train --dry-run` prints: the resolved run, before any process group or file exists."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from megatron_bupo.architectures.architecture import Architecture
from megatron_bupo.config.train import TrainConfig
from megatron_bupo.flags import Group, flag_name, shown

_GB = 1e9


def describe_plan(config: TrainConfig, arch: Architecture, phases: str, world_size: int, done: int = 0) -> str:
    """Flags, phases, layout, memory and files, as text for a person; `done` steps were taken before."""
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
            "memory on the fullest rank, estimated (GB = 10^9 bytes)",
            *(f"  {name:<32}{size / _GB:9.3f} GB" for name, size in memory_estimate(config, arch, world_size).items()),
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


def _data_parallel_size(config: TrainConfig, world_size: int) -> int:
    parallel = config.parallel
    ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    return max(world_size // ranks, 1)


def _layout(config: TrainConfig, arch: Architecture, world_size: int) -> str:
    parallel = config.parallel
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    virtual = parallel.num_virtual_stages_per_pipeline_rank
    data = _data_parallel_size(config, world_size)
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


def parameter_counts(arch: Architecture) -> dict[str, int]:
    """Parameters of one layer, of the embedding and of an unembedding of its own (0 if tied)."""
    heads, groups = arch.num_attention_heads, arch.num_query_groups
    attention = arch.hidden_size * arch.head_dim * (2 * heads + 2 * groups)
    bias = arch.head_dim * (heads + 2 * groups) if arch.qkv_bias else 0
    norms = 2 * arch.hidden_size + (2 * arch.head_dim if arch.qk_norm else 0)
    embedding = arch.vocab_size * arch.hidden_size
    return {
        "layer": attention + bias + norms + 3 * arch.hidden_size * arch.ffn_hidden_size,
        "embedding": embedding,
        "unembedding": 0 if arch.tied else embedding,
    }


def memory_estimate(config: TrainConfig, arch: Architecture, world_size: int) -> dict[str, float]:
    """Bytes on the rank that holds most: parameters, gradients, optimizer, activations of one micro-batch, norms.

    Activations: 34 bytes per token, hidden unit and layer in 16 bit, twice that in fp32 (Korthikanti et al., arXiv
    2205.05198, without attention scores, which are never stored); with full recompute the layers' inputs alone.
    """
    parallel = config.parallel
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    counts = parameter_counts(arch)
    # In a pipeline the first and the last stage hold one matrix of the vocabulary's size each, tied or not.
    ends = counts["embedding"] + (counts["unembedding"] if pipeline == 1 else 0)
    parameters = (counts["layer"] * arch.num_layers / pipeline + ends) / tensor
    width = 2 if config.model.bf16 else 4
    # Moments, and the fp32 masters of bf16 weights.
    state = parameters * (12 if config.model.bf16 else 8)
    if config.optimizer.use_distributed_optimizer:
        state /= _data_parallel_size(config, world_size)
    tokens = config.batch.max_tokens_per_micro_batch
    per_layer = (1 if parallel.recompute_granularity == "full" else 17) * width * tokens * arch.hidden_size
    # A pipeline keeps as many micro-batches in flight as it has stages: PP x layers / PP.
    sizes = {
        "parameters": parameters * width,
        "gradients (fp32)": parameters * 4,
        "optimizer (fp32)": state,
        "activations": per_layer * arch.num_layers / tensor,
    }
    if config.monitor.norms_interval:
        counted = parameters / _data_parallel_size(config, world_size)
        # With one optimizer step in a step, the values before it are kept while there are no activations.
        free = 0.0 if config.updates_per_step > 1 else sizes["activations"]
        sizes["update norms"] = max(0.0, 4 * counted - free) + (2 * counted if config.model.bf16 else 0)
    if config.rollout.load_rollouts is None and config.rollout.rollout_engine == "local":
        whole = counts["layer"] * arch.num_layers + counts["embedding"] + counts["unembedding"]
        sizes["embedded engine's model"] = float(whole * width)
    return sizes | {"sum": sum(sizes.values())}


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
    if run.save_hf:
        files.append(f"{run.save_hf}/ (HuggingFace folder)")
    return files
