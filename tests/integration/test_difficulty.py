"""tools/difficulty.py: the prompts that were solved some of the time, with all their columns."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest

from megatron_bupo.evaluation.questions import question_key
from tests.integration.test_tools import load_tool

tool = load_tool("difficulty")
MESSAGES = [[{"role": "user", "content": f"{number} + 5?"}] for number in range(5)]
REWARDS = {0: [0, 0], 1: [1, 0], 2: [1, 1], 3: [0.5, 0]}  # row 4 was not asked


def _evaluation(folder: Path, name: str) -> Path:
    (folder / "responses").mkdir(parents=True)
    records: list[dict[str, Any]] = [
        {
            "group": row, "prompt_tokens": [1], "response_tokens": [2], "reward": reward, "answer": str(row + 5),
            "finish_reason": "stop", "question": question_key(MESSAGES[row], str(row + 5)), "extracted": None,
        }
        for row, rewards in REWARDS.items()
        for reward in rewards
    ]  # fmt: skip
    (folder / "responses" / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def _data(path: Path) -> Path:
    rows = [{"prompt": MESSAGES[row], "answer": row + 5, "extra": {"n": row}} for row in range(5)]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_rows_by_pass_rate(tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    data, output = _data(tmp_path / f"sums.{suffix}"), tmp_path / f"out.{suffix}"
    words = ["--evaluation", str(_evaluation(tmp_path / "run", "sums")), "--prompt-data", str(data)]
    assert tool.main([*words, "--output", str(output), "--low", "0.25", "--high", "0.5"]) == 0
    assert "2 kept, 1 harder, 1 easier, 1 not asked" in capsys.readouterr().out
    if suffix == "parquet":
        rows = pq.read_table(output).to_pylist()
    else:
        rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["extra"]["n"], row["pass_rate"], row["answer"]) for row in rows] == [(1, 0.5, 6), (3, 0.25, 8)]
    assert [row["prompt"] for row in rows] == [MESSAGES[1], MESSAGES[3]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--evaluation": "none"}, "--evaluation none: has no responses/sums.jsonl"),
        ({"--output": "out.parquet"}, "--output out.parquet: must end as --prompt-data does"),
        ({"--low": "0.9", "--high": "0.1"}, "--low 0.9: must be at most --high 0.1"),
        ({"--low": "0.6", "--high": "0.9"}, "no prompt has such a pass rate"),
    ],
)
def test_what_is_refused(
    change: dict[str, str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {
        "--evaluation": str(_evaluation(tmp_path / "run", "sums")),
        "--prompt-data": str(_data(tmp_path / "sums.jsonl")),
        "--output": str(tmp_path / "out.jsonl"),
    } | change
    assert tool.main([word for pair in words.items() for word in pair]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_file_that_changed_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, data = _evaluation(tmp_path / "run", "sums"), _data(tmp_path / "sums.jsonl")
    data.write_text("".join(data.read_text().splitlines(keepends=True)[1:]))
    words = ["--evaluation", str(run), "--prompt-data", str(data), "--output", str(tmp_path / "out.jsonl")]
    assert tool.main(words) == 2
    assert "answers another question than row 1 of the data" in capsys.readouterr().err
