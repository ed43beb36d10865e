"""The entropy flow in training: `--internal-layer auto` and `--entropy-flow-interval`, as a user runs them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from megatron_bupo.analysis.plots import read_metrics
from megatron_bupo.data.rollout_files import read_rollouts, step_file, write_rollouts
from tests.parallel.flow_reference import reference_flow, summarise
from tests.parallel.launch import LAYOUTS, assert_passed, run_python, run_several, torchrun
from tests.parallel.references import NUM_LAYERS, configs, random_rollouts, write_model
from tests.parallel.test_generation import write_tokenizer

STEPS, SAMPLE = 4, 3


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rollouts to replay, and a model whose FFNs raise the entropy in layers 1 and 2 and lower it in 3 and 4."""
    folder = tmp_path_factory.mktemp("flow_training")
    model: Any = write_model(configs()["qwen3-untied"], folder / "model")
    model.lm_head.weight.data.mul_(10)
    for layer in model.model.layers[2:]:
        layer.mlp.down_proj.weight.data.mul_(30)
    model.save_pretrained(folder / "model")
    for step in range(1, STEPS + 1):
        write_rollouts(step_file(folder / "rollouts", step), random_rollouts(8, seed=step, longest=20))
    sample = [read_rollouts(step_file(folder / "rollouts", 1))[index] for index in (0, 2, 5)]  # 3 of 8, spread
    torch.save(summarise(reference_flow(model, sample))[0], folder / "means.pt")
    return folder


def train_words(case: Path, layout: str, run: Path, *flags: str) -> list[str]:
    words = ["-m", "megatron_bupo", "train"]
    words += ["--hf-model", str(case / "model"), "--load-rollouts", str(case / "rollouts"), "--save", str(run)]
    words += ["--rollout-batch-size", "4", "--n-samples-per-prompt", "2", "--lr", "0.01"]
    words += ["--entropy-flow-responses", str(SAMPLE), "--internal-steps", "2", *LAYOUTS[layout][1]]
    return [*words, *flags]


def losses(run: Path) -> list[Any]:
    return [(step["phase"], step["loss"], step["grad_norm"]) for step in read_metrics(run)]


@pytest.mark.parametrize("layout", ["TP1", "PP2xVPP2"])
def test_auto_trains_the_layer_that_the_first_rollouts_suggest(layout: str, case: Path, tmp_path: Path) -> None:
    chosen, explicit = tmp_path / "chosen", tmp_path / "explicit"
    printed, _ = run_several(
        LAYOUTS[layout][0],
        train_words(case, layout, chosen, "--internal-layer", "auto", "--train-iters", str(STEPS)),
        train_words(case, layout, explicit, "--internal-layer", "2", "--train-iters", str(STEPS)),
    )
    expected = torch.load(case / "means.pt", weights_only=True)
    assert (expected["d_ffn"] > 0).tolist() == [True, True, False, False]
    assert "internal layer 2, chosen on" in printed
    record = json.loads((chosen / "run.json").read_text())
    assert record["internal_layer"]["layer"] == 2
    assert record["internal_layer"]["stages"]["exploration"] == [1, 2]
    assert record["internal_layer"]["num_responses"] == SAMPLE
    assert record["flags"]["schedule"]["internal_layer"] == "auto"
    flow = json.loads((chosen / "internal_layer" / "entropy_flow.json").read_text())
    for name in ("resid", "d_ffn", "kl_full"):
        measured = torch.tensor([layer[name] for layer in flow["layers"]], dtype=torch.float64)
        assert (measured - expected[name]).abs().max() < 1e-4, name
    assert [phase for phase, *_ in losses(chosen)] == ["layer:2"] * 2 + ["full"] * 2
    assert losses(chosen) == losses(explicit)


def test_the_model_that_chose_the_layer_is_freed_before_the_training(case: Path) -> None:
    processes, flags = LAYOUTS["PP2"]
    sample = ["--entropy-flow-responses", str(SAMPLE)]
    assert_passed(torchrun(processes, "tests/parallel/auto_layer_worker.py", case, *flags, *sample))


def test_a_resumed_run_keeps_the_layer_that_was_chosen(case: Path, tmp_path: Path) -> None:
    whole, parts, moved = tmp_path / "whole", tmp_path / "parts", tmp_path / "moved"
    # Together with what else looks at a phase: bounds that are not crossed, and the flow at every step.
    flags = ["--internal-layer", "auto", "--save-interval", "1", "--internal-stop", "kl:1e9"]
    # Other responses would be measured now: the choice is not made again, also in another folder.
    more = ["--entropy-flow-responses", "1", "--train-iters", str(STEPS), "--load", str(parts)]
    *_, printed = run_several(
        1,
        train_words(case, "TP1", whole, *flags, "--train-iters", str(STEPS), "--entropy-flow-interval", "1"),
        train_words(case, "TP1", parts, *flags, "--train-iters", "3"),
        train_words(case, "TP1", moved, *flags, *more),
    )
    evidence = json.loads((parts / "run.json").read_text())["internal_layer"]
    assert "going on after step 3" in printed and "chosen on" not in printed
    assert losses(parts) == losses(whole)[:3]
    assert losses(moved) == losses(whole)[3:]
    assert json.loads((moved / "run.json").read_text())["internal_layer"] == evidence
    assert (moved / "internal_layer" / "entropy_flow.json").is_file()


def test_auto_measures_the_converted_checkpoint_that_the_run_starts_from(case: Path, tmp_path: Path) -> None:
    """Its FFNs raise the entropy in layer 1 only, those of --hf-model in layers 1 and 2."""
    model: Any = AutoModelForCausalLM.from_pretrained(case / "model")
    model.model.layers[1].mlp.down_proj.weight.data.mul_(30)
    model.save_pretrained(tmp_path / "other")
    program = "checkpoint_converters/hf_to_megatron.py"
    converted = ["--hf-model", str(tmp_path / "other"), "--output", str(tmp_path / "converted")]
    flags = ["--internal-layer", "auto", "--train-iters", "3", "--load", str(tmp_path / "converted")]
    _, printed = run_several(1, [program, *converted], train_words(case, "TP1", tmp_path / "run", *flags))
    assert "internal layer 1, chosen on" in printed
    assert [phase for phase, *_ in losses(tmp_path / "run")] == ["layer:1", "layer:1", "full"]


def test_auto_with_an_engine_generates_the_first_step_once(case: Path, tmp_path: Path) -> None:
    """The rollouts that were measured are those trained on, and all that follows is as with the layer given."""
    write_tokenizer(case / "model")
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "w{n} w7", "answer": 0}}\n' for n in range(2, 9)))
    (tmp_path / "reward.py").write_text(
        "def even(record):\n    return float(sum(record['response_tokens']) % 2 == 0)\n"
    )
    words = ["-m", "megatron_bupo", "train", "--hf-model", str(case / "model"), "--rollout-batch-size", "4"]
    words += ["--prompt-data", str(tmp_path / "prompts.jsonl"), "--reward", f"{tmp_path / 'reward.py'}:even"]
    words += ["--n-samples-per-prompt", "2", "--rollout-max-response-len", "12", "--internal-steps", "1"]
    words += ["--train-iters", "3", "--lr", "0.01"]
    commands = []
    for name, layer in (("auto", "auto"), ("given", "2")):
        outputs = ["--save", str(tmp_path / name), "--save-rollouts", str(tmp_path / name / "rollouts")]
        commands.append([*words, *outputs, "--internal-layer", layer])
    run_several(2, *commands)
    assert losses(tmp_path / "auto") == losses(tmp_path / "given")
    for step in (1, 2, 3):
        assert read_rollouts(step_file(tmp_path / "auto" / "rollouts", step)) == read_rollouts(
            step_file(tmp_path / "given" / "rollouts", step)
        )
    assert json.loads((tmp_path / "auto" / "internal_layer" / "entropy_flow.json").read_text())["num_responses"] == 8


def test_the_flow_is_measured_at_its_interval(case: Path, tmp_path: Path) -> None:
    flags = ["--internal-layer", "1", "--train-iters", str(STEPS)]
    run_several(
        2,
        train_words(case, "DP2", tmp_path / "run", *flags, "--entropy-flow-interval", "2"),
        train_words(case, "DP2", tmp_path / "without", *flags),
    )
    assert losses(tmp_path / "run") == losses(tmp_path / "without")  # measuring changes nothing
    kept = sorted(path.parent.name for path in (tmp_path / "run").glob("entropy_flow/*/entropy_flow.json"))
    assert kept == ["step_000002", "step_000004"]
    assert not (tmp_path / "without" / "entropy_flow").exists()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    figures = {f"entropy_flow/{name}" for name in ("entropy_flow", "entropy_change", "residual_cosine", "agreement")}
    assert figures <= set(events.Tags()["images"])
    for layer in range(1, NUM_LAYERS + 1):
        scalars = events.Scalars(f"entropy_flow_d_ffn/layer_{layer}")
        assert [scalar.step for scalar in scalars] == [2, 4]
        for scalar in scalars:
            path = tmp_path / "run" / "entropy_flow" / f"step_{scalar.step:06d}" / "entropy_flow.json"
            stored = json.loads(path.read_text())["layers"][layer - 1]["d_ffn"]
            assert scalar.value == pytest.approx(stored, rel=1e-6)
    timed = [step["step"] for step in read_metrics(tmp_path / "run") if "time/entropy_flow" in step]
    assert timed == [2, 4]


def test_a_flow_that_cannot_be_measured_ends_no_run(case: Path, tmp_path: Path) -> None:
    """A step whose only measured response has one token: the run says so and goes on."""
    for step in (1, 2):
        rollouts = read_rollouts(step_file(case / "rollouts", step))
        short = [replace(rollout, response_tokens=[5], response_mask=None) for rollout in rollouts]
        write_rollouts(step_file(tmp_path / "rollouts", step), short if step == 1 else rollouts)
    flags = ["--load-rollouts", str(tmp_path / "rollouts"), "--entropy-flow-responses", "1", "--internal-steps", "0"]
    flags += ["--train-iters", "2", "--entropy-flow-interval", "1"]
    assert_passed(run_python(*train_words(case, "TP1", tmp_path / "run", *flags)))
    assert [step["step"] for step in read_metrics(tmp_path / "run")] == [1, 2]
    assert [path.name for path in (tmp_path / "run" / "entropy_flow").iterdir()] == ["step_000002"]
