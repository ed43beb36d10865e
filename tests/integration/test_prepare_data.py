"""tools/prepare_data.py: rows in the schemas of published data sets become prompt data that is read."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest

from megatron_bupo.data.prompt_files import read_rows
from tests.integration.test_tools import load_tool

tool = load_tool("prepare_data")
DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\nRemember to put your answer on its "
    'own line after "Answer:".'
)
SOLUTION = r"As $3 + 5 = \boxed{8}$ and one more is nine, it is $\boxed{9}$."
# Rows, and the questions with gold answers that come of them.
CASES: dict[str, tuple[list[dict[str, Any]], list[tuple[str, str]]]] = {
    "gsm8k": (
        [
            {"question": "Tom has 3 coins and gets 5. How many?", "answer": "3 + 5 = <<3+5=8>>8\n#### 8"},
            {"question": "And 1,000 more?", "answer": "8 + 1000\n#### 1,008"},
        ],
        [("Tom has 3 coins and gets 5. How many?", "8"), ("And 1,000 more?", "1,008")],
    ),
    "math": ([{"problem": "3 + 5 + 1?", "solution": SOLUTION, "level": "Level 1"}], [("3 + 5 + 1?", "9")]),
    "deepmath": (
        [
            {"question": "The limit?", "final_answer": r"\infty", "difficulty": 2.5},
            {"question": "The limit?", "final_answer": r"\infty", "difficulty": 2.5},
            {"question": "Not known?", "final_answer": None, "difficulty": 9.0},
        ],
        [("The limit?", r"\infty")],
    ),
    "dapo": (
        [
            {"prompt": [{"role": "user", "content": asked}], "reward_model": {"ground_truth": "8", "style": "rule"}}
            for asked in (DAPO.format("What is 3 + 5?\n\nGive it."), "Bare: 4 + 4?")
        ],
        [("What is 3 + 5?\n\nGive it.", "8"), ("Bare: 4 + 4?", "8")],
    ),
}


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
@pytest.mark.parametrize("kind", CASES)
def test_questions_and_answers(kind: str, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, expected = CASES[kind]
    source, output = tmp_path / f"rows [1].{suffix}", tmp_path / f"out.{'jsonl' if suffix == 'parquet' else 'parquet'}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), source)
    else:
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--source", str(source), "--kind", kind, "--output", str(output), "--system-prompt", "Think."]
    assert tool.main(words) == 0
    omitted = "1 without answer, 1 repeated" if kind == "deepmath" else "0 without answer, 0 repeated"
    assert f"{len(expected)} prompts; rows left out: {omitted}\n" in capsys.readouterr().out
    written = [row for _, row in read_rows(output)]
    assert [(row["prompt"][1]["content"], row["reward_model"]["ground_truth"]) for row in written] == expected
    assert all(row["prompt"][0] == {"content": "Think.", "role": "system"} for row in written)
    assert {row["data_source"] for row in written} == {"rows [1]"}


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        ('{"text": "one"}', "gsm8k", "row 1: is not of kind gsm8k (no column 'question')"),
        ('{"question": "one", "final_answer": true}', "deepmath", "row 1: is not of kind deepmath (a bool)"),
        ('{"question": "one", "answer": null}', "gsm8k", "no row has a question and an answer"),
        ("{", "math", "not JSON"),
    ],
)
def test_what_is_refused(
    content: str, kind: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    source.write_text(content + "\n")
    assert tool.main(["--source", str(source), "--kind", kind, "--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not output.exists()


def test_bad_names_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    words = ["--source", "nobody/nothing", "--kind", "math"]
    assert tool.main([*words, "--output", str(tmp_path / "out.jsonl")]) == 2
    assert "no such file, and not to be had from the hub" in capsys.readouterr().err
    assert tool.main([*words, "--output", str(tmp_path / "out.csv")]) == 2
    assert "must end in .parquet or .jsonl" in capsys.readouterr().err
