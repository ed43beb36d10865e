"""The printed comparison of policies: what stands in which row and column, at several widths, with odd tokens."""

import io
import sys

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_bupo.analysis import side_by_side
from megatron_bupo.analysis.side_by_side import PolicyView, open_console, print_side_by_side, visible

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
WORDS = ["[bold]", "Ġthe", "漢", ":smile:", "Ġ" + "long" * 10, "yes", "no", "perhaps"]
UNKNOWN = 999  # an id of the padded vocabulary


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level as the real ones: a word for each byte, then WORDS."""
    encode = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spelled = [encode.pre_tokenize_str(word)[0][0] if word == "漢" else word for word in WORDS]
    vocabulary = {word: index for index, word in enumerate([*BYTES, *spelled])}
    backend = Tokenizer(models.BPE(vocabulary, merges=[]))
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def _ids(*words: str) -> list[int]:
    return [len(BYTES) + WORDS.index(word) for word in words]


def _view(policy: str, response: list[int], top: list[list[int]], values: list[list[float]]) -> PolicyView:
    return PolicyView(policy, response, torch.tensor(top), torch.tensor(values))


def _printed(
    tokenizer: PreTrainedTokenizerFast, views: list[PolicyView], prompt: str = "hello", width: int = 100
) -> list[str]:
    file = io.StringIO()
    console = Console(file=file, width=width)
    print_side_by_side(console, prompt, views, tokenizer)
    return [line.rstrip() for line in file.getvalue().splitlines()]


def _rows(lines: list[str]) -> list[list[str]]:
    """The words of each table row, by column."""
    return [[cell.split() for cell in line.split("│")] for line in lines if line.strip()[:1].isdigit()]  # type: ignore[misc]


def test_rows_are_the_first_response_and_columns_the_policies(tokenizer: PreTrainedTokenizerFast) -> None:
    first = _ids("yes", "no")
    full = _view("full", first, [_ids("yes", "perhaps"), _ids("Ġthe", "yes")], [[0.75, 0.125], [0.004, 0.0000301]])
    top = [_ids("no", "yes"), [*_ids("no"), BYTES.index("Ċ")]]  # Ċ is how byte-level vocabularies spell a line end
    inner = _view("layer:3", _ids("perhaps", "yes"), top, [[1.0, 0.006], [0.5, 0.25]])
    lines = _printed(tokenizer, [full, inner])
    assert [line.split() for line in lines[:3]] == [["prompt", "hello"], ["full", "yesno"], ["layer:3", "perhapsyes"]]
    [header] = [line for line in lines if "token" in line and "│" in line]
    assert [cell.strip() for cell in header.split("│")] == ["", "token", "full", "layer:3"]
    assert _rows(lines) == [
        [["1"], ["yes"], ["yes", "0.75", "perhaps", "0.12"], ["no", "1.00", "yes", "0.01"]],
        [["2"], ["no"], ["␣the", "4e-03", "yes", "3e-05"], ["no", "0.50", "↵", "0.25"]],
    ]


def test_no_token_is_markup_or_emoji_or_control(tokenizer: PreTrainedTokenizerFast) -> None:
    escape, part = BYTES.index("ě"), BYTES.index("æ")  # byte-level spellings of 0x1b and of the first byte of 漢
    tokens = [*_ids("[bold]", ":smile:", "漢", "Ġ" + "long" * 10), escape, part, UNKNOWN]
    view = _view("full", tokens, [[token] for token in tokens], [[0.5]] * len(tokens))
    lines = _printed(tokenizer, [view], prompt="[red]a\tb\x1b[0m\n")
    assert lines[0].split() == ["prompt", "[red]a⇥b\\x1b[0m↵"]
    assert "[bold]:smile:漢 longlong" in lines[1] and "\x1b" not in "".join(lines)
    spelled = ["[bold]", ":smile:", "漢", "␣longlonglong…", "\\x1b", "æ", "<999>"]
    assert [row[1:] for row in _rows(lines)] == [[[word], [word, "0.50"]] for word in spelled]


def test_widths(tokenizer: PreTrainedTokenizerFast) -> None:
    """Three choices where they fit, else fewer; where not even one fits, several tables. No line is ever too long."""
    response = _ids("yes", "no")
    top = [_ids("yes", "no", "perhaps")] * 2
    policies = [f"layer:{number}@norm" for number in range(1, 7)]
    views = [_view(policy, response, top, [[0.5, 0.25, 0.125]] * 2) for policy in policies]
    choices = {}
    uncut = ["yes", "0.50", "no", "0.25", "perhaps", "0.12"]
    for width in (*range(40, 111, 10), 200, 300):
        lines = _printed(tokenizer, views, prompt="漢" * 300 + "end", width=width)
        assert max(map(cell_len, lines)) <= width
        assert lines[0].startswith("prompt") and "  …漢漢" in lines[0] and lines[0].endswith("漢end")
        assert "…" not in lines[1]
        headers = [line for line in lines if "token" in line and "│" in line]
        listed = [cell.strip() for header in headers for cell in header.split("│")[2:]]
        assert listed == policies
        assert all(cell == uncut[: len(cell)] != [] for row in _rows(lines) for cell in row[2:])
        choices[width] = (len(headers), [len(cell) // 2 for row in _rows(lines)[:1] for cell in row[2:]])
    assert choices[300] == (1, [3] * 6)
    assert choices[200] == (1, [2] * 6)
    assert choices[110] == (1, [1] * 6)
    assert choices[60][0] == 2
    # A sliver of a terminal: cut short, but a row stays a row.
    lines = _printed(tokenizer, views, prompt="漢" * 300 + "end", width=24)
    assert max(map(cell_len, lines)) <= 24 and len(_rows(lines)) == 2 * len(views)


def test_long_responses_are_cut_to_a_few_lines(tokenizer: PreTrainedTokenizerFast) -> None:
    response = _ids("perhaps", "Ġthe") * 500
    view = _view("full", response, [_ids("yes")] * 20, [[0.5]] * 20)
    lines = _printed(tokenizer, [view], width=80)
    text = lines[1 : lines.index("")]
    assert 3 <= len(text) <= 4 and text[-1].endswith("…")
    assert len(_rows(lines)) == 20


def test_signs_and_codes() -> None:
    assert visible("a b\n\t\r\x00\u202e\\n") == r"a b↵⇥\r\x00\u202e\n"


def test_terminals_that_cannot_show_a_character_get_its_code(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    console = open_console()
    assert console.width == side_by_side._WIDTH_WITHOUT_TERMINAL
    print_side_by_side(console, "é", [_view("full", _ids("漢"), [_ids("漢")], [[0.5]])], tokenizer)
    sys.stdout.flush()
    assert b"prompt  \\xe9" in raw.getvalue() and b"\\u6f22 0.50" in raw.getvalue()
