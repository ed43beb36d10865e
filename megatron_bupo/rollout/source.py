"""Where the rollouts of a step come from: generated and rewarded now, or replayed from files."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch.distributed as dist
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from megatron_bupo.config.rollout import RolloutConfig
from megatron_bupo.data.rollout_files import read_rollouts, step_file
from megatron_bupo.parallel.setup import Processes
from megatron_bupo.parallel.shared_work import on_first_rank
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
from megatron_bupo.rollout.prompting import Prompting
from megatron_bupo.samples import Rollout


@dataclass(frozen=True)
class RolloutBatch:
    """Rollouts in record order, the same on every rank; seconds by kind of work.

    `timed_out` says of which the reward is 0.0 because no verdict came in time; empty for a replay.
    """

    rollouts: list[Rollout]
    timed_out: list[bool] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def reward_timeouts(self) -> int:
        return sum(self.timed_out)


class RolloutSource(Protocol):
    """Gives the training loop the rollouts of a step and takes the new weights. Every call is a collective."""

    def rollouts(self, step: int) -> RolloutBatch: ...

    def update_weights(self, model: TrainedModel, version: str) -> None: ...

    def close(self) -> None: ...


class Replay:
    """Rollouts of an earlier run, read from files. Weights are not used: nothing is generated."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def rollouts(self, step: int) -> RolloutBatch:
        return RolloutBatch(read_rollouts(step_file(self._folder, step)))

    def update_weights(self, model: TrainedModel, version: str) -> None:
        """Does nothing; the tensors are not gathered."""

    def close(self) -> None:
        """Does nothing."""


class ResponseGenerator(Protocol):
    """An engine as all ranks use it together. Every call but `close` is a collective."""

    def update_weights(self, model: TrainedModel, version: str) -> None: ...

    def responses(self, requests: list[GenerationRequest], params: SamplingParams) -> list[Generation]:
        """One response per request, in their order, on every rank."""

    def close(self) -> None: ...


class EmbeddedGeneration:
    """An engine in every process; each process answers its share.

    A response depends on (seed, step, prompt, sample) alone, so the shares change nothing.
    """

    def __init__(self, engine: RolloutEngine, state: Processes) -> None:
        self._engine, self._state = engine, state

    def update_weights(self, model: TrainedModel, version: str) -> None:
        self._engine.update_weights(model, version)

    def responses(self, requests: list[GenerationRequest], params: SamplingParams) -> list[Generation]:
        return generate_shared(self._engine, requests, params, self._state)

    def close(self) -> None:
        self._engine.close()


class ServedGeneration:
    """An engine on the first rank alone, which talks to servers; the other ranks take part when it needs the weights.

    Args:
        engine: None on all other ranks.
    """

    def __init__(self, engine: RolloutEngine | None, state: Processes) -> None:
        self._engine, self._state = engine, state
        self._model: LedModel | None = None

    def update_weights(self, model: TrainedModel, version: str) -> None:
        led = self._model = LedModel(model, self._state)
        led.run(lambda: self._first_ranks_engine.update_weights(led, version))

    def responses(self, requests: list[GenerationRequest], params: SamplingParams) -> list[Generation]:
        assert self._model is not None, "the engine has no weights yet"
        return self._model.run(lambda: generate_with_bar(self._first_ranks_engine, requests, params))

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()

    @property
    def _first_ranks_engine(self) -> RolloutEngine:
        assert self._engine is not None, "only the first rank has the engine"
        return self._engine


class GradedGeneration:
    """Generates responses to any requests, and computes their rewards on the first rank. Every call is a collective.

    Args:
        rewards: of the first rank; None on all others. They are closed with this object, as the generator is.
        keep_logprobs: as for `to_rollouts`.
    """

    def __init__(
        self,
        generator: ResponseGenerator,
        rewards: RewardRunner | None,
        tokenizer: PreTrainedTokenizerBase,
        state: Processes,
        *,
        keep_logprobs: bool = True,
    ) -> None:
        assert (rewards is not None) == (state.rank == 0), "the first rank, and only it, has the reward workers"
        self._generator, self._rewards, self._tokenizer = generator, rewards, tokenizer
        self._state, self._keep_logprobs = state, keep_logprobs
        try:
            on_first_rank(state, lambda: self._reward_runner.wait_until_loaded())
        except Exception:
            self.close()
            raise

    def answer(
        self, requests: list[GenerationRequest], params: SamplingParams, samples_per_prompt: int
    ) -> RolloutBatch:
        """The responses to the requests, in their order, with rewards."""
        started = time.perf_counter()
        generations = self._generator.responses(requests, params)
        unrewarded = to_rollouts(
            requests, generations, samples_per_prompt, self._tokenizer, keep_logprobs=self._keep_logprobs
        )
        generated = time.perf_counter()
        result = on_first_rank(self._state, lambda: self._reward_runner.score(unrewarded))
        rollouts = [rollout.with_reward(reward) for rollout, reward in zip(unrewarded, result.rewards, strict=True)]
        seconds = {"generate": generated - started, "reward": time.perf_counter() - generated}
        return RolloutBatch(rollouts, result.timed_out, seconds)

    def update_weights(self, model: TrainedModel, version: str) -> None:
        self._generator.update_weights(model, version)

    def close(self) -> None:
        self._generator.close()
        if self._rewards is not None:
            self._rewards.close()

    @property
    def _reward_runner(self) -> RewardRunner:
        assert self._rewards is not None, "only the first rank has the reward workers"
        return self._rewards


class PromptedSource:
    """Responses to the prompts of a step, with rewards."""

    def __init__(self, graded: GradedGeneration, prompting: Prompting, config: RolloutConfig) -> None:
        self.graded, self._prompting, self._config = graded, prompting, config

    def rollouts(self, step: int) -> RolloutBatch:
        params, samples = self._prompting.params, self._config.n_samples_per_prompt
        prompts = self._prompting.prompts.batch(step, self._config.rollout_batch_size, params.seed)
        return self.graded.answer(make_requests(prompts, step, samples), params, samples)

    def update_weights(self, model: TrainedModel, version: str) -> None:
        self.graded.update_weights(model, version)

    def close(self) -> None:
        self.graded.close()


class FirstStepKept:
    """A source whose first step can be read before the training begins, without generating it twice."""

    def __init__(self, source: RolloutSource) -> None:
        self._source = source
        self._first: RolloutBatch | None = None

    def first_step(self) -> RolloutBatch:
        """What `rollouts(1)` returns, which may still be called once."""
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
    # Only the first rank shows a bar, for its own share.
    generated = generate_with_bar(engine, requests[state.rank :: state.world_size], params, hide=state.rank > 0)
    shares: list[list[Generation]] = [[]] * state.world_size
    dist.all_gather_object(shares, generated, group=state.host_group)
    return [shares[index % state.world_size][index // state.world_size] for index in range(len(requests))]


def generate_with_bar(
    engine: RolloutEngine, requests: Sequence[GenerationRequest], params: SamplingParams, *, hide: bool = False
) -> list[Generation]:
    """The engine's responses, with a progress bar where there is a terminal."""
    with tqdm(total=len(requests), desc="generate", unit=" resp", leave=False, disable=hide or None) as bar:
        return engine.generate(list(requests), params, bar.update)


def to_rollouts(
    requests: Sequence[GenerationRequest],
    generations: Sequence[Generation],
    samples_per_prompt: int,
    tokenizer: PreTrainedTokenizerBase,
    *,
    keep_logprobs: bool = True,
) -> list[Rollout]:
    """Rollout records without reward. The text is for rewards and readers; training uses the tokens.

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
