"""Where the rollouts of a step come from: generated and rewarded now, or replayed from files."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch.distributed as dist
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from megatron_bupo.config.rollout import RolloutConfig
from megatron_bupo.data.prompts import PromptSet
from megatron_bupo.data.rollout_files import read_rollouts, step_file
from megatron_bupo.parallel.first_rank import on_first_rank
from megatron_bupo.parallel.setup import ParallelState, Processes
from megatron_bupo.rewards.runner import RewardRunner
from megatron_bupo.rollout.engine import (
    Generation,
    GenerationRequest,
    RolloutEngine,
    SamplingParams,
    TrainedModel,
    make_requests,
)
from megatron_bupo.rollout.led_model import LedModel
from megatron_bupo.samples import Rollout


@dataclass(frozen=True)
class RolloutBatch:
    """The responses of one step in record order, the same on every rank, and what it took to get them."""

    rollouts: list[Rollout]
    reward_timeouts: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


class RolloutSource(Protocol):
    """What the training loop asks for at the start of a step, and tells at its end. Every call is a collective."""

    def rollouts(self, step: int) -> RolloutBatch: ...

    def update_weights(self, model: TrainedModel, version: str) -> None: ...

    def close(self) -> None: ...


class Replay:
    """Rollouts of an earlier run, as they stand. Weights go nowhere: nothing is generated."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def rollouts(self, step: int) -> RolloutBatch:
        return RolloutBatch(read_rollouts(step_file(self._folder, step)))

    def update_weights(self, model: TrainedModel, version: str) -> None:
        """Nothing generates here; the tensors are not even gathered."""

    def close(self) -> None:
        """Nothing is held."""


class PromptedSource(ABC):
    """Prompts that an engine answers, rewarded on the first rank."""

    def __init__(
        self,
        prompts: PromptSet,
        tokenizer: PreTrainedTokenizerBase,
        rewards: RewardRunner | None,
        config: RolloutConfig,
        params: SamplingParams,
        state: ParallelState,
    ) -> None:
        assert (rewards is not None) == (state.rank == 0), "the first rank, and only it, has the reward workers"
        self._prompts, self._tokenizer, self._rewards = prompts, tokenizer, rewards
        self._config, self._params, self._state = config, params, state
        try:
            on_first_rank(state, lambda: self._reward_runner.wait_until_loaded())
        except Exception:
            self.close()
            raise

    @abstractmethod
    def update_weights(self, model: TrainedModel, version: str) -> None:
        """Hand the model's weights to the engine."""

    @abstractmethod
    def _responses(self, requests: list[GenerationRequest]) -> list[Generation]:
        """One response per request, in their order, on every rank."""

    @abstractmethod
    def _close_engine(self) -> None:
        """Give back what the engine holds. Safe to call twice."""

    def rollouts(self, step: int) -> RolloutBatch:
        started = time.perf_counter()
        prompts = self._prompts.batch(step, self._config.rollout_batch_size, self._params.seed)
        requests = make_requests(prompts, step, self._config.n_samples_per_prompt)
        generations = self._responses(requests)
        unrewarded = to_rollouts(requests, generations, self._config.n_samples_per_prompt, self._tokenizer)
        generated = time.perf_counter()
        result = on_first_rank(self._state, lambda: self._reward_runner.score(unrewarded))
        rollouts = [rollout.with_reward(reward) for rollout, reward in zip(unrewarded, result.rewards, strict=True)]
        seconds = {"generate": generated - started, "reward": time.perf_counter() - generated}
        return RolloutBatch(rollouts, result.timeouts, seconds)

    def close(self) -> None:
        self._close_engine()
        if self._rewards is not None:
            self._rewards.close()

    @property
    def _reward_runner(self) -> RewardRunner:
        assert self._rewards is not None, "asked for on the first rank alone"
        return self._rewards


class EmbeddedGeneration(PromptedSource):
    """An engine in every process, each answering its share.

    A response depends on (seed, step, prompt, sample) alone, so the shares change nothing.
    """

    def __init__(self, engine: RolloutEngine, *others: Any) -> None:
        self._engine = engine
        super().__init__(*others)

    def update_weights(self, model: TrainedModel, version: str) -> None:
        self._engine.update_weights(model, version)

    def _responses(self, requests: list[GenerationRequest]) -> list[Generation]:
        return generate_shared(self._engine, requests, self._params, self._state)

    def _close_engine(self) -> None:
        self._engine.close()


class ServedGeneration(PromptedSource):
    """Servers, which the first rank alone talks to; the others wait for it, and take part when it needs the weights."""

    def __init__(self, engine: RolloutEngine | None, *others: Any) -> None:
        self._engine = engine
        self._model: LedModel | None = None
        super().__init__(*others)

    def update_weights(self, model: TrainedModel, version: str) -> None:
        led = self._model = LedModel(model, self._state)
        led.run(lambda: self._first_ranks_engine.update_weights(led, version))

    def _responses(self, requests: list[GenerationRequest]) -> list[Generation]:
        assert self._model is not None, "weights are handed over before anything is generated"
        return self._model.run(lambda: self._generate(requests))

    def _generate(self, requests: list[GenerationRequest]) -> list[Generation]:
        with tqdm(total=len(requests), desc="generate", unit=" resp", leave=False, disable=None) as bar:
            return self._first_ranks_engine.generate(requests, self._params, bar.update)

    def _close_engine(self) -> None:
        if self._engine is not None:
            self._engine.close()

    @property
    def _first_ranks_engine(self) -> RolloutEngine:
        assert self._engine is not None, "asked for on the first rank alone"
        return self._engine


class FirstStepKept:
    """A source whose first step is wanted before the training begins: it is not generated twice."""

    def __init__(self, source: RolloutSource) -> None:
        self._source = source
        self._first: RolloutBatch | None = None

    def first_step(self) -> RolloutBatch:
        """What `rollouts(1)` will return once more."""
        if self._first is None:
            self._first = self._source.rollouts(1)
        return self._first

    def rollouts(self, step: int) -> RolloutBatch:
        kept, self._first = self._first, None
        return kept if kept is not None and step == 1 else self._source.rollouts(step)

    def update_weights(self, model: TrainedModel, version: str) -> None:
        self._source.update_weights(model, version)

    def close(self) -> None:
        self._source.close()


def generate_shared(
    engine: RolloutEngine, requests: Sequence[GenerationRequest], params: SamplingParams, state: Processes
) -> list[Generation]:
    """All responses, in the order of the requests, on every rank; each rank generates every world_size-th."""
    mine = list(requests[state.rank :: state.world_size])
    # The first rank's share stands for all; no bar where there is no terminal.
    with tqdm(total=len(mine), desc="generate", unit=" resp", leave=False, disable=state.rank > 0 or None) as bar:
        generated = engine.generate(mine, params, bar.update)
    shares: list[list[Generation]] = [[]] * state.world_size
    dist.all_gather_object(shares, generated, group=state.host_group)
    return [shares[index % state.world_size][index // state.world_size] for index in range(len(requests))]


def to_rollouts(
    requests: Sequence[GenerationRequest],
    generations: Sequence[Generation],
    samples_per_prompt: int,
    tokenizer: PreTrainedTokenizerBase,
    *,
    keep_logprobs: bool = True,
) -> list[Rollout]:
    """Rollout records, still without reward. The text is for rewards and readers: training sees the tokens.

    Args:
        keep_logprobs: whether the engine's log-probs are those of the full policy, which is what a record holds.
    """
    return [
        Rollout(
            group=index // samples_per_prompt,
            prompt_tokens=request.prompt.tokens,
            response_tokens=generation.tokens,
            prompt=request.prompt.text,
            response=tokenizer.decode(generation.tokens, skip_special_tokens=True),
            answer=request.prompt.answer,
            rollout_logprobs=generation.logprobs if keep_logprobs else None,
            finish_reason=generation.finish_reason,
            weight_version=generation.weight_version,
            data_source=request.prompt.data_source,
        )
        for index, (request, generation) in enumerate(zip(requests, generations, strict=True))
    ]
