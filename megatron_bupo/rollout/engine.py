"""The interface of a rollout engine: tokens in, tokens with log-probs out, weights by HuggingFace name.

No text is passed: decoding a response and encoding it again may give other tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from megatron_bupo.errors import UsageError
from megatron_bupo.samples import Prompt

Progress = Callable[[int], object]
"""Called with the number of responses that were just finished: `tqdm.update`, for example."""


@dataclass(frozen=True)
class SamplingParams:
    """How responses are drawn. `seed` is the run's; `stop_token_ids` end a response and are part of it."""

    temperature: float
    top_p: float
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]
    seed: int

    def __post_init__(self) -> None:
        assert 0.0 < self.temperature < float("inf") and 0.0 < self.top_p <= 1.0 and self.max_new_tokens >= 1, self


@dataclass(frozen=True)
class GenerationRequest:
    """A request for one response. (step, prompt.index, sample) names it within a run and seeds its noise."""

    prompt: Prompt
    sample: int
    step: int

    @property
    def identity(self) -> tuple[int, int, int]:
        return self.step, self.prompt.index, self.sample


@dataclass(frozen=True)
class Generation:
    """A response. `tokens` include the stop token.

    `logprobs`, one per token in nats, are of the policy sampled from, at the temperature, before top-p.
    """

    tokens: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]
    weight_version: str


class TrainedModel(Protocol):
    """The model in training, as an engine uses it. Every call is a collective: all ranks take part in it."""

    def hf_tensors(self, since: str | None = None) -> Iterable[tuple[str, Tensor]]:
        """HuggingFace names and full (unsharded) tensors, always in the same order. A tied unembedding is not sent.

        `since` is a version that the engine took over from this model: tensors that have not changed since then may be
        left out, as those that an internal policy does not train.
        """

    def logprobs(self, tokens: list[int]) -> list[float]:
        """Log-probs of tokens[1:], each given what precedes it: full policy, temperature 1, nats."""


class RolloutEngine(ABC):
    """Generates responses with weights that the trainer pushes. In this process, or behind a server."""

    @abstractmethod
    def generate(
        self, requests: list[GenerationRequest], params: SamplingParams, progress: Progress | None = None
    ) -> list[Generation]:
        """One response per request, in the order of the requests."""

    @abstractmethod
    def update_weights(self, model: TrainedModel, version: str) -> None:
        """Take over the present weights of `model`. Responses generated afterwards carry `version`."""

    @abstractmethod
    def close(self) -> None:
        """Release model, servers, files and connections of the engine. Safe to call twice."""


def make_requests(prompts: list[Prompt], step: int, num_samples: int) -> list[GenerationRequest]:
    """`num_samples` requests per prompt, those of a prompt side by side.

    If a prompt occurs twice (the epoch may end within a batch), the numbers of its samples continue: equal numbers
    would give equal noise, and so equal responses.
    """
    seen: Counter[int] = Counter()
    requests = []
    for prompt in prompts:
        first = seen[prompt.index]
        requests += [GenerationRequest(prompt, sample, step) for sample in range(first, first + num_samples)]
        seen[prompt.index] += num_samples
    return requests


def stop_token_ids(hf_folder: str | Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that end a response: those of config.json, of generation_config.json and the tokenizer's.

    All of them: an SGLang server stops at each of them, and no flag turns that off.

    Raises:
        UsageError: a file that cannot be read.
    """
    folder = Path(hf_folder)
    sources: list[type[GenerationConfig] | type[AutoConfig]] = [AutoConfig]
    if (folder / "generation_config.json").is_file():
        sources.append(GenerationConfig)
    ids = {tokenizer.eos_token_id}
    for source in sources:
        try:
            config = source.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UsageError(f"{folder}: no usable config.json or generation_config.json ({reason})") from error
        listed = getattr(config, "eos_token_id", None)
        ids |= set(listed if isinstance(listed, list) else [listed])
    return tuple(sorted(ids - {None}))
