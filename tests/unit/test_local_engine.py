"""The embedded engine against HuggingFace in fp32 with eager attention, and its draws against the distribution."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config

from megatron_bupo.errors import UsageError
from megatron_bupo.policy_spec import PolicySpec
from megatron_bupo.rollout.engine import Generation, GenerationRequest, SamplingParams, make_requests, stop_token_ids
from megatron_bupo.rollout.local import LocalEngine
from megatron_bupo.rollout.sampling import batch_noise, choose_tokens, gumbel_noise, keep_nucleus, sample_key
from megatron_bupo.samples import Prompt
from tests.parallel.references import Float64, policy_logits

VOCAB = 61
CPU = torch.device("cpu")
PROMPTS = [Prompt(i, tokens, "") for i, tokens in enumerate([[5, 6, 7], [9], [11, 3, 8, 40, 2, 17], [5, 6]])]


def _write_model(folder: Path, family: str, seed: int) -> Path:
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.15,  # wide enough for policies and positions to differ visibly
        "eos_token_id": [1, 2],
    }
    config = (
        Qwen3Config(**shape, head_dim=16, tie_word_embeddings=True)
        if family == "qwen3"
        else LlamaConfig(**shape, tie_word_embeddings=False)
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # norms of all ones could not be told from no norm's weight
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write_model(tmp_path_factory.mktemp("hf"), request.param, seed=1)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write_model(tmp_path_factory.mktemp("qwen3"), "qwen3", seed=1)


def _engine(folder: Path, policy: str = "full", max_batch_size: int = 8) -> LocalEngine:
    return LocalEngine(folder, torch.float32, CPU, PolicySpec.parse(policy), max_batch_size=max_batch_size)


def _params(
    *, temperature: float = 1.0, top_p: float = 1.0, length: int = 8, stop: tuple[int, ...] = (), seed: int = 7
) -> SamplingParams:
    return SamplingParams(temperature, top_p, length, stop, seed)


def _reference(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def _reference_logprobs(
    folder: Path, policy: str, prompt: list[int], response: list[int], temperature: float
) -> Tensor:
    """[response, V] in float64."""
    with torch.no_grad(), Float64():
        logits = policy_logits(_reference(folder).double(), torch.tensor(prompt + response), PolicySpec.parse(policy))
    return (logits[len(prompt) - 1 : -1] / temperature).log_softmax(dim=-1)


def _close(left: list[Generation], right: list[Generation]) -> None:
    assert [g.tokens for g in left] == [g.tokens for g in right]
    for one, other in zip(left, right, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


@pytest.mark.parametrize(
    "policy",
    ["full", "layer:1", "layer:2", "layer:3", "layer:3@norm", "layer:2@norm", "attn:1", "ffn:2", "attn:3@norm"],
)
def test_logprobs_equal_a_full_forward(folder: Path, policy: str) -> None:
    requests = make_requests(PROMPTS, step=1, num_samples=2)
    generations = _engine(folder, policy).generate(requests, _params(temperature=0.7))
    for request, generation in zip(requests, generations, strict=True):
        assert len(generation.tokens) == 8 and generation.finish_reason == "length"
        table = _reference_logprobs(folder, policy, request.prompt.tokens, generation.tokens, temperature=0.7)
        expected = table.gather(1, torch.tensor(generation.tokens)[:, None]).squeeze(1)
        assert (torch.tensor(generation.logprobs) - expected).abs().max() < 1e-5


def test_every_token_is_the_gumbel_argmax_of_the_reference(folder: Path) -> None:
    request = GenerationRequest(PROMPTS[2], sample=3, step=5)
    [generation] = _engine(folder).generate([request], _params(temperature=1.3))
    table = _reference_logprobs(folder, "full", PROMPTS[2].tokens, generation.tokens, temperature=1.3)
    key = sample_key(7, 5, PROMPTS[2].index, 3)
    noise = torch.stack([torch.from_numpy(gumbel_noise(key, position, VOCAB)) for position in range(8)])
    assert (table + noise).argmax(dim=-1).tolist() == generation.tokens


def test_batching_and_sharing_change_nothing(folder: Path) -> None:
    requests = make_requests(PROMPTS, step=1, num_samples=4)
    params = _params(length=12, stop=tuple(range(6)))  # some stop early, so that batches shrink on the way
    engine = _engine(folder)
    together = engine.generate(requests, params)
    assert len({len(g.tokens) for g in together}) > 2
    _close(engine.generate(requests, params), together)
    _close(_engine(folder, max_batch_size=1).generate(requests, params), together)
    _close(_engine(folder, max_batch_size=5).generate(requests[::-1], params), together[::-1])
    _close(engine.generate(requests[1::2], params), together[1::2])  # the share of one of two replicas


def test_noise_depends_on_seed_step_prompt_and_sample(qwen3: Path) -> None:
    engine = _engine(qwen3)
    base = engine.generate(make_requests(PROMPTS[:1], step=1, num_samples=6), _params())
    assert len({tuple(g.tokens) for g in base}) == 6
    other_seed = engine.generate(make_requests(PROMPTS[:1], step=1, num_samples=6), _params(seed=8))
    other_step = engine.generate(make_requests(PROMPTS[:1], step=2, num_samples=6), _params())
    same_text = engine.generate(make_requests([Prompt(99, PROMPTS[0].tokens, "")], 1, 6), _params())
    for changed in (other_seed, other_step, same_text):
        assert not {tuple(g.tokens) for g in changed} & {tuple(g.tokens) for g in base}


def test_a_prompt_that_comes_twice_gets_further_samples(qwen3: Path) -> None:
    requests = make_requests([PROMPTS[0], PROMPTS[1], PROMPTS[0]], step=1, num_samples=2)
    assert [(r.prompt.index, r.sample) for r in requests] == [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3)]
    with pytest.raises(AssertionError, match="share step, prompt and sample"):
        _engine(qwen3).generate([requests[0], requests[0]], _params())


def test_stop_token_ends_a_response_and_belongs_to_it(folder: Path) -> None:
    requests = make_requests(PROMPTS, step=1, num_samples=2)
    free = _engine(folder).generate(requests, _params())
    stop = free[0].tokens[3]
    stopped = _engine(folder).generate(requests, _params(stop=(stop, VOCAB - 1)))
    for whole, cut in zip(free, stopped, strict=True):
        ends = [i for i, token in enumerate(whole.tokens) if token in (stop, VOCAB - 1)]
        length = ends[0] + 1 if ends else 8
        assert cut.tokens == whole.tokens[:length]
        assert cut.logprobs == pytest.approx(whole.logprobs[:length], abs=1e-5)
        assert cut.finish_reason == ("stop" if ends else "length")
    assert stopped[0].tokens[-1] == stop


def test_progress_counts_every_response_once(qwen3: Path) -> None:
    finished: list[int] = []
    requests = make_requests(PROMPTS, step=1, num_samples=4)
    _engine(qwen3, max_batch_size=5).generate(requests, _params(stop=tuple(range(20))), finished.append)
    assert sum(finished) == len(requests) and len(finished) > 4


def test_top_p_draws_from_the_nucleus_and_reports_the_policy(qwen3: Path) -> None:
    table = _reference_logprobs(qwen3, "full", PROMPTS[0].tokens, [0], temperature=1.0)[0]
    ordered = table.exp().sort(descending=True)
    size = next(n for n in range(1, VOCAB + 1) if ordered.values[:n].sum() >= 0.5)
    nucleus = set(ordered.indices[:size].tolist())
    requests = make_requests(PROMPTS[:1], step=1, num_samples=400)
    generations = _engine(qwen3, max_batch_size=400).generate(requests, _params(top_p=0.5, length=1))
    assert {g.tokens[0] for g in generations} == nucleus
    assert 1 < size < VOCAB // 2
    for generation in generations:
        assert generation.logprobs[0] == pytest.approx(table[generation.tokens[0]].item(), abs=1e-5)


def test_nucleus_by_hand() -> None:
    logits = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log()
    kept = {p: keep_nucleus(logits, p).isfinite()[0].nonzero().flatten().tolist() for p in (0.01, 0.6, 0.9, 0.99)}
    assert kept == {0.01: [1], 0.6: [1, 3], 0.9: [0, 1, 3], 0.99: [0, 1, 2, 3]}
    tokens, logprobs = choose_tokens(logits, torch.zeros(1, 4), temperature=0.5, top_p=0.01)
    assert tokens.tolist() == [1]
    assert logprobs.item() == pytest.approx(math.log(0.25 / (0.0225 + 0.25 + 0.0025 + 0.09)), abs=1e-6)


def test_noise_is_gumbel_and_finite_in_the_tail() -> None:
    noise = np.stack([gumbel_noise(sample_key(0, 1, 2, s), p, 50_000) for s in range(4) for p in range(10)])
    assert noise.dtype == np.float32 and np.isfinite(noise).all()
    draws = noise.astype(np.float64)
    assert abs(draws.mean() - np.euler_gamma) < 0.005 and abs(draws.var() - math.pi**2 / 6) < 0.01
    for x in (-1.0, 0.0, 2.0, 8.0):  # the distribution function is exp(-exp(-x))
        expected = math.exp(-math.exp(-x))
        assert abs((draws < x).mean() - expected) < 5 * math.sqrt(expected * (1 - expected) / draws.size)
    off_diagonal = np.corrcoef(draws) - np.eye(len(draws))
    assert np.abs(off_diagonal).max() < 5 / math.sqrt(50_000)
    # Nor is one position's stream the next one's, shifted: chance alone makes few values meet in fp32.
    assert len(np.intersect1d(noise[0], noise[1])) < 2_500
    assert torch.equal(batch_noise([sample_key(0, 1, 2, 3)], 4, 50_000)[0], torch.from_numpy(noise[34]))


def _trained(tensors: list[tuple[str, torch.Tensor]]) -> Any:
    """A model in training that is these tensors: the embedded engine asks for nothing more."""
    return SimpleNamespace(hf_tensors=lambda since=None: tensors)


def test_weights_are_replaced_by_name(folder: Path, tmp_path: Path) -> None:
    other = _write_model(tmp_path / "other", "qwen3" if "lm_head.weight" not in _names(folder) else "llama", seed=2)
    weights = dict(_reference(other).named_parameters())
    requests = make_requests(PROMPTS, step=1, num_samples=2)
    for policy in ("full", "layer:2", "attn:2@norm"):
        engine = _engine(folder, policy)
        before = engine.generate(requests, _params())
        engine.update_weights(
            _trained([(name, weights[name].detach()) for name in sorted(weights, reverse=True)]), "17"
        )
        after = engine.generate(requests, _params())
        assert {g.weight_version for g in before} == {"0"} and {g.weight_version for g in after} == {"17"}
        assert [g.tokens for g in before] != [g.tokens for g in after]
        _close(after, _engine(other, policy).generate(requests, _params()))


def test_after_the_first_time_only_changed_weights_are_asked_for(qwen3: Path) -> None:
    weights = {name: tensor.detach() for name, tensor in _reference(qwen3).named_parameters()}
    engine, asked = _engine(qwen3), list[str | None]()

    def model(changed: dict[str, torch.Tensor]) -> Any:
        def tensors(since: str | None = None) -> list[tuple[str, torch.Tensor]]:
            asked.append(since)
            return list((weights if since is None else changed).items())

        return SimpleNamespace(hf_tensors=tensors)

    name = "model.layers.0.mlp.up_proj.weight"
    first, other = model({name: 2 * weights[name]}), model({})
    requests = make_requests(PROMPTS, step=1, num_samples=2)
    for number in (1, 2):
        engine.update_weights(first, str(number))
    found = engine.generate(requests, _params())
    engine.update_weights(other, "2")  # another model may have other weights of that name
    assert asked == [None, "1", None]
    doubled = _engine(qwen3)
    doubled.update_weights(_trained([*(weights | {name: 2 * weights[name]}).items()]), "2")
    assert found == doubled.generate(requests, _params())
    assert found != engine.generate(requests, _params())


def _names(folder: Path) -> set[str]:
    return {name for name, _ in _reference(folder).named_parameters()}


def test_incomplete_or_foreign_weights_are_a_bug(qwen3: Path) -> None:
    weights = [(name, tensor.detach()) for name, tensor in _reference(qwen3).named_parameters()]
    engine = _engine(qwen3, "layer:1")
    with pytest.raises(AssertionError, match=r"missing \['model.norm.weight'\]"):  # also where the cut has no norm
        engine.update_weights(_trained([pair for pair in weights if pair[0] != "model.norm.weight"]), "1")
    with pytest.raises(AssertionError, match=r"unexpected lm_head.weight"):  # tied
        engine.update_weights(_trained([*weights, ("lm_head.weight", torch.zeros(VOCAB, 32))]), "1")
    with pytest.raises(AssertionError, match="came twice"):
        engine.update_weights(_trained([weights[0], weights[0]]), "1")
    with pytest.raises(AssertionError, match="has shape"):
        engine.update_weights(_trained([(weights[0][0], torch.zeros(3))]), "1")


def test_weights_that_are_not_finite_are_noticed(qwen3: Path) -> None:
    engine = _engine(qwen3)
    weights = [(name, tensor.detach() * float("nan")) for name, tensor in _reference(qwen3).named_parameters()]
    engine.update_weights(_trained(weights), "1")
    with pytest.raises(FloatingPointError, match="not finite"):
        engine.generate(make_requests(PROMPTS, 1, 1), _params())


def test_bf16_logprobs_are_fp32_and_near(qwen3: Path) -> None:
    engine = LocalEngine(qwen3, torch.bfloat16, CPU, max_batch_size=8)
    [generation] = engine.generate(make_requests(PROMPTS[:1], 1, 1), _params())
    table = _reference_logprobs(qwen3, "full", PROMPTS[0].tokens, generation.tokens, temperature=1.0)
    expected = table.gather(1, torch.tensor(generation.tokens)[:, None]).squeeze(1)
    difference = (torch.tensor(generation.logprobs) - expected).abs()
    assert 0 < difference.max() < 0.3


def test_user_errors(qwen3: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="layers 1 to 3"):
        _engine(qwen3, "layer:4")
    with pytest.raises(UsageError, match="no model that transformers loads") as error:
        _engine(tmp_path)
    assert "\n" not in str(error.value)
    for values in ({"temperature": 0.0}, {"temperature": math.nan}, {"top_p": 0.0}, {"top_p": 1.1}, {"length": 0}):
        with pytest.raises(AssertionError):
            _params(**values)  # type: ignore[arg-type]
    engine = _engine(qwen3)
    engine.close()
    engine.close()
    with pytest.raises(AssertionError, match="closed"):
        engine.generate(make_requests(PROMPTS, 1, 1), _params())


def test_stop_tokens_come_from_model_and_tokenizer(tmp_path: Path, qwen3: Path) -> None:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2, "<eos>": 3}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    without = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert stop_token_ids(qwen3, tokenizer) == (1, 2, 3)  # generation_config.json, written beside the model
    assert stop_token_ids(qwen3, without) == (1, 2)
    LlamaConfig(eos_token_id=5, vocab_size=8).save_pretrained(tmp_path)
    assert stop_token_ids(tmp_path, tokenizer) == (3, 5)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [4, 5]}')
    assert stop_token_ids(tmp_path, tokenizer) == (3, 4, 5)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(UsageError, match=r"no usable config.json or generation_config.json"):
        stop_token_ids(tmp_path, tokenizer)


def _chi_square_p(counts: Tensor, probabilities: Tensor) -> float:
    """P value of Pearson's test; bins that expect less than 5 are pooled."""
    expected = probabilities.double() * counts.sum()
    small = expected < 5
    observed = torch.cat([counts[~small].double(), counts[small].sum(dim=0, keepdim=True).double()])
    expected = torch.cat([expected[~small], expected[small].sum(dim=0, keepdim=True)])
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = ((observed - expected).square() / expected).sum()
    return torch.special.gammaincc((len(expected) - 1) / torch.tensor(2.0).double(), statistic / 2).item()


@pytest.mark.parametrize("policy", ["layer:2", "full"])
def test_first_tokens_follow_the_policy_and_no_other(qwen3: Path, policy: str) -> None:
    temperature = 1.25
    requests = make_requests(PROMPTS[:1], step=1, num_samples=20_000)
    engine = _engine(qwen3, policy, max_batch_size=4_000)
    drawn = [g.tokens[0] for g in engine.generate(requests, _params(temperature=temperature, length=1))]
    counts = torch.bincount(torch.tensor(drawn), minlength=VOCAB)

    def p_value(policy: str, temperature: float) -> float:
        table = _reference_logprobs(qwen3, policy, PROMPTS[0].tokens, [0], temperature)
        return _chi_square_p(counts, table[0].exp())

    others = {"layer:2", "layer:1", "layer:2@norm", "full"} - {policy}
    assert p_value(policy, temperature) > 1e-3
    assert all(p_value(other, temperature) < 1e-6 for other in others)
    assert all(p_value(policy, wrong) < 1e-6 for wrong in (1.0, 1.5))


def test_chi_square_p_by_hand() -> None:
    # (60 - 50)^2 / 50 * 2 = 4 with one degree of freedom: erfc(sqrt(2)).
    assert _chi_square_p(torch.tensor([60, 40]), torch.tensor([0.5, 0.5])) == pytest.approx(math.erfc(math.sqrt(2)))
    pooled = _chi_square_p(torch.tensor([96, 1, 3]), torch.tensor([0.92, 0.04, 0.04]))
    # 16 / 92 + 16 / 8 with one degree of freedom
    assert pooled == pytest.approx(math.erfc(math.sqrt((16 / 92 + 2) / 2)), rel=1e-5)
