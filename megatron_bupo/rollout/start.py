"""Where `train` gets its rollouts from: a replay, the embedded engine, or SGLang servers."""

from __future__ import annotations

from megatron_bupo.architectures.architecture import Architecture
from megatron_bupo.config.train import TrainConfig
from megatron_bupo.imports import without_gc
from megatron_bupo.parallel.setup import ParallelState
from megatron_bupo.parallel.shared_work import on_first_rank
from megatron_bupo.rewards.runner import RewardRunner
from megatron_bupo.rollout.engine import RolloutEngine
from megatron_bupo.rollout.prompting import Prompting
from megatron_bupo.rollout.source import (
    EmbeddedGeneration,
    PromptedSource,
    Replay,
    ResponseGenerator,
    RolloutSource,
    ServedGeneration,
)


def check_source(config: TrainConfig) -> None:
    """Raise UsageError for an engine that could not start; nothing is started here."""
    if config.rollout.rollout_engine == "sglang":
        from megatron_bupo.rollout.sglang.start import check_servers

        check_servers(config.sglang)


def make_source(
    config: TrainConfig, arch: Architecture, prompting: Prompting | None, state: ParallelState
) -> RolloutSource:
    """The source that the flags ask for, ready to answer; a replay if there are no prompts. Collective.

    Raises:
        UsageError: an engine that cannot start; a reward function that cannot be loaded.
    """
    rollout, data = config.rollout, config.data
    if prompting is None:
        assert rollout.load_rollouts is not None
        return Replay(rollout.load_rollouts)
    generator: ResponseGenerator
    if rollout.rollout_engine == "sglang":
        generator = _served_generation(config, arch, prompting, state)
    else:
        with without_gc():
            from megatron_bupo.rollout.local import LocalEngine
        size = rollout.rollout_micro_batch_size
        engine = LocalEngine(config.model.hf_model, config.model.dtype, state.device, max_batch_size=size)
        generator = EmbeddedGeneration(engine, state)
    rewards = None
    if state.rank == 0:
        rewards = RewardRunner(data.reward, timeout_s=data.reward_timeout, num_workers=data.reward_workers)
    return PromptedSource(generator, prompting, rewards, rollout, state)


def _served_generation(
    config: TrainConfig, arch: Architecture, prompting: Prompting, state: ParallelState
) -> ServedGeneration:
    """Starts the servers on the first rank; the other ranks wait until they are ready."""
    from megatron_bupo.rollout.sglang.start import start_engine

    engines: list[RolloutEngine] = []  # the engine stays on the first rank: on_first_rank sends what its work returns
    on_first_rank(state, lambda: engines.append(start_engine(config, arch, prompting.prompts, state.device)))
    return ServedGeneration(engines[0] if engines else None, state)
