"""run.json, and the plan of a dry run, on numbers made by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_bupo.architectures.families import read_architecture
from megatron_bupo.config.command_line import parse
from megatron_bupo.config.train import TrainConfig
from megatron_bupo.rl.schedule import PolicySchedule
from megatron_bupo.training.plan import describe_plan, memory_estimate, parameter_counts
from megatron_bupo.training.run_record import describe_run
from megatron_bupo.training.run_state import RunIdentity
from megatron_bupo.weights.fingerprint import fingerprint
from tests.parallel.references import configs, write_model


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
    changes, kernels = ("seed: 1 then, 2 now",), {"attention": "torch"}
    run = describe_run(config, "layer:2 for steps 1-2, full for step 3", identity, changes, kernels)
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
    assert (run["changes"], run["kernels"]) == (list(changes), kernels)
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
    without_norms = train_config(model, *flags, "--norms-interval", "0")
    sizes = memory_estimate(without_norms, read_architecture(model), world_size)
    expected = [parameters * width, parameters * 4, parameters * state, activations]
    assert list(sizes.values()) == pytest.approx([*expected, sum(expected)])


@pytest.mark.parametrize(
    ("flags", "world_size", "bytes_per_parameter"),
    [
        (["--max-tokens-per-micro-batch", "10"], 1, 4 - 17 * 4 * 10 * 32 * 4 / (4 * LAYER + EMBEDDING)),
        (["--max-tokens-per-micro-batch", "1000"], 1, 0),
        (["--global-batch-size", "2"], 1, 4),
        (["--global-batch-size", "2"], 4, 1),
        (["--global-batch-size", "2", "--bf16"], 1, 6),
        (["--global-batch-size", "2", "--bf16", "--use-distributed-optimizer"], 2, 3),
        (["--max-tokens-per-micro-batch", "1000", "--bf16"], 1, 2),
    ],
)
def test_what_the_norms_keep(flags: list[str], world_size: int, bytes_per_parameter: float, model: Path) -> None:
    sizes = memory_estimate(train_config(model, *flags), read_architecture(model), world_size)
    assert sizes["update norms"] == pytest.approx(bytes_per_parameter * (4 * LAYER + EMBEDDING))
    assert sizes["sum"] == pytest.approx(sum(size for name, size in sizes.items() if name != "sum"))


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
