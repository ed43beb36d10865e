"""Responses of the engine over two real servers, against HuggingFace in fp32 on the weights that were pushed last."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_bupo.errors import UsageError
from megatron_bupo.rollout.engine import Generation, GenerationRequest, SamplingParams, make_requests
from megatron_bupo.rollout.sampling import keep_nucleus
from megatron_bupo.rollout.sglang.engine import SGLangEngine
from megatron_bupo.rollout.sglang.scheduling import Limits
from megatron_bupo.rollout.sglang.servers import Servers
from megatron_bupo.rollout.sglang.weight_sync.sync import WeightSync
from megatron_bupo.samples import Prompt
from tests.integration.sglang.conftest import VOCAB_SIZE

EOS = 1  # of the model's folder


class HFModel:
    """A TrainedModel: HuggingFace's, in this process, with other weights than the servers loaded."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float().eval()
        self.model.requires_grad_(False)
        torch.manual_seed(seed)
        for parameter in self.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        self.model.get_input_embeddings().weight[EOS] *= 2  # so that it is drawn often after some tokens

    def hf_tensors(self, since: str | None = None) -> Iterator[tuple[str, Tensor]]:
        yield from self.model.named_parameters()

    def logprobs(self, tokens: list[int]) -> list[float]:
        return self.dense(tokens, 1.0)

    def dense(self, tokens: list[int], temperature: float) -> list[float]:
        """Log-probs of tokens[1:] at a temperature."""
        logits = self.model(torch.tensor([tokens])).logits[0, :-1] / temperature
        chosen: list[float] = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[1:, None])[:, 0].tolist()
        return chosen

    def next_logits(self, tokens: list[int]) -> Tensor:
        """Of the token after these, [V]."""
        logits: Tensor = self.model(torch.tensor([tokens])).logits[0, -1]
        return logits


def make_engine(servers: Servers, folder: Path, *, health_timeout_s: float = 60.0) -> SGLangEngine:
    """An engine that is not closed: the servers are those of all tests, and this method of sync needs no end."""
    sync = WeightSync(
        "tensor",
        bucket_bytes=200_000,
        timeout_s=120.0,
        folder=None,
        hf_model=str(folder),
        vocab_size=VOCAB_SIZE,
        tied=True,
    )
    limits = Limits(concurrency=32, attempts=3, request_timeout_s=300.0, health_timeout_s=health_timeout_s)
    return SGLangEngine(servers, sync, limits)


def make_prompts(count: int) -> list[Prompt]:
    return [Prompt(i, [(7 * i + 11 * j) % VOCAB_SIZE for j in range(3 + i)], "") for i in range(count)]


def assert_matches(
    requests: Sequence[GenerationRequest], answers: list[Generation], model: HFModel, version: str, temperature: float
) -> None:
    assert len(answers) == len(requests)
    for request, answer in zip(requests, answers, strict=True):
        assert answer.weight_version == version
        prompt = request.prompt.tokens
        expected = model.dense(prompt + answer.tokens, temperature)[len(prompt) - 1 :]
        assert answer.logprobs == pytest.approx(expected, abs=1e-4)


@pytest.fixture(scope="module")
def model(tiny_qwen3: Path) -> HFModel:
    return HFModel(tiny_qwen3, seed=5)


@pytest.fixture(scope="module")
def engine(servers: Servers, tiny_qwen3: Path, model: HFModel) -> SGLangEngine:
    engine = make_engine(servers, tiny_qwen3)
    engine.update_weights(model, "3")
    return engine


def test_logprobs_are_those_of_the_pushed_weights(engine: SGLangEngine, model: HFModel) -> None:
    requests = make_requests(make_prompts(8), step=1, num_samples=4)
    done: list[int] = []
    answers = engine.generate(requests, SamplingParams(0.7, 0.9, 40, (), seed=1), done.append)
    assert_matches(requests, answers, model, "3", temperature=0.7)
    assert sum(done) == len(requests)
    assert all((len(answer.tokens), answer.finish_reason) == (40, "length") for answer in answers)
    assert len({tuple(answer.tokens) for answer in answers}) == len(answers)


def test_stop_tokens_end_a_response_and_are_part_of_it(engine: SGLangEngine, model: HFModel) -> None:
    stops = (EOS, *range(2, VOCAB_SIZE, 12))
    requests = make_requests(make_prompts(8), step=1, num_samples=4)
    answers = engine.generate(requests, SamplingParams(1.0, 1.0, 12, stops, seed=1))
    assert_matches(requests, answers, model, "3", temperature=1.0)
    reasons = Counter(answer.finish_reason for answer in answers)
    assert min(reasons["stop"], reasons["length"]) >= 3
    for answer in answers:
        assert not set(answer.tokens[:-1]) & set(stops)
        assert (answer.tokens[-1] in stops) == (answer.finish_reason == "stop")
        assert answer.finish_reason == "stop" or len(answer.tokens) == 12


def test_the_end_token_of_the_server_counts_only_if_it_is_ours(engine: SGLangEngine, model: HFModel) -> None:
    likely = max(([token] for token in range(2, VOCAB_SIZE)), key=lambda at: model.next_logits(at).softmax(-1)[EOS])
    assert model.next_logits(likely).softmax(-1)[EOS] > 0.2
    requests = make_requests([Prompt(0, likely, "")], step=1, num_samples=64)
    answers = engine.generate(requests, SamplingParams(1.0, 1.0, 5, (), seed=1))
    assert any(EOS in answer.tokens[:-1] for answer in answers)
    assert all((len(answer.tokens), answer.finish_reason) == (5, "length") for answer in answers)
    with pytest.raises(UsageError, match=rf"at token {EOS}, which is none of the run's stop tokens \[298\]"):
        engine.generate(requests, SamplingParams(1.0, 1.0, 5, (298,), seed=1))


def test_first_tokens_follow_the_softmax_in_the_nucleus(engine: SGLangEngine, model: HFModel) -> None:
    count, prompt = 800, make_prompts(6)[5]
    answers = engine.generate(
        make_requests([prompt], step=1, num_samples=count), SamplingParams(0.7, 0.9, 1, (), seed=1)
    )
    expected = keep_nucleus(model.next_logits(prompt.tokens)[None] / 0.7, 0.9)[0].softmax(-1) * count
    seen = torch.bincount(torch.tensor([answer.tokens[0] for answer in answers]), minlength=VOCAB_SIZE)
    assert seen[expected == 0].sum() == 0
    often = expected >= 5
    assert often.sum() >= 8
    rare = ~often & (expected > 0)
    pairs = [(seen[often], expected[often]), (seen[rare].sum()[None], expected[rare].sum()[None].clamp(min=1))]
    chi_square = float(sum(((number - mean) ** 2 / mean).sum() for number, mean in pairs))
    freedom = int(often.sum())
    # Its mean is `freedom`, its variance twice that: six standard deviations.
    assert chi_square < freedom + 6 * (2 * freedom) ** 0.5
    assert chi_square > freedom / 6  # too good: the draws would not be independent


def test_a_prompt_that_is_too_long_ends_the_batch_and_nothing_more(engine: SGLangEngine, model: HFModel) -> None:
    prompts = [*make_prompts(3), Prompt(77, [9] * 505, "")]
    params = SamplingParams(0.7, 0.9, 40, (), seed=1)
    with pytest.raises(UsageError, match=r"prompt 77 \(505 tokens\), sample \d is refused: .*/generate: 400 .*context"):
        engine.generate(make_requests(prompts, step=1, num_samples=4), params)
    requests = make_requests(prompts[:3], step=1, num_samples=4)
    assert_matches(requests, engine.generate(requests, params), model, "3", temperature=0.7)
