"""The cluster, a tiny model to train on it, and jobs of the example scripts."""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.sglang.conftest import CPU_FLAGS, VOCAB_SIZE, sglang_python, tiny_qwen3
from tests.integration.slurm.cluster import Cluster, missing
from tests.integration.slurm.jobs import HOLD, RUN, Training

__all__ = ["cluster", "sglang_python", "tiny_qwen3", "training"]

# Half of the tokens even is what random ones reach. While HOLD is there, a run stands still after the steps in it.
REWARD = """
import time
from pathlib import Path

HOLD, METRICS = Path({hold!r}), Path({metrics!r})


def even(record):
    while HOLD.exists() and METRICS.exists() and METRICS.read_text().count("\\n") >= int(HOLD.read_text()):
        time.sleep(0.1)
    return sum(token % 2 == 0 for token in record["response_tokens"]) / len(record["response_tokens"])
"""


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Four idle nodes; gone with everything on them when the tests end, however they end."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm")) as started:
        yield started


@pytest.fixture
def training(tmp_path: Path, cluster: Cluster, sglang_python: Path, tiny_qwen3: Path) -> Training:
    """Four steps of 2 x 4 responses of the tiny model, with everything in a folder of their own."""
    rng = random.Random(0)
    rows = [{"prompt": f"w{rng.randrange(2, VOCAB_SIZE)} w7", "answer": "0"} for _ in range(8)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = shutil.copytree(tiny_qwen3, tmp_path / "model")
    metrics = tmp_path / RUN / "metrics.jsonl"
    (tmp_path / "reward.py").write_text(REWARD.format(hold=str(tmp_path / HOLD), metrics=str(metrics)))
    (tmp_path / "config.yaml").write_text(
        f"""
hf-model: {model}
prompt-data: [{tmp_path}/prompts.jsonl]
reward: {tmp_path}/reward.py:even
reward-timeout: 1800
train-iters: 4
rollout-batch-size: 2
n-samples-per-prompt: 4
rollout-max-response-len: 8
lr: 1.0e-3
"""
    )
    settings = {
        "CONFIG": str(tmp_path / "config.yaml"),
        "HF_MODEL": str(model),
        "DTYPE": "float32",
        "RUN": str(tmp_path / RUN),
        "SAVE_INTERVAL": "1",
        "PYTHON": sys.executable,
        "SGLANG_PYTHON": str(sglang_python),
        "SGLANG_ARGS": CPU_FLAGS,
        "OMP_NUM_THREADS": "1",
    }
    return Training(cluster, tmp_path, settings)
