"""Generation does not use what transformers has deprecated: users would see the warning at every step."""

import warnings
from pathlib import Path

import pytest
import torch

from megatron_bupo.rollout.engine import SamplingParams, make_requests
from megatron_bupo.rollout.local import LocalEngine
from megatron_bupo.samples import Prompt
from tests.parallel.references import configs, write_model

PARAMS = SamplingParams(temperature=1.0, top_p=1.0, max_new_tokens=4, stop_token_ids=(), seed=1)


@pytest.mark.parametrize("family", ["qwen3-tied", "qwen2-tied", "llama-tied"])
def test_generation_warns_of_nothing(family: str, tmp_path: Path) -> None:
    write_model(configs()[family], tmp_path / "model")
    prompts = [Prompt(0, [5, 6, 7], "x"), Prompt(1, [8, 9], "y")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine = LocalEngine(tmp_path / "model", torch.float32, torch.device("cpu"), max_batch_size=4)
        assert len(engine.generate(make_requests(prompts, 1, 2), PARAMS)) == 4
