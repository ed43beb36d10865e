"""`evaluate` with servers that run already: they answer with the weights that are evaluated, not with their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_bupo.data.rollout_files import read_rollouts
from megatron_bupo.policy_spec import PolicySpec
from megatron_bupo.rollout.sglang.servers import Servers
from tests.parallel.launch import assert_passed, torchrun
from tests.parallel.references import reference_scores


def test_the_servers_answer_with_the_weights_that_are_evaluated(
    servers: Servers, tiny_qwen3: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen3, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    model.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(tiny_qwen3).save_pretrained(tmp_path / "other")
    rows = [{"prompt": f"w{index} w7", "answer": "0"} for index in range(2, 7)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["evaluate", "--hf-model", str(tmp_path / "other"), "--prompt-data", str(tmp_path / "sums.jsonl")]
    words += ["--n-samples-per-prompt", "3", "--rollout-max-response-len", "8", "--output", str(tmp_path / "out")]
    urls = [worker.client.url for worker in servers.workers]
    words += ["--rollout-engine", "sglang", "--sglang-url", *urls, "--pipeline-model-parallel-size", "2"]
    assert_passed(torchrun(2, "-m", "megatron_bupo", *words))
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["data"]["sums"]["num_questions"] == 5
    rollouts = read_rollouts(tmp_path / "out" / "responses" / "sums.jsonl")
    assert [rollout.group for rollout in rollouts] == [question for question in range(5) for _ in range(3)]
    assert len({tuple(rollout.response_tokens) for rollout in rollouts}) > 5
    for rollout in rollouts:
        logprobs, _ = reference_scores(model, rollout, PolicySpec(), 1.0)
        assert rollout.rollout_logprobs == pytest.approx(logprobs.tolist(), abs=1e-4)
