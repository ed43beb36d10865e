"""The examples of docs/extending.md, each by itself."""

import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from megatron_bupo.rewards.runner import RewardRunner
from megatron_bupo.rl.advantage import compute_advantages
from megatron_bupo.rl.builtin import load_estimator
from megatron_bupo.rl.loss import LossInputs
from megatron_bupo.rollout.engine import GenerationRequest, SamplingParams
from megatron_bupo.samples import Prompt, Rollout
from megatron_bupo.user_code import UserFunction
from tests.unit.pages import code_blocks, extended_project, write_block

PAGE = "extending.md"


def load(name: str, function: str, folder: Path) -> Any:
    return UserFunction.parse("--mine", f"{write_block(PAGE, name, folder)}:{function}", "inputs", ()).load()


def test_the_page_has_the_examples_that_are_tested_here() -> None:
    assert {Path(name).name for name in code_blocks(PAGE)} == {
        "mine_loss.py", "policy_gradient.py", "mine_estimator.py", "sign.py", "mine_reward.py", "mine_engine.py",
        "mistral.py", "quick.py",
    }  # fmt: skip


def test_the_loss(tmp_path: Path) -> None:
    """Two responses with mean log-ratios 1e-4 (inside the clip) and 1 (outside, advantage above 0)."""
    gspo = load("mine_loss.py", "gspo", tmp_path)
    inputs = LossInputs(
        logprobs=torch.tensor([-1.0, -1.9998, -1.0]),
        entropy=torch.zeros(3),
        old_logprobs=torch.tensor([-1.0, -2.0, -2.0]),
        advantages=torch.tensor([2.0, 2.0, 1.0]),
        response_mask=torch.tensor([True, True, True]),
        tokens=torch.tensor([5, 6, 7]),
        segments=torch.tensor([0, 0, 1]),
        num_responses=2,
    )
    outputs = gspo(inputs)
    torch.testing.assert_close(
        outputs.per_token, torch.tensor([-2 * math.exp(1e-4)] * 2 + [-1.0004]), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(outputs.metrics["sequence_ratio"][2], torch.tensor(math.e))


def test_the_estimator(tmp_path: Path) -> None:
    write_block(PAGE, "mine_estimator.py", tmp_path)
    name = f"{tmp_path / 'mine_estimator.py'}:median_and_length"
    rollouts = [Rollout(0, [1], [2] * length, reward=reward) for length, reward in ((1, 0.0), (2, 1.0), (3, 1.0))]
    found = compute_advantages(load_estimator(name), name, rollouts)
    torch.testing.assert_close(found, torch.tensor([-1.001, -0.002, -0.003]))


def test_the_reward(tmp_path: Path) -> None:
    file = write_block(PAGE, "mine_reward.py", tmp_path)
    rollouts = [Rollout(0, [1], [2, 3], response=text, answer="7") for text in ("it is 7", "it is 8")]
    with RewardRunner(f"{file}:short_and_right") as runner:
        assert runner.score(rollouts).rewards == pytest.approx([0.98, -0.02])


def test_the_engine(tmp_path: Path) -> None:
    engine = runpy.run_path(str(write_block(PAGE, "mine_engine.py", tmp_path)))["ConstantEngine"]([5, 2], -0.5)

    class Model:
        def hf_tensors(self) -> Any:
            return iter([("w", torch.zeros(1))])

    engine.update_weights(Model(), "3")
    params = SamplingParams(temperature=1.0, top_p=1.0, max_new_tokens=4, stop_token_ids=(2,), seed=0)
    (answer,) = engine.generate([GenerationRequest(Prompt(0, [1], "x"), 0, 1)], params)
    assert (answer.tokens, answer.logprobs, answer.weight_version) == ([5, 2], [-0.5, -0.5], "3")


BUILT_IN = """
import contextlib, io, json, sys
from megatron_bupo.config.command_line import parse
from megatron_bupo.errors import UsageError

words = json.loads(sys.argv[1])
config = parse("train", words)
refusal = None
try:
    parse("train", [*words, "--gradient-weight", "-1"])
except UsageError as error:
    refusal = str(error)
with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
    parse("train", ["--help"])
is_torch_free = "torch" not in sys.modules

import torch
from types import SimpleNamespace
from megatron_bupo.rl.advantage import AdvantageInputs
from megatron_bupo.rl.builtin import load_estimator, load_loss

inputs = SimpleNamespace(advantages=torch.tensor([2.0]), logprobs=torch.tensor([-1.0]))
loss = load_loss(config.algorithm.loss, config.algorithm.losses)(inputs).per_token.tolist()
rewards = torch.tensor([0.0, 3.0, 0.5], dtype=torch.float64)
advantages = load_estimator(config.algorithm.advantage_estimator)(AdvantageInputs(rewards, [0, 0, 0], []))
print(json.dumps([loss, advantages.tolist(), refusal, printed.getvalue(), is_torch_free]))
"""


def run_extended(script: str, folder: Path, *words: str) -> Any:
    """What a script prints as JSON in a copy of the project with the page's files in it."""
    project = extended_project(PAGE, folder / "project")
    done = subprocess.run(
        [sys.executable, "-c", script, *words], cwd=project, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(project)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_built_in_loss_and_a_built_in_estimator_are_one_new_file_each(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (tmp_path / "prompts.jsonl").write_text("{}\n")
    words = ["--hf-model", str(model), "--prompt-data", str(tmp_path / "prompts.jsonl"), "--train-iters", "2"]
    words += ["--loss", "policy-gradient", "--gradient-weight", "3", "--advantage-estimator", "sign"]
    loss, advantages, refusal, help_text, is_torch_free = run_extended(BUILT_IN, tmp_path, json.dumps(words))
    assert loss == [6.0]  # -3 * 2 * -1
    assert advantages == [-1.0, 1.0, -1.0]
    assert refusal == "--gradient-weight -1.0: must be greater than 0"
    assert "--gradient-weight" in help_text and "policy-gradient, ppo-clip" in help_text and "sign" in help_text
    assert is_torch_free


PRESET = """
import json, sys
from megatron_bupo.config.command_line import parse

config = parse("evaluate", json.loads(sys.argv[1]))
print(json.dumps([config.num_samples("math500"), config.rollout.rollout_temperature]))
"""


def test_a_preset_is_one_new_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "math500.jsonl").write_text("{}\n")
    words = ["--hf-model", str(tmp_path), "--prompt-data", str(tmp_path / "math500.jsonl")]
    words += ["--output", str(tmp_path / "out"), "--preset", "quick"]
    assert run_extended(PRESET, tmp_path, json.dumps(words)) == [4, 0.8]


FAMILY = """
import json, sys
from pathlib import Path
from megatron_bupo.architectures.families import read_architecture
from megatron_bupo.architectures.table import table_for
from megatron_bupo.errors import UsageError

shapes = table_for(read_architecture(sys.argv[1])).hf_shapes()
file = Path(sys.argv[1], "config.json")
config = json.loads(file.read_text())
refusals = []
for window in ({"sliding_window": 8}, {}):
    file.write_text(json.dumps({key: config[key] for key in config if key != "sliding_window"} | window))
    try:
        read_architecture(sys.argv[1])
    except UsageError as error:
        refusals.append(str(error))
print(json.dumps([shapes, refusals]))
"""


def test_a_family_is_one_new_file(tmp_path: Path) -> None:
    """Its table has the tensors of transformers' model; windows are refused, as a number and by default."""
    config = MistralConfig(
        vocab_size=11, hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=6, sliding_window=None,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    shapes, refusals = run_extended(FAMILY, tmp_path, str(tmp_path))
    state = MistralForCausalLM(config).state_dict()
    assert {name: tuple(shape) for name, shape in shapes.items()} == {name: p.shape for name, p in state.items()}
    assert [refusal.partition(": ")[2] for refusal in refusals] == [
        "sliding_window is set or missing; only null, attention without a window, is supported"
    ] * 2
