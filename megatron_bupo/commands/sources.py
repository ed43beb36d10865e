"""Where `train` gets its rollouts from: a replay, the embedded engine, or SGLang servers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_bupo.commands.prompting import sampling_params
from megatron_bupo.config import TrainConfig
from megatron_bupo.data.prompts import PromptSet, load_tokenizer
from megatron_bupo.model.architecture import Architecture
from megatron_bupo.parallel.setup import ParallelState
from megatron_bupo.rewards.runner import RewardRunner
from megatron_bupo.rollout.lead import on_first_rank
from megatron_bupo.rollout.sglang.process import API_KEY_VARIABLE
from megatron_bupo.rollout.source import EmbeddedGeneration, Replay, RolloutSource, ServedGeneration

if TYPE_CHECKING:
    from megatron_bupo.rollout.sglang.engine import SGLangEngine


def check_source(config: TrainConfig) -> None:
    """Raise UsageError for an engine that could not start; nothing is started here."""
    if config.rollout.rollout_engine == "sglang":
        from megatron_bupo.rollout.sglang.servers import check_servers

        check_servers(config.sglang, os.environ.get(API_KEY_VARIABLE))


def make_source(
    config: TrainConfig, arch: Architecture, prompts: PromptSet | None, state: ParallelState, dtype: torch.dtype
) -> RolloutSource:
    """The source that the flags ask for, ready to answer; without prompts a replay. Collective.

    Raises:
        UsageError: an engine that cannot start; a reward function that cannot be loaded.
    """
    rollout, data = config.rollout, config.data
    if prompts is None:
        assert rollout.load_rollouts is not None
        return Replay(rollout.load_rollouts)
    tokenizer = load_tokenizer(config.model.hf_model)
    params = sampling_params(rollout, config.model.hf_model, tokenizer, config.run.seed)

    def rewards() -> RewardRunner | None:
        if state.rank > 0:
            return None
        return RewardRunner(data.reward, timeout_s=data.reward_timeout, num_workers=data.reward_workers)

    if rollout.rollout_engine == "sglang":
        served = _start_served_engine(config, arch, state)
        return ServedGeneration(served, prompts, tokenizer, rewards(), rollout, params, state)
    from megatron_bupo.rollout.local import LocalEngine

    size = rollout.rollout_micro_batch_size
    engine = LocalEngine(config.model.hf_model, dtype, state.device, max_batch_size=size)
    return EmbeddedGeneration(engine, prompts, tokenizer, rewards(), rollout, params, state)


def _start_served_engine(config: TrainConfig, arch: Architecture, state: ParallelState) -> SGLangEngine | None:
    """The engine with its servers, on the first rank; the others wait until those are ready."""
    engines: list[SGLangEngine] = []  # an engine stays where it is: only the end of its start is told to all
    on_first_rank(state, lambda: engines.append(_served_engine(config, arch, state.device)))
    return engines[0] if engines else None


def _served_engine(config: TrainConfig, arch: Architecture, device: torch.device) -> SGLangEngine:
    from megatron_bupo.rollout.sglang.engine import SGLangEngine
    from megatron_bupo.rollout.sglang.servers import Servers
    from megatron_bupo.rollout.weight_sync.sync import WeightSync

    flags, model, run = config.sglang, config.model, config.run
    servers = Servers.start(
        flags,
        model.hf_model,
        "bf16" if model.bf16 else "fp32",
        run.seed,
        Path(run.save) / "sglang" if run.save else None,
        os.environ.get(API_KEY_VARIABLE),
    )
    # Gloo or NCCL joins processes on one kind of device; messages go everywhere, but take ten times as long.
    same_kind = {worker.info.device for worker in servers.workers} == {device.type}
    method = ("distributed" if same_kind else "tensor") if flags.weight_sync == "auto" else flags.weight_sync
    folder = flags.weight_sync_dir or (str(Path(run.save) / "sglang" / "weights") if run.save else None)
    sync = WeightSync(
        method,
        bucket_bytes=flags.weight_sync_bucket_mb * 2**20,
        timeout_s=flags.weight_sync_timeout,
        folder=Path(folder) if folder else None,
        hf_model=model.hf_model,
        vocab_size=arch.vocab_size,
        tied=arch.tied,
    )
    shown = ", ".join(f"{w.name} (sglang {w.info.version}, {w.info.device})" for w in servers.workers)
    print(f"SGLang: {shown} ready; weights by {method}")
    return SGLangEngine(
        servers,
        sync,
        concurrency=flags.sglang_concurrency,
        request_timeout_s=flags.sglang_request_timeout,
        health_timeout_s=flags.sglang_health_timeout,
        attempts=flags.sglang_attempts,
    )
