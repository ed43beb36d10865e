"""run.json, and the plan of a dry run, on numbers made by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from megatron_bupo.__main__ import main
from megatron_bupo.architectures.families import read_architecture
from megatron_bupo.config.command_line import parse
from megatron_bupo.config.train import TrainConfig
from megatron_bupo.policy_spec import PolicySpec
from megatron_bupo.rl.schedule import PolicySchedule
from megatron_bupo.training.memory import memory_estimate, parameter_counts
from megatron_bupo.training.plan import describe_plan
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


# What a layer keeps for a token, numbers: norms 4 x 32, q and k before their norms 96 + 48, rope 4 x 24, attention
# 96 + 2 x 48 + 96 (in one call; else 96 more), the feed-forward 3 x 48; in fp32 1 / rms of 2 norms and 6 heads, and
# log-sum-exp of 4 heads.
KEPT, BY_SEQUENCE, KEPT_FP32 = 128 + 144 + 96 + 288 + 144, 96, 2 + 6 + 4
RECOMPUTE = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]


@pytest.mark.parametrize(
    ("flags", "world_size", "parameters", "width", "state", "activations"),
    [
        ([], 1, 4 * LAYER + EMBEDDING, 4, 8.0, 4 * 4 * (KEPT + BY_SEQUENCE + KEPT_FP32)),
        (["--bf16"], 1, 4 * LAYER + EMBEDDING, 2, 12.0, 4 * (2 * KEPT + 4 * KEPT_FP32)),
        (
            ["--bf16", "--use-distributed-optimizer"],
            2,
            4 * LAYER + EMBEDDING,
            2,
            6.0,
            4 * (2 * KEPT + 4 * KEPT_FP32),
        ),
        (
            ["--pipeline-model-parallel-size", "2"],
            2,
            2 * LAYER + EMBEDDING,
            4,
            8.0,
            4 * 4 * (KEPT + BY_SEQUENCE + KEPT_FP32),
        ),
        (
            ["--tensor-model-parallel-size", "2", "--sequence-parallel"],
            2,
            2 * LAYER + EMBEDDING / 2,
            4,
            8.0,
            4 * 4 * ((KEPT - 96 + BY_SEQUENCE + KEPT_FP32) / 2 + 96),  # rope's angles are every rank's
        ),
        (RECOMPUTE, 1, 4 * LAYER + EMBEDDING, 4, 8.0, 4 * (3 * 32 + KEPT + BY_SEQUENCE + KEPT_FP32)),
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
    """`activations` are bytes a token; a micro-batch has 100."""
    without_norms = train_config(model, *flags, "--norms-interval", "0")
    sizes = memory_estimate(without_norms, read_architecture(model), world_size)
    unembedding = sizes.pop("unembedding")
    expected = [parameters * width, parameters * 4, parameters * state, 100 * activations]
    assert list(sizes.values()) == pytest.approx([*expected, sum(expected) + unembedding])


def test_the_unembedding_by_hand(model: Path) -> None:
    """Two tiles in fp32, rows with their gradient in fp32, the weight's gradient; in bf16 a tile of it in fp32 too."""
    arch, rows, vocab = read_architecture(model), 100, 101
    in_fp32 = 2 * 4 * rows * vocab + rows * 32 * (4 + 4) + 4 * 32 * vocab
    assert memory_estimate(train_config(model), arch, 1)["unembedding"] == in_fp32
    in_bf16 = 2 * 4 * rows * vocab + 4 * 32 * vocab + rows * 32 * (2 + 4) + 2 * 32 * vocab
    assert memory_estimate(train_config(model, "--bf16"), arch, 1)["unembedding"] == in_bf16


@pytest.mark.parametrize(
    ("flags", "world_size", "bytes_per_parameter"),
    [
        (["--max-tokens-per-micro-batch", "1"], 1, None),
        (["--max-tokens-per-micro-batch", "1000"], 1, 0),
        (["--global-batch-size", "2"], 1, 4),
        (["--global-batch-size", "2"], 4, 1),
        (["--global-batch-size", "2", "--bf16"], 1, 6),
        (["--global-batch-size", "2", "--bf16", "--use-distributed-optimizer"], 2, 3),
        (["--max-tokens-per-micro-batch", "1000", "--bf16"], 1, 2),
    ],
)
def test_what_the_norms_keep(flags: list[str], world_size: int, bytes_per_parameter: float | None, model: Path) -> None:
    """None: as much as activations and unembedding leave of 4 bytes."""
    sizes = memory_estimate(train_config(model, *flags), read_architecture(model), world_size)
    parameters = 4 * LAYER + EMBEDDING
    expected = (
        4 * parameters - sizes["activations"] - sizes["unembedding"]
        if bytes_per_parameter is None
        else bytes_per_parameter * parameters
    )
    assert sizes["update norms"] == pytest.approx(expected)
    assert expected > 0 or bytes_per_parameter == 0
    assert sizes["sum"] == pytest.approx(sum(size for name, size in sizes.items() if name != "sum"))


# Qwen3-4B's config.json; what was measured of it on an H200 with a layer:6 phase before the full one.
QWEN3_4B = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
HELD, PEAK, PHASE_1 = 72.4e9, 112.7e9, 57e9
INTERNAL, INNER, FULL = PolicySpec("layer", 6, False), PolicySpec("layer", 2, False), PolicySpec()


def test_a_model_that_was_measured(tmp_path: Path) -> None:
    Qwen3Config(**QWEN3_4B).save_pretrained(tmp_path)
    arch = read_architecture(tmp_path)
    flags = ["--bf16", "--norms-interval", "0", "--max-tokens-per-micro-batch"]
    config, larger = (train_config(tmp_path, *flags, tokens) for tokens in ("8192", "16384"))
    phase_1, full = (memory_estimate(config, arch, 1, specs) for specs in ((INTERNAL,), (INTERNAL, FULL)))
    held = sum(full[name] for name in ("parameters", "gradients (fp32)", "optimizer (fp32)"))
    assert held == pytest.approx(HELD, rel=0.01)
    assert full["sum"] == pytest.approx(PEAK, rel=0.1)
    assert phase_1["sum"] == pytest.approx(PHASE_1, rel=0.1)
    # The layers that were measured kept more: the fused projection's output, for k is a part of it, and each sequence's
    # output beside the joined one. With that the count is what was measured, and 16k tokens are over the card's 140 GB.
    more = 36 * 2 * (arch.query_size + arch.kv_size + arch.query_size)
    assert full["sum"] + 8192 * more == pytest.approx(PEAK, rel=0.02)
    assert memory_estimate(larger, arch, 1)["sum"] + 16384 * more > 140e9


def test_the_embedded_engine_is_a_whole_model_more(model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("")
    words = ["--hf-model", str(model), "--prompt-data", str(tmp_path / "prompts.jsonl"), "--train-iters", "1"]
    config = parse("train", words)
    assert isinstance(config, TrainConfig)
    sizes = memory_estimate(config, read_architecture(model), 1)
    assert sizes["embedded engine's model"] == (4 * LAYER + EMBEDDING) * 4
    assert sizes["sum"] == sum(size for name, size in sizes.items() if name != "sum")


FULL_ONLY = PolicySchedule.parse("full", 3)


def test_the_plan_has_the_memory_of_every_phase(model: Path) -> None:
    """That of the fullest part by part: the last, which is full, with moments of all layers."""
    config, arch = train_config(model, "--bf16"), read_architecture(model)
    schedule = PolicySchedule.parse("layer:2x1,attn:3x1,full", 3)
    plan = describe_plan(config, arch, schedule, schedule.describe(), 1).splitlines()
    names = [str(spec) for spec in schedule.specs]
    sums = [memory_estimate(config, arch, 1, schedule.specs[: end + 1])["sum"] for end in range(3)]
    assert sums == sorted(sums)
    assert sums[0] < sums[1]
    for name, size in zip(["", *(f" while {name} trains" for name in names)], [sums[-1], *sums], strict=True):
        assert f"  {'sum' + name:<32}{size / 1e9:9.3f} GB" in plan
    moments = 8 * 2 * LAYER  # of the layers above 2
    first, last = (memory_estimate(config, arch, 1, specs)["optimizer (fp32)"] for specs in ((INNER,), (INNER, FULL)))
    assert last - first == moments


def test_a_dry_run_needs_config_json_alone(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "config alone"
    folder.mkdir()
    shutil.copy(model / "config.json", folder)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1+1", "answer": "2"}\n')
    words = ["train", "--hf-model", str(folder), "--prompt-data", str(tmp_path / "prompts.jsonl")]
    words += ["--train-iters", "1", "--internal-layer", "2", "--internal-steps", "1"]
    words += ["--eval-data", str(tmp_path / "prompts.jsonl")]
    assert main([*words, "--dry-run"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"{folder}: no weights there")
    assert any(line.startswith("  sum") for line in printed)
    assert main([*words, "--dry-run", "--tensor-model-parallel-size", "3"]) == 2, "the layout is checked"
    assert main(words) == 2
    assert "neither model.safetensors nor" in capsys.readouterr().err


def test_the_plan_names_flags_phases_layout_and_files(model: Path, tmp_path: Path) -> None:
    flags = ["--policy-schedule", "layer:2x2,full", "--tensor-model-parallel-size", "2", "--sequence-parallel"]
    flags += ["--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2"]
    flags += ["--save", str(tmp_path / "run"), "--save-hf", str(tmp_path / "hf")]
    config = train_config(model, *flags)
    schedule = PolicySchedule.parse("layer:2x2,full", 3)
    plan = describe_plan(config, read_architecture(model), schedule, schedule.describe(), 8).splitlines()
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
        plan = describe_plan(config, read_architecture(model), FULL_ONLY, "steps", world_size=1).splitlines()
        return [line.strip().removeprefix(f"{run}/") for line in plan[plan.index("files that would be written") + 1 :]]

    measured = "entropy_flow/step_000002/entropy_flow.json ... (every 2 steps)"
    watched = "watch_step_000001.jsonl ... (with the checkpoints of an internal phase)"
    assert "hf/" in files()
    assert {"internal_layer/entropy_flow.json", watched} <= set(files()) and measured not in files()
    assert measured in files("--entropy-flow-interval", "2")
    assert watched not in files("--monitor-responses", "0")
    assert "internal_layer/entropy_flow.json" not in files("--internal-layer", "2")


def test_a_plan_that_keeps_nothing_says_so(model: Path) -> None:
    plan = describe_plan(train_config(model), read_architecture(model), FULL_ONLY, FULL_ONLY.describe(), 1)
    assert plan.splitlines()[-1] == "  none: give --save DIR to keep the run"
