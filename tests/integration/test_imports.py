"""What the commands do without: modules by name, which would cost seconds before the first answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_bupo.data.rollout_files import write_rollouts
from tests.parallel.references import configs, random_rollouts, write_model
from tests.parallel.test_generation import write_tokenizer

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, sys
from megatron_bupo.__main__ import main
assert main(sys.argv[1:]) == 0
print(json.dumps(sorted(sys.modules)))
"""
SELDOM = {
    "datasets",
    "pandas",
    "math_verify",
    "httpx",
    "aiohttp",
    "torch._inductor.lowering",
    "torch._inductor.compile_fx",
}
FIGURES = {"matplotlib", "rich"}
ENGINE = {"transformers.modeling_utils", "torch._dynamo.convert_frame"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imports")
    write_model(configs()["qwen3-tied"], folder / "model")
    write_tokenizer(folder / "model")
    (folder / "prompts.jsonl").write_text('{"prompt": "w2 w3", "answer": "1"}\n' * 2)
    write_rollouts(folder / "rollouts.jsonl", random_rollouts(2, seed=1))
    return folder


@pytest.mark.parametrize(
    ("words", "without"),
    [
        (
            "score --hf-model model --rollouts rollouts.jsonl --output scores.jsonl",
            SELDOM | FIGURES | ENGINE | {"transformers", "pyarrow"},
        ),
        (
            "generate --hf-model model --prompt-data prompts.jsonl --rollout-max-response-len 2 --output out.jsonl",
            SELDOM | {"matplotlib", "megatron", "tensorboard"},
        ),
        (
            "train --dry-run --hf-model model --prompt-data prompts.jsonl --train-iters 1 --rollout-batch-size 1 "
            "--rollout-max-response-len 2",
            SELDOM | FIGURES | ENGINE | {"megatron", "tensorboard"},
        ),
        (
            f"plot --flow {ROOT / 'docs' / 'smollm2_flow.json'} --output figures",
            SELDOM | ENGINE | {"rich", "torch", "transformers", "megatron", "tensorboard", "pyarrow"},
        ),
        (
            f"select-layer --flow {ROOT / 'docs' / 'smollm2_flow.json'}",
            SELDOM | FIGURES | ENGINE | {"torch", "transformers", "megatron", "tensorboard", "pyarrow"},
        ),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_a_command_imports_what_it_needs(words: str, without: set[str], folder: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words.split()],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    imported = set(json.loads(ended.stdout.splitlines()[-1]))
    assert "megatron_bupo" in imported
    assert sorted(imported & without) == []
