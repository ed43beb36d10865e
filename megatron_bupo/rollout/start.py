"""Where rollouts come from: a replay, the embedded engine, or SGLang servers."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_bupo.architectures.architecture import Architecture
from megatron_bupo.config.evaluate import EvaluateConfig
from megatron_bupo.config.train import TrainConfig
from megatron_bupo.imports import without_gc
from megatron_bupo.parallel.setup import Processes
from megatron_bupo.parallel.shared_work import on_first_rank
from megatron_bupo.policy_spec import PolicySpec
from megatron_bupo.rewards.runner import RewardRunner
from megatron_bupo.rollout.engine import RolloutEngine
from megatron_bupo.rollout.prompting import Prompting
from megatron_bupo.rollout.source import (
    EmbeddedGeneration,
    GradedGeneration,
    PromptedSource,
    Replay,
    ResponseGenerator,
    RolloutSource,
    ServedGeneration,
)

FULL = PolicySpec()


def check_source(config: TrainConfig | EvaluateConfig) -> None:
    """Raise UsageError for an engine that could not start; nothing is started here."""
    if config.rollout.rollout_engine == "sglang":
        from megatron_bupo.rollout.sglang.start import check_servers

        check_servers(config.sglang)


def make_source(
    config: TrainConfig,
    arch: Architecture,
    prompting: Prompting | None,
    state: Processes,
    others: Sequence[Prompting] = (),
) -> RolloutSource:
    """The source that the flags ask for, ready to answer; a replay if there are no prompts. Collective.

    Args:
        others: prompts of evaluations, which the engine will answer as well.

    Raises:
        UsageError: as `graded_generation`.
    """
    if prompting is None:
        assert config.rollout.load_rollouts is not None
        return Replay(config.rollout.load_rollouts)
    return PromptedSource(graded_generation(config, arch, [prompting, *others], state), prompting, config.rollout)


def graded_generation(
    config: TrainConfig | EvaluateConfig,
    arch: Architecture,
    promptings: Sequence[Prompting],
    state: Processes,
    policy: PolicySpec = FULL,
) -> GradedGeneration:
    """The engine and the reward that the flags ask for, ready for any of these prompts. Collective.

    Args:
        policy: what the embedded engine samples from; servers have the full one.

    Raises:
        UsageError: an engine that cannot start; a reward function that cannot be loaded.
    """
    rollout, data = config.rollout, config.data
    generator: ResponseGenerator
    if rollout.rollout_engine == "sglang":
        longest = max(len(prompt.tokens) for prompting in promptings for prompt in prompting.prompts.prompts)
        generator = _served_generation(config, arch, longest, state)
    else:
        with without_gc():
            from megatron_bupo.rollout.local import LocalEngine
        size = rollout.rollout_micro_batch_size
        engine = LocalEngine(config.model.hf_model, config.model.dtype, state.device, policy, max_batch_size=size)
        generator = EmbeddedGeneration(engine, state)
    rewards = None
    if state.rank == 0:
        rewards = RewardRunner(data.reward, timeout_s=data.reward_timeout, num_workers=data.reward_workers)
    return GradedGeneration(generator, rewards, promptings[0].tokenizer, state, keep_logprobs=policy.is_full)


def _served_generation(
    config: TrainConfig | EvaluateConfig, arch: Architecture, longest_prompt: int, state: Processes
) -> ServedGeneration:
    """Starts the servers on the first rank; the other ranks wait until they are ready."""
    from megatron_bupo.rollout.sglang.start import start_engine

    engines: list[RolloutEngine] = []  # the engine stays on the first rank: on_first_rank sends what its work returns
    on_first_rank(state, lambda: engines.append(start_engine(config, arch, longest_prompt, state.device)))
    return ServedGeneration(engines[0] if engines else None, state)
