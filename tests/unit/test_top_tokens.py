"""The top tokens of a policy along a given response, against HuggingFace's modules caught by hooks."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_bupo.policy_spec import PolicySpec
from megatron_bupo.rollout.local import LocalEngine
from tests.parallel.references import SPECS, VOCAB_SIZE, configs, policy_logits, write_model

CPU = torch.device("cpu")
PROMPT, RESPONSE = [5, 17, 60], [9, 9, 100, 0, 42]
MODELS = ("qwen3-tied", "llama-untied")
CASES = [("qwen3-tied", spec) for spec in SPECS] + [
    ("llama-untied", spec) for spec in ("full", "layer:2", "attn:3@norm")
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    root = tmp_path_factory.mktemp("models")
    return {name: (root / name, write_model(configs()[name], root / name)) for name in MODELS}


def _engine(folder: Path, spec: str, dtype: torch.dtype = torch.float32) -> LocalEngine:
    return LocalEngine(folder, dtype, CPU, PolicySpec.parse(spec), max_batch_size=2)


@torch.no_grad()
def _expected(model: Any, spec: str, temperature: float) -> torch.Tensor:
    """Probabilities fp32 [R, V] of the positions that predict RESPONSE."""
    logits = policy_logits(model, torch.tensor(PROMPT + RESPONSE), PolicySpec.parse(spec))
    return torch.softmax(logits[len(PROMPT) - 1 : -1] / temperature, dim=-1)


@pytest.mark.parametrize(("name", "spec"), CASES)
def test_top_tokens_equal_a_dense_computation(name: str, spec: str, models: dict[str, tuple[Path, Any]]) -> None:
    folder, model = models[name]
    engine = _engine(folder, spec)
    for temperature in (1.0, 0.5):
        expected = _expected(model, spec, temperature)
        ids, probabilities = engine.top_tokens(PROMPT, RESPONSE, 3, temperature)
        assert ids.shape == probabilities.shape == (len(RESPONSE), 3)
        assert (ids.dtype, probabilities.dtype) == (torch.int64, torch.float32)
        # By value, so that a near tie may fall either way: the ids have these probabilities, and none is above them.
        assert (expected.gather(1, ids) - probabilities).abs().max() < 1e-5
        assert (expected.sort(descending=True).values[:, :3] - probabilities).abs().max() < 1e-5
        assert all(len(set(row)) == 3 for row in ids.tolist())


def test_one_token_and_more_choices_than_words(models: dict[str, tuple[Path, Any]]) -> None:
    folder, model = models["qwen3-tied"]
    ids, probabilities = _engine(folder, "layer:2").top_tokens(PROMPT, RESPONSE[:1], 1000, 1.0)
    assert sorted(ids[0].tolist()) == list(range(VOCAB_SIZE))
    assert probabilities.sum() == pytest.approx(1.0, abs=1e-5)
    assert (_expected(model, "layer:2", 1.0)[0].gather(0, ids[0]) - probabilities[0]).abs().max() < 1e-5


def test_softmax_is_fp32_in_a_bf16_model(models: dict[str, tuple[Path, Any]]) -> None:
    folder, _ = models["llama-untied"]
    ids, probabilities = _engine(folder, "full", torch.bfloat16).top_tokens(PROMPT, RESPONSE, VOCAB_SIZE, 1.0)
    assert probabilities.dtype == torch.float32 and ids.shape == (len(RESPONSE), VOCAB_SIZE)
    assert (probabilities.sum(dim=-1) - 1).abs().max() < 1e-6  # in bf16 the sum would be off by 1e-3


def test_a_closed_engine_holds_no_model(models: dict[str, tuple[Path, Any]]) -> None:
    """Several policies are loaded one after the other: two copies at a time might not fit."""
    engine = _engine(models["qwen3-tied"][0], "attn:3")
    engine.top_tokens(PROMPT, RESPONSE, 1, 1.0)
    weight = weakref.ref(next(engine._model.parameters()))  # type: ignore[union-attr]
    gc.disable()
    try:
        engine.close()
        assert weight() is None
    finally:
        gc.enable()
    with pytest.raises(AssertionError, match="closed"):
        engine.top_tokens(PROMPT, RESPONSE, 1, 1.0)
