"""The numbers of a step, the files that hold them, and the plan of a dry run, on numbers made by hand."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_bupo.architectures.families import read_architecture
from megatron_bupo.config.command_line import parse
from megatron_bupo.config.train import TrainConfig
from megatron_bupo.parallel.reduce import combine
from megatron_bupo.rl.schedule import PolicySchedule
from megatron_bupo.samples import Rollout
from megatron_bupo.training.actor import UpdateResult
from megatron_bupo.training.metrics import (
    MAXIMA,
    console_line,
    engine_alarm,
    loss_metrics,
    means,
    observe,
    rollout_metrics,
)
from megatron_bupo.training.plan import describe_plan, memory_estimate, parameter_counts
from megatron_bupo.training.run_record import describe_run, fingerprint
from megatron_bupo.training.run_state import RunIdentity
from megatron_bupo.training.tracker import Tracker
from tests.parallel.references import configs, write_model


@pytest.mark.parametrize(
    ("mean", "bound", "is_raised"),
    [(0.2, 0.1, True), (0.1, 0.1, False), (0.2, 0.0, False), (math.nan, 0.1, True), (None, 0.1, False)],
)
def test_the_alarm_for_an_engine_that_drifts(mean: float | None, bound: float, is_raised: bool) -> None:
    metrics = {} if mean is None else {"logprob_diff_mean": mean, "logprob_diff_max": 3.0}
    told = engine_alarm(metrics, bound)
    assert (told is not None) == is_raised
    assert told is None or f"above --logprob-diff-alarm {bound}" in told


def observed(
    mask: list[float], engine: list[float] | None, logprobs: list[float], entropy: list[float]
) -> dict[str, Tensor]:
    columns = [torch.tensor(column) for column in (logprobs, entropy, mask)]
    return observe(*columns, None if engine is None else torch.tensor(engine))


def added(*seen: dict[str, Tensor]) -> dict[str, float]:
    """Of several micro-batches: sums, and the largest of the maxima."""
    total: dict[str, float] = {}
    for values in seen:
        combine(total, {name: float(value) for name, value in values.items()}, MAXIMA)
    return total


# --- metrics.py


def test_what_is_observed_of_a_policy_are_means_over_trained_tokens() -> None:
    """Two micro-batches of 3 and 1 trained tokens: a mean of means would give 4.0 for the entropy, not 3.0."""
    seen = [
        observed([1, 1, 0, 1], [-1.0, -2.0, -3.0, -4.0], [-1.1, -2.0, -9.0, -3.8], [1.0, 2.0, 100.0, 3.0]),
        observed([0, 1], [-5.0, -1.0], [-5.0, -1.1], [50.0, 6.0]),
    ]
    found = means(added(*seen))
    k3 = (2 * (math.exp(-0.1) + 0.1 - 1) + (math.exp(0.2) - 0.2 - 1)) / 4
    assert found == pytest.approx(
        {"entropy": 3.0, "logprob_diff_mean": 0.1, "logprob_diff_max": 0.2, "logprob_diff_k3": k3}, rel=1e-5
    )


def test_without_the_engines_logprobs_nothing_is_compared() -> None:
    seen = observed([1, 1], None, [-1.0, -2.0], [0.5, 1.5])
    assert means(added(seen)) == {"entropy": 1.0}


def test_only_tokens_with_known_engine_logprobs_are_compared() -> None:
    known = observed([1, 1], [-1.0, -2.0], [-1.5, -2.0], [1.0, 1.0])
    unknown = observed([1, 1], None, [-9.0, -9.0], [3.0, 3.0])
    found = means(added(known, unknown))
    assert found["entropy"] == 2.0
    assert found["logprob_diff_mean"] == pytest.approx(0.25), "over the two tokens that could be compared"


def test_no_trained_token_at_all() -> None:
    seen = observed([0, 0], [-1.0, -1.0], [-2.0, -2.0], [1.0, 1.0])
    assert means(added(seen)) == {"entropy": 0.0}


def test_what_the_responses_say() -> None:
    def rollout(group: int, prompt: int, response: int, reward: float, finish: str | None) -> Rollout:
        return Rollout(group, [1] * prompt, [2] * response, reward=reward, finish_reason=finish)

    rollouts = [
        rollout(0, 2, 3, 1.0, "stop"),
        rollout(0, 2, 5, 0.0, "length"),
        rollout(1, 4, 1, 0.5, None),
        rollout(1, 4, 3, 0.5, "length"),
        rollout(2, 1, 7, 2.0, "stop"),
        rollout(2, 1, 5, 1.5, "stop"),
    ]
    found = rollout_metrics(rollouts, timeouts=2, seconds={"generate": 1.5, "step": 4.0})
    assert found == {
        "reward_mean": 5.5 / 6,
        "accuracy": 3 / 6,
        "response_len_mean": 4.0,
        "truncated_frac": 2 / 6,
        "zero_spread_groups": 1,
        "reward_timeouts": 2,
        "num_tokens": 38,
        "tokens_per_s": 9.5,
        "time/generate": 1.5,
        "time/step": 4.0,
    }


def test_what_the_loss_reports_is_averaged_over_the_tokens_of_all_updates() -> None:
    first = UpdateResult(0.5, 2.0, {"clip_frac": 1.0, "clip_frac_dual": 0.0, "ratio_mean": 10.5, "num_tokens": 10.0})
    second = UpdateResult(-0.1, 3.0, {"clip_frac": 6.0, "clip_frac_dual": 3.0, "ratio_mean": 28.5, "num_tokens": 30.0})
    assert loss_metrics([first, second]) == {"clip_frac": 7 / 40, "clip_frac_dual": 3 / 40, "ratio_mean": 39 / 40}
    with_kl = [
        UpdateResult(part.loss, part.grad_norm, {**part.sums, "kl": kl}) for part, kl in ((first, 0.5), (second, 1.5))
    ]
    assert loss_metrics(with_kl)["kl"] == 2 / 40
    assert loss_metrics([first, with_kl[1]])["kl"] == 1.5 / 40, "a metric that one of the updates has"


def test_a_step_on_the_console() -> None:
    metrics = {"step": 12, "phase": "full", "reward_mean": 0.25, "loss": [0.2, 0.4], "grad_norm": [1.0, 3.0]}
    metrics |= {"entropy": 2.0, "response_len_mean": 80.25, "tokens_per_s": 99.6, "time/step": 61.04}
    assert console_line(metrics, 300) == (
        "step  12/300  full      reward 0.250  loss 0.3000  grad 2.000  entropy 2.000  length 80.2  "
        "61.0 s, 100 tokens/s"
    )


# --- tracking.py


def test_a_run_leaves_lines_and_the_same_numbers_in_tensorboard(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"step": step, "phase": phase, "loss": [1.0 * step, 3.0 * step], "lr": 0.5, "reward_timeouts": step}
        for step, phase in ((1, "layer:2"), (2, "full"))
    ]
    tracker = Tracker(str(tmp_path / "runs" / "one"), None)
    tracker.write_run({"schema": 1})
    tracker.log(lines[0])
    written = tmp_path / "runs" / "one" / "metrics.jsonl"
    assert len(written.read_text().splitlines()) == 1, "a line is on disk as soon as its step is done"
    tracker.log(lines[1])
    tracker.close()
    assert [json.loads(line) for line in written.read_text().splitlines()] == lines
    assert json.loads((tmp_path / "runs" / "one" / "run.json").read_text()) == {"schema": 1}
    assert {path.name for path in written.parent.iterdir()} == {"run.json", "metrics.jsonl", "tensorboard"}

    board = EventAccumulator(str(tmp_path / "runs" / "one" / "tensorboard"))
    board.Reload()
    assert set(board.Tags()["scalars"]) == {"loss", "lr", "reward_timeouts"}
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(1, 2.0), (2, 4.0)]
    assert [event.value for event in board.Scalars("reward_timeouts")] == [1.0, 2.0]
    texts = board.Tensors("phase/text_summary")
    assert [event.tensor_proto.string_val[0] for event in texts] == [b"layer:2", b"full"]


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tracker = Tracker(None, None)
    tracker.write_run({})
    tracker.log({"step": 1, "phase": "full"})
    tracker.close()
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_elsewhere(tmp_path: Path) -> None:
    tracker = Tracker(str(tmp_path / "run"), str(tmp_path / "board"))
    tracker.log({"step": 1, "phase": "full", "lr": 1.0})
    tracker.close()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]
    assert list((tmp_path / "board").iterdir())


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_model(configs()["qwen3-tied"], tmp_path / "model")
    return tmp_path / "model"


def test_a_fingerprint_tells_models_apart_by_what_they_hold(model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "elsewhere"))
    first = fingerprint(model)
    assert fingerprint(copy) == first
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-5] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    second = fingerprint(copy)
    (copy / "config.json").write_text((copy / "config.json").read_text().replace("10000.0", "10001.0"))
    assert len({first, second, fingerprint(copy)}) == 3


def train_config(model: Path, *flags: str) -> TrainConfig:
    """A replay of 3 steps of 4 x 2 responses."""
    words = ["--hf-model", str(model), "--load-rollouts", str(model), "--train-iters", "3"]
    words += ["--rollout-batch-size", "4", "--n-samples-per-prompt", "2", "--max-tokens-per-micro-batch", "100"]
    config = parse("train", [*words, "--dry-run", *flags])
    assert isinstance(config, TrainConfig)
    return config


def test_run_json_says_what_was_run(model: Path) -> None:
    config = train_config(model, "--lr", "0.25")
    identity = RunIdentity(
        fingerprint(model), "fp32", "", ("a", "b"), 1234, 4, 2, ("full",), "f.py:g (sha256 1)", "grpo"
    )
    run = describe_run(config, "layer:2 for steps 1-2, full for step 3", identity, ("seed: 1 then, 2 now",))
    assert json.loads(json.dumps(run)) == run, "plain JSON"
    assert run["schema"] == 1
    assert run["flags"]["optimizer"]["lr"] == 0.25
    assert run["flags"]["run"]["seed"] == 1234, "the defaults, too"
    assert run["phases"].startswith("layer:2")
    assert run["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert run["versions"].keys() >= {"megatron_bupo", "python", "megatron-core", "transformers"}
    assert run["model"] == fingerprint(model)
    assert run["data"] == ["a", "b"]
    assert (run["loss"], run["advantage_estimator"]) == ("f.py:g (sha256 1)", "grpo")
    assert run["changes"] == ["seed: 1 then, 2 now"]
    assert run["commit"] is None or len(run["commit"].rstrip("+")) == 40


# --- plan.py


@pytest.mark.parametrize("name", configs())
def test_parameters_are_counted_as_huggingface_has_them(name: str, tmp_path: Path) -> None:
    config = configs()[name]
    config.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(config)
    counts = parameter_counts(read_architecture(tmp_path))
    assert counts["layer"] == sum(param.numel() for param in model.model.layers[0].parameters())
    assert counts["embedding"] == model.model.embed_tokens.weight.numel()
    assert counts["unembedding"] == (0 if config.tie_word_embeddings else model.lm_head.weight.numel())


# qwen3-tied of references.py: a layer has 32 x 24 x (2 x 4 + 2 x 2) attention weights, 2 x 32 + 2 x 24 of norms and
# 3 x 32 x 48 of the feed-forward; the embedding 101 x 32.
LAYER, EMBEDDING = 32 * 24 * 12 + 112 + 3 * 32 * 48, 101 * 32


@pytest.mark.parametrize(
    ("flags", "world_size", "parameters", "width", "state", "activations"),
    [
        ([], 1, 4 * LAYER + EMBEDDING, 4, 8.0, 17 * 4 * 100 * 32 * 4),
        (["--bf16"], 1, 4 * LAYER + EMBEDDING, 2, 12.0, 17 * 2 * 100 * 32 * 4),
        (["--bf16", "--use-distributed-optimizer"], 2, 4 * LAYER + EMBEDDING, 2, 6.0, 17 * 2 * 100 * 32 * 4),
        (["--pipeline-model-parallel-size", "2"], 2, 2 * LAYER + EMBEDDING, 4, 8.0, 17 * 4 * 100 * 32 * 4),
        (["--tensor-model-parallel-size", "2"], 2, 2 * LAYER + EMBEDDING / 2, 4, 8.0, 17 * 4 * 100 * 32 * 2),
        (
            ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"],
            1,
            4 * LAYER + EMBEDDING,
            4,
            8.0,
            4 * 100 * 32 * 4,
        ),
    ],
)
def test_memory_by_hand(
    flags: list[str],
    world_size: int,
    parameters: float,
    width: int,
    state: float,
    activations: float,
    model: Path,
) -> None:
    sizes = memory_estimate(train_config(model, *flags), read_architecture(model), world_size)
    expected = [parameters * width, parameters * 4, parameters * state, activations]
    assert list(sizes.values()) == pytest.approx([*expected, sum(expected)])


def test_the_embedded_engine_is_a_whole_model_more(model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("")
    words = ["--hf-model", str(model), "--prompt-data", str(tmp_path / "prompts.jsonl"), "--train-iters", "1"]
    config = parse("train", words)
    assert isinstance(config, TrainConfig)
    sizes = memory_estimate(config, read_architecture(model), 1)
    assert sizes["embedded engine's model"] == (4 * LAYER + EMBEDDING) * 4
    assert sizes["sum"] == sum(size for name, size in sizes.items() if name != "sum")


def test_the_plan_names_flags_phases_layout_and_files(model: Path, tmp_path: Path) -> None:
    flags = ["--policy-schedule", "layer:2x2,full", "--tensor-model-parallel-size", "2", "--sequence-parallel"]
    flags += ["--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2"]
    flags += ["--save", str(tmp_path / "run"), "--save-hf", str(tmp_path / "hf")]
    config = train_config(model, *flags)
    schedule = PolicySchedule.parse("layer:2x2,full", 3)
    plan = describe_plan(config, read_architecture(model), schedule.describe(), world_size=8).splitlines()
    assert "  --policy-schedule layer:2x2,full" in plan
    assert "  --lr 1e-06" in plan
    assert "  --sequence-parallel True" in plan
    assert not [line for line in plan if line.startswith("  --load ")], "what was not given and has no default"
    assert f"  {schedule.describe()}" in plan
    assert "  8 process(es) = TP 2 x PP 2 x DP 2; 4 layers in 4 stage(s) of 1; sequence parallelism on" in plan
    files = plan[plan.index("files that would be written") + 1 :]
    run = tmp_path / "run"
    assert files == [
        f"  {run}/run.json",
        f"  {run}/metrics.jsonl",
        f"  {run}/tensorboard/ (TensorBoard)",
        f"  {tmp_path}/hf/ (HuggingFace folder)",
    ]
    assert not run.exists()


def test_the_plan_names_what_looks_on_writes(model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = ["--internal-layer", "auto", "--internal-steps", "1", "--save", str(run), "--save-interval", "2"]

    def files(*more: str) -> list[str]:
        config = train_config(model, *flags, *more)
        plan = describe_plan(config, read_architecture(model), "steps", world_size=1).splitlines()
        return [line.strip().removeprefix(f"{run}/") for line in plan[plan.index("files that would be written") + 1 :]]

    measured = "entropy_flow/step_000002/entropy_flow.json ... (every 2 steps)"
    watched = "watch_step_000001.jsonl ... (with the checkpoints of an internal phase)"
    assert "hf/" in files()
    assert {"internal_layer/entropy_flow.json", watched} <= set(files()) and measured not in files()
    assert measured in files("--entropy-flow-interval", "2")
    assert watched not in files("--monitor-responses", "0")
    assert "internal_layer/entropy_flow.json" not in files("--internal-layer", "2")


def test_a_plan_that_keeps_nothing_says_so(model: Path) -> None:
    plan = describe_plan(train_config(model), read_architecture(model), PolicySchedule.parse("full", 3).describe(), 1)
    assert plan.splitlines()[-1] == "  none: give --save DIR to keep the run"
