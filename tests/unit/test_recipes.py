"""The recipes: a dry run of each with its model's config.json alone, and the paper's settings in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_bupo.__main__ import main
from megatron_bupo.architectures.families import read_architecture
from megatron_bupo.training.memory import parameter_counts

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
# Layers, internal layer and steps, longest response; billions of parameters as the models are published.
PAPER = {
    "Qwen3-4B": (36, 6, 30, 8192, 4.02),
    "Qwen3-8B": (36, 6, 20, 8192, 8.19),
    "OctoThinker-3B-Long-Base": (28, 27, 20, 3072, 3.21),
    "OctoThinker-8B-Long-Base": (32, 31, 20, 3072, 8.03),
}
SAME = {
    "train-iters": 300, "rollout-batch-size": 128, "n-samples-per-prompt": 8, "global-batch-size": 256, "lr": 1e-6,
    "weight-decay": 0.01, "clip-grad": 1.0, "clip-ratio-low": 0.2, "clip-ratio-high": 0.2, "dual-clip": 10.0,
    "rollout-temperature": 1.0, "rollout-top-p": 1.0, "rollout-max-prompt-len": 1024, "kl-loss-coef": 0.0,
}  # fmt: skip


def _read(recipe: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(recipe.read_text())
    return content


def test_each_model_has_a_bupo_and_a_grpo_run() -> None:
    found = sorted((Path(_read(recipe)["hf-model"]).name, recipe.stem.split("-")[-1]) for recipe in RECIPES)
    assert found == sorted((model, run) for model in PAPER for run in ("bupo", "grpo"))


@pytest.mark.parametrize("recipe", RECIPES, ids=[recipe.stem for recipe in RECIPES])
def test_settings_are_the_papers(recipe: Path) -> None:
    settings = _read(recipe)
    _, layer, steps, length, _ = PAPER[Path(settings["hf-model"]).name]
    assert {name: settings[name] for name in SAME} == SAME
    assert settings["rollout-max-response-len"] == length
    internal = (settings.get("internal-layer"), settings.get("internal-steps"))
    assert internal == ((layer, steps) if recipe.stem.endswith("-bupo") else (None, None))
    twin = _read(recipe.with_name(recipe.name.replace("-bupo", "-grpo")))
    assert {name: value for name, value in settings.items() if not name.startswith("internal-")} == twin


@pytest.mark.parametrize("recipe", RECIPES, ids=[recipe.stem for recipe in RECIPES])
@pytest.mark.parametrize("world_size", [4, 16])
def test_dry_run(
    recipe: Path, world_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": [{"role": "user", "content": "3 + 5?"}], "answer": 8}\n')
    name = Path(_read(recipe)["hf-model"]).name
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    words = ["train", "--config", str(recipe), "--hf-model", str(FOLDER / "configs" / name)]
    assert main([*words, "--prompt-data", str(prompts), "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert "1024 responses a step (128 prompts x 8), in 4 optimizer step(s) of 256" in plan
    _, layer, steps, _, _ = PAPER[name]
    phases = f"steps 1-{steps} layer:{layer}, steps {steps + 1}-300 full"
    assert (phases if recipe.stem.endswith("-bupo") else "steps 1-300 full") in plan
    [total] = [line for line in plan.splitlines() if line.strip().startswith("sum ") and "while" not in line]
    assert float(total.split()[1]) < 80, "it fits a GPU of 80 GB"


@pytest.mark.parametrize("name", PAPER)
def test_the_configs_are_the_models(name: str) -> None:
    arch = read_architecture(FOLDER / "configs" / name)
    counts = parameter_counts(arch)
    layers, *_, billions = PAPER[name]
    assert arch.num_layers == layers
    total = counts["layer"] * layers + counts["embedding"] + counts["unembedding"] + arch.hidden_size
    assert total / 1e9 == pytest.approx(billions, abs=0.01)
