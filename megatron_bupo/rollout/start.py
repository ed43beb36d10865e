"""Where `train` gets its rollouts from: a replay, the embedded engine, or SGLang servers."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from megatron_bupo.architectures.architecture import Architecture
from megatron_bupo.config.train import TrainConfig
from megatron_bupo.data.prompts import PromptSet
from megatron_bupo.data.tokenizer import load_tokenizer
from megatron_bupo.imports import without_gc
from megatron_bupo.parallel.first_rank import on_first_rank
from megatron_bupo.parallel.setup import ParallelState
from megatron_bupo.rewards.runner import RewardRunner
from megatron_bupo.rollout.prompting import sampling_params
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
    config: TrainConfig, arch: Architecture, prompts: PromptSet | None, state: ParallelState
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
        served = _start_served_engine(config, arch, prompts, state)
        return ServedGeneration(served, prompts, tokenizer, rewards(), rollout, params, state)
    with without_gc():
        from megatron_bupo.rollout.local import LocalEngine
    size = rollout.rollout_micro_batch_size
    engine = LocalEngine(config.model.hf_model, config.model.dtype, state.device, max_batch_size=size)
    return EmbeddedGeneration(engine, prompts, tokenizer, rewards(), rollout, params, state)


def _start_served_engine(
    config: TrainConfig, arch: Architecture, prompts: PromptSet, state: ParallelState
) -> SGLangEngine | None:
    """The engine with its servers, on the first rank; the others wait until those are ready."""
    from megatron_bupo.rollout.sglang.start import start_engine

    engines: list[SGLangEngine] = []  # an engine stays where it is: only the end of its start is told to all
    on_first_rank(state, lambda: engines.append(start_engine(config, arch, prompts, state.device)))
    return engines[0] if engines else None
