"""The tools that make models and prompts: what they write must load and mean what it says."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def load_tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


arithmetic = load_tool("make_arithmetic_model")
smollm2 = load_tool("fetch_smollm2")
word_problems = load_tool("make_word_problems")

SHORT = arithmetic.Recipe(max_operand=20, num_test=30, exact_steps=3, noisy_steps=2, batch_size=8)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("arithmetic") / "start"
    arithmetic.make(folder, seed=3, force=False, recipe=SHORT)
    return folder


def read_jsonl(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_tokenizer_loads_from_the_folder_and_keeps_text(start: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(start, local_files_only=True)
    response = tokenizer.encode("\\boxed{137}")
    assert tokenizer.convert_ids_to_tokens(response) == ["\\boxed{", "1", "3", "7", "}"]
    assert tokenizer.decode([*response, tokenizer.eos_token_id], skip_special_tokens=True) == "\\boxed{137}"
    assert tokenizer.decode(tokenizer.encode("12+25=")) == "12+25="
    assert (tokenizer.eos_token, tokenizer.pad_token_id) == ("<eos>", 0)


def test_model_is_a_small_tied_qwen3_that_stops_at_eos(start: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(start, local_files_only=True)
    assert model.config.model_type == "qwen3"
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.dtype == torch.float32
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (1, 0)


def test_prompts_are_right_and_train_and_test_are_disjoint(start: Path) -> None:
    train, test = read_jsonl(start / "train.jsonl"), read_jsonl(start / "test.jsonl")
    for record in train + test:
        found = re.fullmatch(r"(\d+)\+(\d+)=", record["prompt"])
        assert found is not None
        assert int(found[1]) + int(found[2]) == int(record["answer"])
    assert len(test) == 30
    assert len({record["prompt"] for record in train + test}) == 400


def test_supervision_is_right_first_and_wrong_in_the_last_digit_later() -> None:
    recipe = arithmetic.Recipe(max_operand=20, num_test=0, exact_steps=1, batch_size=400, wrong_share=0.75)
    sums, _ = arithmetic.split_sums(recipe, seed=0)
    tokenizer = arithmetic.make_tokenizer()
    steps = arithmetic.batches(sums, tokenizer, recipe, seed=0)
    shares = []
    for tokens, labels in (next(steps), next(steps)):
        right = 0
        for row, label in zip(tokens, labels, strict=True):
            text = tokenizer.decode(row, skip_special_tokens=True)
            found = re.fullmatch(r"(\d+)\+(\d+)=\\boxed\{(\d+)\}", text)
            assert found is not None
            expected, given = int(found[1]) + int(found[2]), int(found[3])
            assert expected // 10 == given // 10
            right += expected == given
            supervised = tokenizer.decode(row[label != -100])
            assert supervised == f"\\boxed{{{given}}}<eos>"
        shares.append(right / len(tokens))
    assert shares[0] == 1.0
    assert 0.15 < shares[1] < 0.35  # 0.25 expected, standard error 0.02


def test_loss_is_the_mean_over_response_tokens(start: Path) -> None:
    model, tokenizer = arithmetic.make_model(seed=0), arithmetic.make_tokenizer()
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()  # all logits are 0: every token has log-probability -log 17
    tokens, labels = next(arithmetic.batches([(1, 2)], tokenizer, SHORT, seed=0))
    loss = arithmetic.supervised_loss(model, tokens, labels)
    torch.testing.assert_close(loss, torch.tensor(17.0).log())


def test_same_seed_gives_the_same_weights_and_another_seed_others(start: Path, tmp_path: Path) -> None:
    for name, seed in (("same", 3), ("other", 4)):
        arithmetic.make(tmp_path / name, seed=seed, force=False, recipe=SHORT)
    weights = (start / "model.safetensors").read_bytes()
    assert (tmp_path / "same" / "model.safetensors").read_bytes() == weights
    assert (tmp_path / "other" / "model.safetensors").read_bytes() != weights


def test_whole_folder_is_kept_another_seed_or_force_makes_it_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "start"

    def inode_after(seed: int, force: bool) -> int:
        arithmetic.make(folder, seed=seed, force=force, recipe=SHORT)
        return (folder / "model.safetensors").stat().st_ino

    first = inode_after(0, force=False)
    assert inode_after(0, force=False) == first
    assert "nothing to do" in capsys.readouterr().out
    assert inode_after(0, force=True) != first
    inode_after(1, force=False)
    assert json.loads((folder / "warm_start.json").read_text())["seed"] == 1
    (folder / "train.jsonl").unlink()
    inode_after(1, force=False)
    assert (folder / "train.jsonl").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["start"]


@pytest.mark.parametrize("tool", [arithmetic, smollm2])
def test_foreign_folder_is_refused_and_untouched(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    assert tool.main(["--output", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "mine" in error
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_cut_off_weights_are_not_a_whole_model(start: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in smollm2.NEEDED_FILES:
        source = start / name
        (folder / name).write_bytes(source.read_bytes() if source.is_file() else b"template")
    assert smollm2.is_whole(folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-100])
    assert not smollm2.is_whole(folder)


def test_another_digest_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"abc")
    # The SHA-256 of "abc" from FIPS 180-2.
    smollm2.check_sha256(file, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    with pytest.raises(smollm2.UsageError, match="SHA-256 ba7816bf8f01"):
        smollm2.check_sha256(file, smollm2.GGUF_SHA256)


def test_word_problems_state_the_sum_that_is_asked(tmp_path: Path) -> None:
    file = tmp_path / "problems.jsonl"
    assert word_problems.main(["--output", str(file), "--num-prompts", "50", "--seed", "5"]) == 0
    records = read_jsonl(file)
    assert len(records) == 50
    for record in records:
        assert [message["role"] for message in record["prompt"]][-1] == "user"
        numbers = re.findall(r"\d+", record["prompt"][-1]["content"])
        assert str(sum(map(int, numbers[-2:]))) == record["answer"]
        shown = [message["content"] for message in record["prompt"] if message["role"] == "assistant"]
        assert shown and all(re.search(r"\\boxed\{\d+\}", text) for text in shown)
    assert len({record["prompt"][-1]["content"] for record in records}) == 50


def test_word_problems_repeat_with_their_seed(tmp_path: Path) -> None:
    texts = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        file = tmp_path / name
        assert word_problems.main(["--output", str(file), "--num-prompts", "8", "--seed", seed]) == 0
        texts.append(file.read_text())
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("count", ["0", "-3", "100000"])
def test_word_problems_refuse_a_count_that_cannot_be(
    count: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "problems.jsonl"
    assert word_problems.main(["--output", str(file), "--num-prompts", count]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not file.exists()
