"""A model in one process, for notebooks and scripts: what its full and internal policies say of a text.

    import megatron_bupo as mb

    lens = mb.load("models/SmolLM2-135M-Instruct")
    lens.score("2 + 3 = 5", "full", "layer:25").frame()      # log-prob and entropy of every token
    lens.top_tokens("The capital of France is", "full", "layer:25", k=3)
    lens.states("2 + 3 = 5")["resid_post"]                   # [L, S, H]
    lens.entropy_flow(["2 + 3 = 5", "3 + 4 = 7"]).frame()    # a row for each layer
    lens.generate("2 + 3 =", "layer:25", max_new_tokens=8)

A text is a string, a list of token ids, or a pair (prompt, response) of these, of which the response alone is measured.
Strings are tokenized as they stand. Of a text that is no pair, everything behind the first token is measured.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_bupo.analysis.flow_file import EntropyFlow, check_measurable
from megatron_bupo.config import launch
from megatron_bupo.config.model import ModelConfig
from megatron_bupo.config.train import ParallelConfig
from megatron_bupo.data.chat import ChatFormat
from megatron_bupo.data.tokenizer import load_tokenizer
from megatron_bupo.errors import UsageError
from megatron_bupo.parallel.setup import ParallelState, parallel_state
from megatron_bupo.policy_spec import PolicySpec
from megatron_bupo.rollout.engine import SamplingParams, make_requests, stop_token_ids
from megatron_bupo.samples import MicroBatch, Prompt, Rollout
from megatron_bupo.weights.hf_files import open_model

if TYPE_CHECKING:
    from pandas import DataFrame  # type: ignore[import-untyped]

    from megatron_bupo.rollout.local import LocalEngine

Tokens: TypeAlias = "str | Sequence[int]"
Text: TypeAlias = "Tokens | tuple[Tokens, Tokens]"
MAX_TOKENS = 4096  # that are packed into one forward
BATCH_SIZE = 32  # responses that are generated together
_OPEN = ExitStack()  # holds the process group, which would end with the last reference to its context


@dataclass(frozen=True)
class Scores:
    """Log-probs and entropies, in nats.

    `tokens` has the measured tokens of every text as text; `logprobs` and `entropy` have for every policy one fp32
    tensor [R] a text, of the position that predicts the token.
    """

    tokens: list[list[str]]
    logprobs: dict[str, list[Tensor]]
    entropy: dict[str, list[Tensor]]

    def frame(self) -> DataFrame:
        """A row for each token and policy: text (from 0), position (from 1), token, policy, logprob, entropy."""
        from pandas import DataFrame

        rows = [
            (
                text,
                position + 1,
                token,
                policy,
                float(logprobs[text][position]),
                float(self.entropy[policy][text][position]),
            )
            for policy, logprobs in self.logprobs.items()
            for text, tokens in enumerate(self.tokens)
            for position, token in enumerate(tokens)
        ]
        return DataFrame(rows, columns=["text", "position", "token", "policy", "logprob", "entropy"])


def load(folder: str | Path, *, bf16: bool = False) -> PolicyLens:
    """Open a HuggingFace folder in this process, on its GPU if there is one.

    Raises:
        UsageError: a folder that is no model of a known family, or a process that torchrun started.
    """
    return PolicyLens(folder, bf16=bf16)


@functools.cache
def _process() -> ParallelState:
    """The process group of this process alone, which all models share and which ends with Python."""
    if launch.world_size() > 1:
        raise UsageError(f"a lens works in one process, torchrun started {launch.world_size()}; use the commands there")
    return _OPEN.enter_context(parallel_state(ParallelConfig(), seed=0))


class PolicyLens:
    """See the module. `num_layers`, `tokenizer` and `folder` say what is open."""

    def __init__(self, folder: str | Path, *, bf16: bool = False) -> None:
        config = ModelConfig(str(folder), bf16)
        config.check()
        arch, _, weights = open_model(config.hf_model, ParallelConfig())
        self.folder, self.num_layers = Path(folder), arch.num_layers
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(folder)
        self._dtype, self._arch, self._state = config.dtype, arch, _process()
        from megatron_bupo.model.parallel_model import ParallelModel

        self._model = ParallelModel(arch, weights, ParallelConfig(), self._state, self._dtype)
        self._engine: tuple[PolicySpec, LocalEngine] | None = None

    def score(self, texts: Text | list[Text], *policies: str, temperature: float = 1.0) -> Scores:
        """Log-probs and entropies of the measured tokens under every policy (the full one if none is named)."""
        from megatron_bupo.model.scoring import score_rollouts

        rollouts = self._rollouts(texts)
        logprobs, entropy = {}, {}
        for spec in self._specs(policies):
            scores = score_rollouts(self._model, rollouts, spec, temperature, MAX_TOKENS)
            logprobs[str(spec)] = [torch.tensor(score.logprobs) for score in scores]
            entropy[str(spec)] = [torch.tensor(score.entropy) for score in scores]
        return Scores([self._words(rollout.response_tokens) for rollout in rollouts], logprobs, entropy)

    def top_tokens(self, text: Text, *policies: str, k: int = 5, temperature: float = 1.0) -> DataFrame:
        """The k most likely tokens at every measured position and after the end, where `token` is None.

        Columns: position (from 1), token, policy, rank (from 1), choice, probability.
        """
        from pandas import DataFrame

        from megatron_bupo.model.logits import policy_logits

        [rollout] = self._rollouts([text], fewest=1)
        tokens = torch.tensor(rollout.prompt_tokens + rollout.response_tokens)
        words: list[str | None] = [*self._words(rollout.response_tokens), None]
        rows = []
        for spec in self._specs(policies):
            logits = policy_logits(self._model.chunks, tokens, spec, self._state, self._arch.vocab_size)
            assert logits is not None, "one process has every stage"
            top = (logits[-len(words) :].float() / temperature).softmax(-1).topk(min(k, logits.shape[-1]))
            for position, word in enumerate(words):
                choices = zip(self._words(top.indices[position].tolist()), top.values[position].tolist(), strict=True)
                rows += [(position + 1, word, str(spec), rank + 1, *choice) for rank, choice in enumerate(choices)]
        return DataFrame(rows, columns=["position", "token", "policy", "rank", "choice", "probability"])

    def states(self, text: Text) -> dict[str, Tensor]:
        """The hidden states of all S tokens of a text, [L, S, H] each, by their names in TransformerLens.

        resid_pre is H_{l-1}, attn_out A_l, mlp_out F_l and resid_post H_l (arXiv 2512.19673), in the model's dtype.
        """
        from megatron_bupo.model.capture import captured_states
        from megatron_bupo.model.policy import run_schedule

        [rollout] = self._rollouts([text], fewest=1)
        tokens = torch.tensor(rollout.prompt_tokens + rollout.response_tokens)
        every, none = torch.arange(len(tokens)), torch.zeros_like(tokens)
        ends = torch.tensor([0, len(tokens)], dtype=torch.int32)
        batch = MicroBatch(tokens, ends, every, none, none, none.float(), [0]).to(self._state.device)
        with captured_states(self._model.chunks, [batch]) as states:
            run_schedule(
                self._model.chunks,
                [batch],
                PolicySpec(),
                self._state,
                lambda view, hidden, batch: (hidden, lambda hidden, non_loss_data: hidden),
                forward_only=True,
            )
        names = {"resid_pre": "below", "attn_out": "attn", "mlp_out": "ffn", "resid_post": "resid"}
        return {name: torch.stack([getattr(layer, own) for layer in states[0]]) for name, own in names.items()}

    def entropy_flow(self, texts: Text | list[Text], *, final_norm: bool = False) -> EntropyFlow:
        """Every layer's numbers over the measured tokens, with stages and suggested layer (docs/entropy_flow.md)."""
        from megatron_bupo.analysis.entropy_flow import measure

        rollouts = self._rollouts(texts)
        check_measurable(rollouts, "the texts")
        measured = measure(self._model, rollouts, MAX_TOKENS, final_norm=final_norm, heatmap=1)
        return measured.summary(self.folder.resolve().name, measured.heatmap(1, self.tokenizer))

    def generate(
        self,
        prompts: str | list[Any],
        policy: str = "full",
        *,
        num_samples: int = 1,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 1234,
    ) -> list[Rollout]:
        """Responses sampled from a policy, those of a prompt side by side; their `response` is the text.

        A prompt is a string (raw text) or a list of messages, which goes through the model's chat template.
        """
        from megatron_bupo.rollout.source import to_rollouts

        is_one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], dict))
        texts = [
            prompt if isinstance(prompt, str) else ChatFormat(self.tokenizer).text(prompt)
            for prompt in ([prompts] if is_one else prompts)
        ]
        requests = make_requests(
            [Prompt(index, self._ids(text), text) for index, text in enumerate(texts)], 1, num_samples
        )
        ends = stop_token_ids(self.folder, self.tokenizer)
        params = SamplingParams(temperature, top_p, max_new_tokens, ends, seed)
        [spec] = self._specs((policy,))
        generations = self._engine_for(spec).generate(requests, params)
        return to_rollouts(requests, generations, num_samples, self.tokenizer, keep_logprobs=spec.is_full)

    def _engine_for(self, spec: PolicySpec) -> LocalEngine:
        """The engine of the policy that was sampled from last stays, with a copy of the model."""
        from megatron_bupo.rollout.local import LocalEngine

        if self._engine is None or self._engine[0] != spec:
            self._engine = None
            engine = LocalEngine(self.folder, self._dtype, self._state.device, spec, max_batch_size=BATCH_SIZE)
            self._engine = spec, engine
        return self._engine[1]

    def _specs(self, policies: Sequence[str]) -> list[PolicySpec]:
        specs = [PolicySpec.parse(policy) for policy in policies or ("full",)]
        for spec in specs:
            spec.check(self.num_layers)
        return specs

    def _rollouts(self, texts: Text | list[Text], fewest: int = 2) -> list[Rollout]:
        """The texts as prompt and response. Raises UsageError: fewer tokens than that, or ids beyond the vocabulary."""
        is_one = not isinstance(texts, list) or all(isinstance(text, int) for text in texts)
        rollouts = []
        for index, text in enumerate([texts] if is_one else texts):
            prompt, response = self._split(text)
            if not prompt or len(prompt) + len(response) < fewest:
                raise UsageError(f"text {index}: has too few tokens; give {fewest} or more")
            if not all(0 <= token < self._arch.vocab_size for token in (*prompt, *response)):
                raise UsageError(f"text {index}: has tokens beyond the vocabulary of {self._arch.vocab_size}")
            rollouts.append(Rollout(index, prompt, response))
        return rollouts

    def _split(self, text: Any) -> tuple[list[int], list[int]]:
        """Prompt and response of a Text, as token ids."""
        if isinstance(text, tuple) and len(text) == 2 and not isinstance(text[0], int):
            return self._ids(text[0]), self._ids(text[1])
        tokens = self._ids(text)
        return tokens[:1], tokens[1:]

    def _ids(self, text: Any) -> list[int]:
        if isinstance(text, str):
            return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return [int(token) for token in text]

    def _words(self, tokens: Sequence[int]) -> list[str]:
        return [self.tokenizer.decode([token]) for token in tokens]
