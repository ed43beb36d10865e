"""Bad weights, configs, tokenizers, layers and layouts: exit code 2, one line, nothing started, nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.integration.bad_input.commands import COMMANDS, WEIGHTS, rewrite
from tests.parallel.references import configs, write_model

EMBEDDING = "model.embed_tokens.weight"


def make_index(model: Path, file_of: Callable[[str], str]) -> None:
    names = list(load_file(model / WEIGHTS))
    (model / WEIGHTS).rename(model / "model-00001-of-00002.safetensors")
    index = {"weight_map": {name: file_of(name) for name in names}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def only_a_pickle(model: Path) -> None:
    torch.save(load_file(model / WEIGHTS), model / "pytorch_model.bin")
    (model / WEIGHTS).unlink()


BROKEN_MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda m: (m / WEIGHTS).unlink(), "has neither model.safetensors nor"),
    "truncated": (lambda m: truncate(m / WEIGHTS), "model.safetensors is truncated or no safetensors file"),
    "no safetensors": (lambda m: (m / WEIGHTS).write_text("hello, world " * 9), "truncated or no safetensors file"),
    "foreign": (lambda m: save_file({"wte.weight": torch.ones(3)}, m / WEIGHTS), "has no tensor model.embed_tokens"),
    "a tensor more": (
        lambda m: rewrite(m, lambda t: t.update({"score.weight": torch.ones(2)})),
        "score.weight in",
    ),
    "a tensor less": (
        lambda m: rewrite(m, lambda t: t.pop("model.layers.2.mlp.up_proj.weight")),
        "has no tensor model.layers.2.mlp.up_proj.weight",
    ),
    "another shape": (
        lambda m: rewrite(m, lambda t: t.update({EMBEDDING: torch.ones(90, 32)})),
        "is [90, 32]; config.json asks for [101, 32]",
    ),
    "quantized": (
        lambda m: rewrite(m, lambda t: t.update({EMBEDDING: torch.ones(101, 32, dtype=torch.int8)})),
        "is I8; only F32, BF16, F16",
    ),
    "pickle": (only_a_pickle, "pytorch_model.bin, a pickle"),
    "missing shard": (
        lambda m: make_index(m, lambda name: f"model-0000{2 if 'layers.3' in name else 1}-of-00002.safetensors"),
        "model-00002-of-00002.safetensors is missing",
    ),
    "broken index": (
        lambda m: (make_index(m, str), (m / "model.safetensors.index.json").write_text("[]")),
        "is no index of safetensors",
    ),
    "shard outside": (lambda m: make_index(m, lambda name: "../x.safetensors"), "it may only name .safetensors files"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("broken", BROKEN_MODELS)
def test_weights(broken: str, command: str, case: Path, refused: Callable[..., str]) -> None:
    break_model, expected = BROKEN_MODELS[broken]
    break_model(case / "model")
    assert expected in refused(command)


def edit_config(model: Path, **values: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | values))


BROKEN_CONFIGS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no JSON": (lambda m: (m / "config.json").write_text("{"), "config.json cannot be read as JSON"),
    "gpt2": (
        lambda m: edit_config(m, model_type="gpt2", architectures=["GPT2LMHeadModel"]),
        "the architecture GPT2LMHeadModel (model_type gpt2) is not supported",
    ),
    "reward model": (
        lambda m: edit_config(m, architectures=["Qwen3ForSequenceClassification"]),
        "Qwen3ForSequenceClassification",
    ),
    "yarn": (
        lambda m: edit_config(m, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}),
        "the rope type 'yarn' is not supported",
    ),
    "sliding window": (
        lambda m: edit_config(m, use_sliding_window=True, sliding_window=8, max_window_layers=1, layer_types=None),
        "use_sliding_window is true",
    ),
    "layers as text": (lambda m: edit_config(m, num_hidden_layers="4"), "num_hidden_layers is '4'"),
    "fewer layers": (lambda m: edit_config(m, num_hidden_layers=3), "does not belong to a qwen3 model"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("broken", BROKEN_CONFIGS)
def test_configs(broken: str, command: str, case: Path, refused: Callable[..., str]) -> None:
    break_config, expected = BROKEN_CONFIGS[broken]
    break_config(case / "model")
    assert expected in refused(command)


@pytest.mark.parametrize("command", ["train", "generate"])
def test_tokenizers(command: str, case: Path, refused: Callable[..., str]) -> None:
    model = case / "model"
    whole = (model / "tokenizer.json").read_text()
    (model / "tokenizer.json").write_text(whole[: len(whole) // 2])
    assert "its config or tokenizer cannot be loaded" in refused(command)
    larger = json.loads(whole)
    larger["model"]["vocab"]["stranger"] = 101
    (model / "tokenizer.json").write_text(json.dumps(larger))
    assert "the tokenizer has ids up to 101, the model's vocab_size is 101" in refused(command)
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()
    assert "no tokenizer" in refused(command)


# --- policies and layouts


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("train", ["--policy-schedule", "layer:5x1,full"]),
        ("train", ["--internal-layer", "5", "--internal-steps", "1"]),
        ("replay", ["--policy-schedule", "layer:1x1,attn:5"]),
        ("score", ["--policy", "layer:5"]),
        ("generate", ["--policy", "ffn:5@norm"]),
        ("evaluate", ["--policy", "attn:5"]),
    ],
)
def test_layers_beyond_the_model(command: str, flags: list[str], refused: Callable[..., str]) -> None:
    message = refused(command, *flags)
    assert "5" in message
    assert "4" in message, "the line says how many layers there are"


@pytest.mark.parametrize(
    ("command", "flags"),
    [("train", ["--internal-layer", "0", "--internal-steps", "1"]), ("score", ["--policy", "layer:0"])],
)
def test_layer_0(command: str, flags: list[str], refused: Callable[..., str]) -> None:
    assert "0" in refused(command, *flags)


def test_a_flow_needs_two_layers(case: Path, refused: Callable[..., str]) -> None:
    config = configs()["qwen3-tied"]
    config.num_hidden_layers, config.layer_types = 1, config.layer_types[:1]
    write_model(config, case / "model")
    assert "the model has 1 layer; a flow from layer to layer needs 2" in refused("entropy-flow")
    auto = ["--internal-layer", "auto", "--internal-steps", "1"]
    assert "--internal-layer auto: " in (line := refused("replay", *auto)) and "has 1 layer" in line
    interval = ["--entropy-flow-interval", "2"]
    assert "--entropy-flow-interval: " in (line := refused("replay", *interval)) and "has 1 layer" in line


@pytest.mark.parametrize("command", ["train", "replay", "score"])
@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--tensor-model-parallel-size", "does not divide the model's 4 attention heads"),
        ("--pipeline-model-parallel-size", "the model's 4 layers do not divide into 3 pipeline stages"),
    ],
)
def test_layouts_that_do_not_divide_the_model(
    flag: str, expected: str, command: str, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert expected in refused(command, flag, "3")
