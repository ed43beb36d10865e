"""Prompt data: what is read, what is refused, and the walk through the epochs."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megatron_bupo.data.prompts import PromptSet, load_prompts
from megatron_bupo.errors import UsageError
from megatron_bupo.samples import Prompt
from tests.data.prompt_sets import PROBLEMS, SYSTEM, write_prompt_sets

DOCS = Path(__file__).parents[2] / "docs" / "data.md"
WORDS = ["<unk>", "<eos>", "<user>", "<system>", "<go>", "<think>", "one", "two", "three", "plus"]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{% if m.name is defined %}three {% endif %}<{{ m.role }}> {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}<go>{% endif %}{% if enable_thinking %} <think>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", chat_template=TEMPLATE)


def _jsonl(path: Path, *rows: Any) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def _parquet(path: Path, rows: list[dict[str, Any]]) -> str:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def test_raw_text_and_both_answer_columns(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file = _jsonl(
        tmp_path / "a.jsonl",
        {"prompt": "one plus two", "answer": 3, "data_source": "sums"},
        {"prompt": "two\u2028plus two", "reward_model": {"ground_truth": "2024-01-01"}, "answer": "unused"},
        {"prompt": "three", "reward_model": {"ground_truth": float("nan")}, "answer": 0.5},
        '{"prompt": "one", "answer": 12345678901234567890123}',
        '{"prompt": "one", "answer": "\\ud83d\\ude00 $8$"}',  # as it stands
    )
    prompts = load_prompts([file], tokenizer, max_prompt_len=8).prompts
    assert prompts == [
        Prompt(0, [6, 9, 7], "one plus two", "3", "sums"),
        Prompt(1, [7, 9, 7], "two\u2028plus two", "2024-01-01", None),
        Prompt(2, [8], "three", "0.5", None),
        Prompt(3, [6], "one", "12345678901234567890123", None),
        Prompt(4, [6], "one", "\U0001f600 $8$", None),
    ]


def test_messages_go_through_the_template_without_thinking(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "system", "content": "plus", "name": None}, {"role": "user", "content": "one two"}]
    file = _parquet(
        tmp_path / "a.parquet",
        [{"prompt": messages, "data_source": "d", "reward_model": {"ground_truth": "12", "style": "rule"}}],
    )
    [prompt] = load_prompts([file], tokenizer, max_prompt_len=8).prompts
    assert prompt.text == "<system> plus <user> one two <go>"
    assert prompt.tokens == [3, 9, 2, 6, 7, 4]
    assert (prompt.answer, prompt.data_source) == ("12", "d")


def test_long_prompts_are_dropped_and_counted_but_keep_their_row(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    first = _jsonl(tmp_path / "a.jsonl", {"prompt": "one two three", "answer": 1}, {"prompt": "one two", "answer": 2})
    second = _parquet(tmp_path / "b.parquet", [{"prompt": "three", "answer": 3}])
    prompts = load_prompts([first, second], tokenizer, max_prompt_len=2)
    assert [(p.index, p.answer) for p in prompts.prompts] == [(1, "2"), (2, "3")]
    assert prompts.num_dropped == 1 and len(prompts) == 2


def test_answers_may_be_missing_where_none_are_needed(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    nan = {"prompt": "two", "answer": float("nan")}
    file = _jsonl(tmp_path / "a.jsonl", {"prompt": "one"}, nan, "")  # a blank line at the end is no row
    prompts = load_prompts([file], tokenizer, 8, require_answer=False).prompts
    assert prompts == [Prompt(0, [6], "one"), Prompt(1, [7], "two")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "one", "answer": 1}, "row 2: no column 'prompt' (it has: question, answer)"),
        ({"prompt": "one"}, "row 2: neither 'reward_model.ground_truth' nor 'answer'"),
        ({"prompt": "one", "reward_model": {"style": "rule"}}, "row 2: neither"),
        ({"prompt": "one", "reward_model": "rule"}, "row 2: 'reward_model' is a str"),
        ({"prompt": "one", "answer": ["1"]}, "row 2: the answer is a list"),
        ({"prompt": "one", "answer": True}, "row 2: the answer is a bool"),
        ({"prompt": 7, "answer": 1}, "row 2: 'prompt' is a int"),
        ({"prompt": None, "answer": 1}, "row 2: 'prompt' is a NoneType"),
        ({"prompt": "", "answer": 1}, "row 2: 'prompt' is empty"),
        ({"prompt": [], "answer": 1}, "row 2: 'prompt' is empty"),
        ({"prompt": " \t\n\u3000", "answer": 1}, "row 2: 'prompt' is empty or blank"),
        (
            {"prompt": [{"role": "user", "content": ""}], "answer": 1},
            "row 2: 'prompt' has a user message that is empty",
        ),
        ({"prompt": [{"role": "user", "content": " \n"}], "answer": 1}, "row 2: 'prompt' has a user message that is"),
        ({"prompt": "one", "answer": None}, "row 2: neither 'reward_model.ground_truth' nor 'answer' holds an answer"),
        ({"prompt": "one", "answer": float("nan")}, "row 2: neither"),
        ({"prompt": "one", "answer": " "}, "row 2: neither"),
        ({"prompt": "one", "answer": "$$"}, "row 2: neither"),
        ({"prompt": "one", "reward_model": {"ground_truth": float("nan")}}, "row 2: neither"),
        ({"prompt": "one", "answer": float("inf")}, "row 2: the answer is infinite"),
        ('{"prompt": "one", "answer": 1e999}', "row 2: the answer is infinite"),
        ({"prompt": "one", "answer": {"text": "1"}}, "row 2: the answer is a dict"),
        ('{"prompt": "one", "answer": ' + "9" * 5000 + "}", "row 2: not JSON (Exceeds the limit (4300 digits)"),
        ("[" * 100_000, "row 2: not JSON (maximum recursion depth"),
        ('{"prompt": "one \\ud83d", "answer": 1}', "row 2: one half of a surrogate pair"),
        ('{"prompt": "one", "answer": "\\uDC4d"}', "row 2: one half of a surrogate pair"),
        ({"prompt": ["one"], "answer": 1}, "row 2: 'prompt' has a message without 'role' and 'content'"),
        ({"prompt": [{"role": "user"}], "answer": 1}, "row 2: 'prompt' has a message without"),
        ({"prompt": [{"role": "tool", "content": "one"}], "answer": 1}, "row 2: the chat template refuses"),
        ({"prompt": "one", "answer": 1, "data_source": 5}, "row 2: 'data_source' is a int"),
        ('{"prompt": "one", ', "row 2: not JSON"),
        ("[1]", "row 2: a list instead of a JSON object"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, row: Any, message: str) -> None:
    file = _jsonl(tmp_path / "bad.jsonl", {"prompt": "one", "answer": 1}, row)
    with pytest.raises(UsageError) as error:
        load_prompts([file], tokenizer, 8)
    assert f"{file}, {message}" in str(error.value) and "\n" not in str(error.value)


def test_the_rows_of_the_docs(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    text = DOCS.read_text()
    good = _jsonl(tmp_path / "good.jsonl", *re.findall(r"^    (\{.*\})$", text, re.MULTILINE))
    assert [(p.answer, p.data_source) for p in load_prompts([good], tokenizer, 20).prompts] == [
        ("8", None),
        ("8", "sums"),
    ]
    refused = re.findall(r"^\| `(\{.*)` \| (.*) \|$", text, re.MULTILINE)
    assert len(refused) >= 10
    for row, reason in refused:
        bad = _jsonl(tmp_path / "bad.jsonl", row)
        with pytest.raises(UsageError) as error:
            load_prompts([bad], tokenizer, 20)
        assert f"{bad}, row 1: {reason}" in str(error.value)


def test_bad_files_are_named(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, capfd: Any) -> None:
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 and then something else")
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(b'{"prompt": "\xe9"}\n')
    none = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt": pa.array([], pa.string()), "answer": pa.array([], pa.string())}), none)
    wrong = _parquet(tmp_path / "wrong.parquet", [{"question": "one"}])
    long = _jsonl(tmp_path / "long.jsonl", {"prompt": "one two", "answer": 1})
    cases = {
        str(broken): "cannot be read",
        str(latin): "cannot be read (not UTF-8 text)",
        str(none): "no rows",
        wrong: "row 1: no column 'prompt'",
        _jsonl(tmp_path / "empty.jsonl"): "no rows",
        str(tmp_path / "missing.jsonl"): "cannot be read (No such file or directory)",
        long: "all 1 prompts are longer than 1 tokens",
    }
    for file, message in cases.items():
        with pytest.raises(UsageError) as error:
            load_prompts([file], tokenizer, 1)
        assert message in str(error.value) and file in str(error.value) and "\n" not in str(error.value)
    assert capfd.readouterr().err == ""  # the libraries' own complaints would come on top of the one line


def test_messages_need_a_chat_template(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    file = _jsonl(tmp_path / "a.jsonl", {"prompt": [{"role": "user", "content": "one"}], "answer": 1})
    with pytest.raises(UsageError, match=r"row 1: .* no chat template"):
        load_prompts([file], plain, 8)


def _set(count: int) -> PromptSet:
    return PromptSet([Prompt(i, [i], str(i), str(i)) for i in range(count)], 0)


def test_batches_walk_through_shuffled_epochs_without_a_gap() -> None:
    prompts = _set(10)
    walked = [prompt.index for step in range(1, 11) for prompt in prompts.batch(step, batch_size=4, seed=3)]
    epochs = [walked[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4 and epochs[0] != list(range(10))
    assert epochs[1] == prompts.epoch_order(seed=3, epoch=1) != prompts.epoch_order(seed=4, epoch=1)
    assert [p.index for p in prompts.batch(1, 10, seed=3)] == epochs[0]
    for step in (1, 2, 4, 5):  # an epoch ends within step 3
        assert len({p.index for p in prompts.batch(step, 4, seed=3)}) == 4


def test_a_batch_may_be_the_whole_set() -> None:
    assert len(_set(3).batch(2, 3, seed=0)) == 3


def test_the_fingerprint_sees_tokens_answers_and_order() -> None:
    base = _set(3)
    changed = [
        PromptSet(base.prompts[::-1], 0),
        PromptSet([*base.prompts[:2], Prompt(2, [3], "2", "2")], 0),
        PromptSet([*base.prompts[:2], Prompt(2, [2], "2", "3")], 0),
    ]
    prints = {prompts.fingerprint() for prompts in [base, *changed]}
    assert len(prints) == 4 and base.fingerprint() == _set(3).fingerprint() and len(base.fingerprint()) == 64


def test_the_data_sets_of_the_paper(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    for name, file in write_prompt_sets(tmp_path).items():
        prompts = load_prompts([str(file)], tokenizer, max_prompt_len=10_000)
        assert [prompt.answer for prompt in prompts.prompts] == [answer for _, answer in PROBLEMS[name]]
        assert prompts.num_dropped == 0
        assert prompts.prompts[0].text.startswith(f"<system> {SYSTEM} <user> {PROBLEMS[name][0][0]} <go>")
        assert prompts.prompts[0].data_source == ("math_dapo" if name == "deepmath-5k" else f"qwen_{name}")
