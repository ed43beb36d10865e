"""Bad files and data as a user meets them: exit code 2, one clear line, nothing started, nothing written."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_bupo.__main__ import main
from megatron_bupo.data.rollout_files import step_file, write_rollouts
from tests.parallel.launch import ROOT, torchrun
from tests.parallel.references import configs, random_rollouts, write_model
from tests.parallel.test_generation import write_tokenizer

PREFIX = "megatron-bupo: error: "
WEIGHTS = "model.safetensors"
EMBEDDING = "model.embed_tokens.weight"
COMMANDS = ("train", "replay", "score", "generate")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that the commands read, intact. Tests copy it before they break something."""
    folder = tmp_path_factory.mktemp("good")
    write_model(configs()["qwen3-tied"], folder / "model")
    write_tokenizer(folder / "model")
    rng = random.Random(0)
    rows = [{"prompt": f"w{rng.randrange(2, 99)} w7", "answer": "0"} for _ in range(6)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text("def half(record):\n    return 0.5\n")
    for step in (1, 2):
        write_rollouts(step_file(folder / "rollouts", step), random_rollouts(4, seed=step))
    return folder


@pytest.fixture
def case(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "case"))


def words_of(command: str, case: Path, *flags: str) -> list[str]:
    """A command line that runs, but for `flags` (given again, a flag wins) and what was broken in `case`."""
    model = ["--hf-model", str(case / "model")]
    if command == "score":
        files = ["--rollouts", str(case / "rollouts" / "step_000001.jsonl"), "--output", str(case / "out" / "scores")]
        return ["score", *model, *files, *flags]
    if command == "generate":
        files = ["--prompt-data", str(case / "prompts.jsonl"), "--output", str(case / "out" / "generated")]
        return ["generate", *model, *files, "--rollout-max-response-len", "4", *flags]
    source = ["--load-rollouts", str(case / "rollouts")]
    if command == "train":
        source = ["--prompt-data", str(case / "prompts.jsonl"), "--reward", f"{case / 'reward.py'}:half"]
        source += ["--save-rollouts", str(case / "out" / "rollouts"), "--rollout-max-response-len", "4"]
    sizes = ["--train-iters", "2", "--rollout-batch-size", "2", "--n-samples-per-prompt", "2"]
    outputs = ["--save", str(case / "out" / "save"), "--save-hf", str(case / "out" / "hf")]
    return ["train", *model, *source, *sizes, *outputs, *flags]


def error_line(stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if line.startswith(PREFIX)]
    assert len(lines) == 1, stderr
    return lines[0].removeprefix(PREFIX)


@pytest.fixture
def refused(case: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command in this process, where it may start no process group; the one line that it ends with."""
    import megatron_bupo.commands.generate
    import megatron_bupo.commands.score
    import megatron_bupo.commands.train

    def start(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("bad input got as far as the process group")

    for module in (megatron_bupo.commands.generate, megatron_bupo.commands.score, megatron_bupo.commands.train):
        monkeypatch.setattr(module, "parallel_state", start)

    def run(command: str, *flags: str, out_exists: bool = False) -> str:
        capsys.readouterr()
        code = main(words_of(command, case, *flags))
        printed = capsys.readouterr()
        assert code == 2, printed.err
        assert len(printed.err.splitlines()) == 1, printed.err
        assert out_exists or not (case / "out").exists()
        return error_line(printed.err)

    return run


# --- weights and config


def rewrite(model: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(model / WEIGHTS)
    change(tensors)
    save_file(tensors, model / WEIGHTS)


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
    "sliding window": (lambda m: edit_config(m, use_sliding_window=True), "use_sliding_window is true"),
    "layers as text": (lambda m: edit_config(m, num_hidden_layers="4"), "num_hidden_layers is '4'"),
    "fewer layers": (lambda m: edit_config(m, num_hidden_layers=3), ""),
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


# --- prompts

GOOD_ROW = '{"prompt": "w2 w3", "answer": 1}\n'
BAD_PROMPTS = {
    "empty": ("", "no rows in it"),
    "blank": ("\n\n", "no rows in it"),
    "malformed": (GOOD_ROW + '{"prompt": "w2"', "row 2: not JSON"),
    "no object": (GOOD_ROW + "[1]\n", "row 2: a list instead of a JSON object"),
    "no prompt": ('{"question": "w2", "answer": 1}\n', "row 1: no column 'prompt' (it has: question, answer)"),
    "number": ('{"prompt": 7, "answer": 1}\n', "row 1: 'prompt' is a int"),
    "messages without template": (
        '{"prompt": [{"role": "user", "content": "w2"}], "answer": 1}\n',
        "the tokenizer has no chat template",
    ),
    "all too long": (GOOD_ROW * 3, "all 3 prompts are longer than 1 tokens"),
}


@pytest.mark.parametrize("command", ["train", "generate"])
@pytest.mark.parametrize("bad", BAD_PROMPTS)
def test_prompt_data(bad: str, command: str, case: Path, refused: Callable[..., str]) -> None:
    text, expected = BAD_PROMPTS[bad]
    (case / "prompts.jsonl").write_text(text)
    flags = ["--rollout-max-prompt-len", "1"] if bad == "all too long" else []
    assert expected in refused(command, *flags)


def test_prompt_data_that_only_train_refuses(case: Path, refused: Callable[..., str]) -> None:
    assert "--rollout-batch-size 7: the data have 6 prompts" in refused("train", "--rollout-batch-size", "7")
    (case / "prompts.jsonl").write_text('{"prompt": "w2"}\n')
    assert "row 1: neither 'reward_model.ground_truth' nor 'answer'" in refused("train")


@pytest.mark.parametrize("command", ["train", "generate"])
def test_parquet_that_is_none(command: str, case: Path, refused: Callable[..., str]) -> None:
    file = case / "prompts.parquet"
    file.write_text(GOOD_ROW)
    assert "prompts.parquet: cannot be read" in refused(command, "--prompt-data", str(file))


# --- rollout files


def edit_record(path: Path, **values: Any) -> None:
    """Change the last record; None removes a key."""
    lines = path.read_text().splitlines()
    record = {key: value for key, value in (json.loads(lines[-1]) | values).items() if value is not None}
    path.write_text("\n".join([*lines[:-1], json.dumps(record)]) + "\n")


BAD_ROLLOUTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda f: f.write_text(""), "the file is empty"),
    "malformed": (lambda f: f.write_text(f.read_text() + "{\n"), ":5: not JSON"),
    "no text": (lambda f: f.write_bytes(b"\xff\xfe\x00"), "not UTF-8 text"),
    "no tokens": (lambda f: edit_record(f, response_tokens=[]), ":4: 'response_tokens' must be a list of at least one"),
    "a key less": (lambda f: edit_record(f, prompt_tokens=None), ":4: the key 'prompt_tokens' is missing"),
    "mask too short": (lambda f: edit_record(f, response_mask=[]), ":4: 'response_mask' must have one entry"),
    "beyond the vocabulary": (lambda f: edit_record(f, prompt_tokens=[3, 101]), ":4: token id 101, but the model's"),
}


@pytest.mark.parametrize("command", ["replay", "score"])
@pytest.mark.parametrize("bad", BAD_ROLLOUTS)
def test_rollout_files(bad: str, command: str, case: Path, refused: Callable[..., str]) -> None:
    break_file, expected = BAD_ROLLOUTS[bad]
    break_file(case / "rollouts" / "step_000001.jsonl")
    assert expected in refused(command)


def test_replays_that_cannot_run_to_their_end(case: Path, refused: Callable[..., str]) -> None:
    assert "step_000003.jsonl: no such file; a replay of 3 steps" in refused("replay", "--train-iters", "3")
    assert "4 responses; rollout-batch-size x n-samples-per-prompt asks for 6" in refused(
        "replay", "--rollout-batch-size", "3"
    )
    second = case / "rollouts" / "step_000002.jsonl"
    edit_record(second, reward=None)
    assert "step_000002.jsonl:4: the key 'reward' is missing" in refused("replay")
    edit_record(second, reward=float("nan"))
    assert "step_000002.jsonl:4: 'reward' is nan" in refused("replay")


# --- rewards and outputs


@pytest.mark.parametrize(
    ("source", "expected"),
    [("def half(record:\n", "is not valid Python"), ("def whole(record):\n    return 1\n", "defines no 'half'")],
)
def test_reward_files(source: str, expected: str, case: Path, refused: Callable[..., str]) -> None:
    (case / "reward.py").write_text(source)
    assert expected in refused("train")


def test_outputs_that_are_taken(case: Path, refused: Callable[..., str]) -> None:
    taken = case / "out"
    for name in ("save/metrics.jsonl", "hf/config.json", "rollouts/step_000001.jsonl"):
        (taken / name).parent.mkdir(parents=True)
        (taken / name).write_text("{}\n")
        before = sorted(taken.rglob("*"))
        assert "already holds" in refused("train", out_exists=True)
        assert sorted(taken.rglob("*")) == before
        shutil.rmtree(taken)
    taken.write_text("a file")
    for command in COMMANDS:
        assert "out is a file, not a folder" in refused(command, out_exists=True)


@pytest.mark.parametrize("exists", ["empty", "save", "above save"])
def test_an_export_that_would_be_refused_at_the_end_is_refused_at_the_start(
    exists: str, case: Path, refused: Callable[..., str]
) -> None:
    """The export takes a name that is not there; after hours of training it would be too late to say so."""
    export = {"empty": case / "rollouts", "save": case / "out" / "save", "above save": case / "out"}[exists]
    assert "--save-hf" in refused("train", "--save-hf", str(export))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("command", COMMANDS)
def test_outputs_that_may_not_be_written(command: str, case: Path, refused: Callable[..., str]) -> None:
    (case / "out").mkdir(mode=0o555)
    assert "may not be written" in refused(command, out_exists=True)


# --- what only the running command can find: real processes


def assert_every_rank_was_refused(result: subprocess.CompletedProcess[str]) -> None:
    """torchrun returns 1 and tells of its processes: each ended with 2, or was ended by torchrun after another had."""
    assert result.returncode == 1, result.stderr
    codes = {int(code) for code in re.findall(r"exitcode +: (-?\d+)", result.stderr)}
    assert 2 in codes, result.stderr
    assert codes <= {2, -15}, result.stderr


def run_alone(words: list[str]) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "megatron_bupo", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def put_nan(model: Path) -> None:
    """Into the last layer: with two pipeline stages only the second reads it."""
    rewrite(model, lambda tensors: tensors["model.layers.3.mlp.up_proj.weight"][5, 7:].fill_(float("nan")))


def test_nan_in_one_stage_ends_every_rank_in_one_line(case: Path) -> None:
    put_nan(case / "model")
    result = torchrun(2, "-m", "megatron_bupo", *words_of("train", case, "--pipeline-model-parallel-size", "2"))
    assert_every_rank_was_refused(result)
    assert "model.layers.3.mlp.up_proj.weight in" in error_line(result.stderr)
    assert "has NaN or infinite values" in error_line(result.stderr)
    assert not (case / "out").exists()


@pytest.mark.parametrize("command", ["score", "generate"])
def test_nan_in_one_process(command: str, case: Path) -> None:
    put_nan(case / "model")
    result = run_alone(words_of(command, case))
    assert result.returncode == 2, result.stderr
    assert "model.layers.3.mlp.up_proj.weight" in error_line(result.stderr)
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert not (case / "out").exists()


def test_bad_prompts_end_every_rank_in_one_line(case: Path) -> None:
    (case / "prompts.jsonl").write_text(GOOD_ROW + "{")
    result = torchrun(2, "-m", "megatron_bupo", *words_of("train", case))
    assert_every_rank_was_refused(result)
    assert "row 2: not JSON" in error_line(result.stderr)
    assert not (case / "out").exists()


def test_a_reward_file_that_cannot_be_loaded_ends_every_rank(case: Path) -> None:
    """Its text is valid Python: only its worker finds out, before the first response is generated."""
    (case / "reward.py").write_text("import no_such_module\ndef half(record):\n    return 0.5\n")
    result = torchrun(2, "-m", "megatron_bupo", *words_of("train", case))
    assert_every_rank_was_refused(result)
    assert "no_such_module" in error_line(result.stderr)
    assert not (case / "out").exists()


def test_a_reward_that_raises_ends_the_run_in_one_line(case: Path) -> None:
    (case / "reward.py").write_text("def half(record):\n    return record['no such key']\n")
    result = run_alone(words_of("train", case))
    assert result.returncode == 2, result.stderr
    assert "failed on record 1: it raised KeyError: 'no such key'" in error_line(result.stderr)
    assert "Traceback" not in result.stderr, result.stderr
