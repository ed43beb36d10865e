"""`train` from the command line with servers that run already: flags, engine, weights and metrics together."""

from __future__ import annotations

import json
import random
from pathlib import Path

from megatron_bupo.analysis.plots import read_metrics
from megatron_bupo.data.rollout_files import read_rollouts, step_file
from megatron_bupo.rollout.sglang.servers import Servers
from tests.integration.sglang.conftest import VOCAB_SIZE
from tests.parallel.launch import torchrun


def test_three_steps_over_the_switch(servers: Servers, tiny_qwen3: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = [{"prompt": f"w{rng.randrange(2, VOCAB_SIZE)} w7", "answer": "0"} for _ in range(8)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "reward.py").write_text("def even(record):\n    return record['response_tokens'][0] % 2\n")
    urls = [worker.client.url for worker in servers.workers]
    prompts, reward = str(tmp_path / "prompts.jsonl"), f"{tmp_path / 'reward.py'}:even"
    sizes = ["--rollout-batch-size", "4", "--n-samples-per-prompt", "4", "--rollout-max-response-len", "12"]
    phases = ["--train-iters", "3", "--internal-layer", "2", "--internal-steps", "1", "--lr", "1e-2"]
    engine = ["--rollout-engine", "sglang", "--sglang-url", *urls, "--sglang-concurrency", "3"]
    sync = ["--weight-sync", "disk", "--weight-sync-dir", str(tmp_path / "weights"), "--logprob-diff-alarm", "1e-9"]
    outputs = ["--save", str(tmp_path / "run"), "--save-rollouts", str(tmp_path / "rollouts")]
    model = ["--hf-model", str(tiny_qwen3), "--pipeline-model-parallel-size", "2"]
    words = ["train", *model, "--prompt-data", prompts, "--reward", reward, *sizes, *phases, *engine, *sync, *outputs]
    result = torchrun(2, "-m", "megatron_bupo", *words)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "weights by disk, draws at random" in result.stdout
    # Rounding alone is above a bound this small: a line for every step says so.
    assert result.stdout.count("above --logprob-diff-alarm 1e-09") == 3, result.stdout + result.stderr
    metrics = read_metrics(tmp_path / "run")
    assert [step["phase"] for step in metrics] == ["layer:2", "full", "full"]
    assert max(step["logprob_diff_max"] for step in metrics) < 1e-4
    versions = [{r.weight_version for r in read_rollouts(step_file(tmp_path / "rollouts", step))} for step in (1, 2, 3)]
    assert versions == [{"0"}, {"1"}, {"2"}]
    assert all(step["update_norm/embedding"] > 0 for step in metrics), "the weights of each version are other ones"
    assert list((tmp_path / "weights").iterdir()) == []  # a run that ends removes what it wrote
