"""The closed loop as a user starts it: generate, reward, train, push the weights, generate; in several layouts."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from megatron_bupo.data.rollout_files import read_rollouts, step_file
from megatron_bupo.policy_spec import PolicySpec
from megatron_bupo.samples import Rollout
from tests.parallel.launch import run_several
from tests.parallel.references import VOCAB_SIZE, configs, reference_scores, write_model

STEPS, TEMPERATURE = 3, "0.8"
REWARD = """
def even(record):
    tokens = record["response_tokens"]
    return sum(token % 2 == 0 for token in tokens) / len(tokens)
"""


@dataclass(frozen=True)
class Run:
    """The folder of a finished command."""

    folder: Path

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, without what depends on the clock."""
        lines = (self.folder / "save" / "metrics.jsonl").read_text().splitlines()
        parsed = [json.loads(line) for line in lines]
        timed = {name for name in parsed[0] if name.startswith("time/")} | {"tokens_per_s"}
        return [{name: value for name, value in line.items() if name not in timed} for line in parsed]

    def weights(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = load_file(self.folder / "hf" / "model.safetensors")
        return tensors

    def rollouts(self, step: int) -> list[Rollout]:
        return read_rollouts(step_file(self.folder / "rollouts", step))

    def lines(self, name: str = "out.jsonl") -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]


def write_tokenizer(folder: Path) -> None:
    """One word for every id of the tiny models' vocabulary; <eos> is 0."""
    words = {"<eos>": 0, "<unk>": 1, **{f"w{index}": index for index in range(2, VOCAB_SIZE)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>").save_pretrained(folder)


def write_inputs(folder: Path, config: Any = None) -> None:
    """model/ (qwen3-tied, or of another config) with a tokenizer, prompts.jsonl and reward.py."""
    write_model(config or configs()["qwen3-tied"], folder / "model")
    write_tokenizer(folder / "model")
    rng = random.Random(0)
    prompts = [" ".join(f"w{rng.randrange(2, VOCAB_SIZE)}" for _ in range(rng.randint(1, 9))) for _ in range(10)]
    rows = [json.dumps({"prompt": prompt, "answer": "0"}) + "\n" for prompt in prompts]
    (folder / "prompts.jsonl").write_text("".join(rows))
    (folder / "reward.py").write_text(REWARD)


def train(inputs: Path, out: Path, *flags: str, replay: Path | None = None, seed: int = 7) -> list[str]:
    """Two internal steps and a full one, 16 responses and two optimizer steps each; flags given again win."""
    source = ["--prompt-data", str(inputs / "prompts.jsonl"), "--reward", f"{inputs / 'reward.py'}:even"]
    source += ["--rollout-micro-batch-size", "8", "--save-rollouts", str(out / "rollouts")]
    words = ["train", "--hf-model", str(inputs / "model"), "--policy-schedule", "layer:2x2,full"]
    words += source if replay is None else ["--load-rollouts", str(replay)]
    words += ["--train-iters", str(STEPS), "--rollout-batch-size", "4", "--n-samples-per-prompt", "4"]
    words += ["--global-batch-size", "8", "--lr", "1e-3", "--adam-eps", "1e-3", "--max-tokens-per-micro-batch", "100"]
    words += ["--rollout-max-response-len", "12", "--rollout-temperature", TEMPERATURE, "--seed", str(seed)]
    return [*words, "--save", str(out / "save"), "--save-hf", str(out / "hf"), *flags]


def generate(inputs: Path, out: Path) -> list[str]:
    words = ["generate", "--hf-model", str(inputs / "model"), "--prompt-data", str(inputs / "prompts.jsonl")]
    words += ["--policy", "layer:2", "--n-samples-per-prompt", "3", "--rollout-max-response-len", "9"]
    return [*words, "--seed", "5", "--rollout-micro-batch-size", "8", "--output", str(out / "out.jsonl")]


def score(inputs: Path, out: Path, rollouts: Path, policy: str, temperature: str) -> list[str]:
    words = ["score", "--hf-model", str(inputs / "model"), "--rollouts", str(rollouts), "--policy", policy]
    return [*words, "--rollout-temperature", temperature, "--output", str(out / "out.jsonl")]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generation")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def runs(inputs: Path) -> dict[str, Run]:
    """Commands by name. Those that must not differ from "one" run in other processes than it does."""
    kl = ["--policy-schedule", "full", "--kl-loss-coef", "0.1", "--global-batch-size", "16"]
    saved, generated = inputs / "one" / "rollouts", inputs / "generate" / "out.jsonl"
    first = {
        "one": train(inputs, inputs / "one"),
        "seed": train(inputs, inputs / "seed", "--monitor-responses", "0", seed=8),
        "kl": train(inputs, inputs / "kl", *kl),
        "generate": generate(inputs, inputs / "generate"),
    }
    then = {
        "again": train(inputs, inputs / "again"),
        "replay": train(inputs, inputs / "replay", replay=saved),
        "score": score(inputs, inputs / "score", step_file(saved, 1), "full", TEMPERATURE),
        "score2": score(inputs, inputs / "score2", generated, "layer:2", "1.0"),
    }
    in_two_processes = {
        "DP2": train(inputs, inputs / "DP2"),
        "PP2": train(inputs, inputs / "PP2", "--pipeline-model-parallel-size", "2"),
        "generate2": generate(inputs, inputs / "generate2"),
    }

    def launch(processes: int, *groups: dict[str, list[str]]) -> None:
        for commands in groups:
            run_several(processes, *(["-m", "megatron_bupo", *words] for words in commands.values()))

    with ThreadPoolExecutor(max_workers=2) as pool:
        for launched in [pool.submit(launch, 1, first, then), pool.submit(launch, 2, in_two_processes)]:
            launched.result()
    return {name: Run(inputs / name) for name in (*first, *then, *in_two_processes)}


def assert_equal_weights(one: Run, other: Run, within: float) -> None:
    """`within` 0 is equality to the last bit."""
    ours, theirs = one.weights(), other.weights()
    assert ours.keys() == theirs.keys()
    off = {name: float((ours[name] - theirs[name]).abs().max()) for name in ours}
    assert max(off.values()) <= within, off


def test_the_loop_moves(runs: dict[str, Run], inputs: Path) -> None:
    """What the other tests compare is worth comparing: rewards vary, every layer trained, both phases ran."""
    lines = runs["one"].metrics()
    assert [line["phase"] for line in lines] == ["layer:2", "layer:2", "full"]
    for step in range(1, STEPS + 1):
        rewards = [rollout.reward for rollout in runs["one"].rollouts(step)]
        assert len(set(rewards)) > 4
    assert [rollout.weight_version for rollout in runs["one"].rollouts(3)] == ["2"] * 16
    start = load_file(inputs / "model" / "model.safetensors")
    moved = {name: float((value - start[name]).abs().max()) for name, value in runs["one"].weights().items()}
    assert min(moved.values()) > 1e-4, moved


def test_one_seed_gives_one_result(runs: dict[str, Run]) -> None:
    assert runs["one"].metrics() == runs["again"].metrics()
    assert_equal_weights(runs["one"], runs["again"], within=0.0)
    assert [runs["one"].rollouts(step) for step in (1, 2, 3)] == [runs["again"].rollouts(step) for step in (1, 2, 3)]


def test_another_seed_gives_another_result(runs: dict[str, Run]) -> None:
    tokens, others = ([rollout.response_tokens for rollout in runs[name].rollouts(1)] for name in ("one", "seed"))
    assert tokens != others
    assert runs["one"].metrics() != runs["seed"].metrics()
    assert any(not torch.equal(value, runs["seed"].weights()[name]) for name, value in runs["one"].weights().items())


@pytest.mark.parametrize("layout", ["DP2", "PP2"])
def test_layouts_give_the_same_rollouts_and_weights(layout: str, runs: dict[str, Run]) -> None:
    for step in range(1, STEPS + 1):
        ours, theirs = runs["one"].rollouts(step), runs[layout].rollouts(step)
        for one, other in zip(ours, theirs, strict=True):
            assert (one.group, one.prompt_tokens, one.reward) == (other.group, other.prompt_tokens, other.reward)
            assert one.response_tokens == other.response_tokens
            assert one.rollout_logprobs == pytest.approx(other.rollout_logprobs, rel=0, abs=1e-5)
    assert_equal_weights(runs["one"], runs[layout], within=1e-5)
    for one_line, other_line in zip(runs["one"].metrics(), runs[layout].metrics(), strict=True):
        for name in ("loss", "grad_norm", "entropy", "entropy_full"):
            assert other_line[name] == pytest.approx(one_line[name], rel=1e-4, abs=1e-5), name


def test_engine_logprobs_equal_score(runs: dict[str, Run]) -> None:
    """Step 1 generates with the start model, which `score` reads from its folder."""
    for rollout, scored in zip(runs["one"].rollouts(1), runs["score"].lines(), strict=True):
        assert rollout.rollout_logprobs == pytest.approx(scored["logprobs"], rel=0, abs=1e-4)


@pytest.mark.parametrize("name", ["one", "DP2", "PP2", "kl"])
def test_engine_has_the_trainers_weights_in_every_step(name: str, runs: dict[str, Run]) -> None:
    """A stale or corrupted engine shows here: after an update of 1e-3 its log-probs would be off by far more."""
    for line in runs[name].metrics():
        assert 0 < line["logprob_diff_max"] < 1e-4
        assert 0 < line["logprob_diff_mean"] <= line["logprob_diff_max"]
        assert abs(line["logprob_diff_k3"]) < 1e-8
        assert ("entropy_full" in line) and (line["phase"] != "full" or line["entropy_full"] == line["entropy"])


def test_step_2_generates_with_what_step_1_learned(runs: dict[str, Run], inputs: Path) -> None:
    """The bound of the test above has teeth: the start model gives step 2's tokens other log-probs."""
    model = AutoModelForCausalLM.from_pretrained(inputs / "model", dtype=torch.float32).eval()
    with torch.no_grad():
        off = max(
            float(
                (reference_scores(model, rollout, PolicySpec(), 0.8)[0] - torch.tensor(rollout.rollout_logprobs))
                .abs()
                .max()
            )
            for rollout in runs["one"].rollouts(2)
        )
    assert off > 1e-3


def test_without_monitoring_phase_1_says_nothing_of_the_full_policy(runs: dict[str, Run]) -> None:
    watched = {"entropy_full", "logprob_diff_mean", "logprob_diff_max", "logprob_diff_k3"}
    lines = runs["seed"].metrics()
    assert [len(watched & line.keys()) for line in lines] == [0, 0, 4]
    assert [len(watched & line.keys()) for line in runs["one"].metrics()] == [4, 4, 4]


def test_replay_equals_the_run_that_generated(runs: dict[str, Run]) -> None:
    of_rewards = {"reward_timeouts"}
    for ours, theirs in zip(runs["one"].metrics(), runs["replay"].metrics(), strict=True):
        assert ours.keys() == theirs.keys()
        assert {name: ours[name] for name in ours.keys() - of_rewards} == {
            name: theirs[name] for name in theirs.keys() - of_rewards
        }
    assert_equal_weights(runs["one"], runs["replay"], within=0.0)


def test_kl_to_the_start_model(runs: dict[str, Run], inputs: Path) -> None:
    """k3 of the current policy, whose log-probs the engine noted, to the start model under HuggingFace."""
    start = AutoModelForCausalLM.from_pretrained(inputs / "model", dtype=torch.float32).eval()
    lines = runs["kl"].metrics()
    assert abs(lines[0]["kl"]) < 1e-7
    for step, line in enumerate(lines, start=1):
        kl, count = 0.0, 0
        for rollout in runs["kl"].rollouts(step):
            with torch.no_grad():
                reference, _ = reference_scores(start, rollout, PolicySpec(), 0.8)
            distance = reference.double() - torch.tensor(rollout.rollout_logprobs, dtype=torch.float64)
            kl += float((distance.exp() - distance - 1).sum())
            count += len(rollout.response_tokens)
        assert line["kl"] == pytest.approx(kl / count, rel=1e-3, abs=1e-7)
        # One optimizer step a step: the ratio is 1 only if the policy's weights came back after the reference's.
        assert line["ratio_mean"] == pytest.approx(1.0, abs=1e-6)
    assert lines[2]["kl"] > lines[1]["kl"] > 1e-4


def test_generate_is_the_same_in_one_and_two_processes(runs: dict[str, Run]) -> None:
    one, two = runs["generate"].lines(), runs["generate2"].lines()
    assert one == two
    assert [record["group"] for record in one] == [group for group in range(10) for _ in range(3)]
    for record in one:
        words = [f"w{token}" for token in record["response_tokens"] if token > 1]
        assert record["response"].split() == words
        assert "rollout_logprobs" not in record, "a record's log-probs are the full policy's"
    assert len({tuple(record["response_tokens"]) for record in one}) > 20


def test_generated_responses_score_under_their_policy(runs: dict[str, Run]) -> None:
    """On tokens drawn from the policy itself -log p is the entropy on average: so it is the policy that drew them."""
    records, scores = runs["generate"].lines(), runs["score2"].lines()
    assert [len(score["logprobs"]) for score in scores] == [len(record["response_tokens"]) for record in records]
    logprobs = torch.tensor([value for score in scores for value in score["logprobs"]])
    entropies = torch.tensor([value for score in scores for value in score["entropy"]])
    excess = -logprobs - entropies
    assert abs(float(excess.mean())) < 4 * float(excess.std()) / len(excess) ** 0.5
