"""Small prompt sets, written by us, in the schemas of the data sets that BuPO is trained and evaluated on.

The columns, their types and the metadata are those of the published parquet files; the problems are not theirs. The
answers are of every kind that those files have: numbers, fractions, roots, intervals, sets, tuples, matrices, words.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from datasets import Features

SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
_MESSAGES = pa.list_(pa.field("element", pa.struct([("content", pa.string()), ("role", pa.string())])))
_INFO = [("index", pa.int64()), ("split", pa.null())]
_INFO_2024 = [("index", pa.int64()), ("raw_problem", pa.string()), ("split", pa.null())]
_TRUTH = [("ground_truth", pa.string())]


def _benchmark(info: list[tuple[str, pa.DataType]]) -> pa.Schema:
    columns = [("data_source", pa.string()), ("prompt", _MESSAGES), ("ability", pa.string())]
    rewards = pa.struct([*_TRUTH, ("style", pa.string())])
    return pa.schema([*columns, ("reward_model", rewards), ("extra_info", pa.struct(info))])


_DEEPMATH = pa.schema(
    [
        ("question", pa.string()),
        ("final_answer", pa.string()),
        ("difficulty", pa.float64()),
        ("prompt", _MESSAGES),
        ("data_source", pa.string()),
        ("reward_model", pa.struct(_TRUTH)),
        ("extra_info", pa.struct(_INFO)),
    ]
)
SCHEMAS = {
    "deepmath-5k": Features.from_arrow_schema(_DEEPMATH).arrow_schema,
    "math500": Features.from_arrow_schema(_benchmark(_INFO)).arrow_schema,
    "amc2023": _benchmark(_INFO),
    "aime_2024": _benchmark(_INFO_2024),
    "aime_2025": _benchmark(_INFO),
}
PROBLEMS = {
    "deepmath-5k": [
        (r"To what does $n^2$ tend as $n$ grows?", r"\infty"),
        (r"How many subsets has a countable set?", r"2^{\aleph_0}"),
        (r"Name the quotient of $\mathbb{Z}$ by its even numbers.", r"\mathbb{Z}_2"),
        (r"What is $\int_0^1 x\,dx$?", r"\dfrac{1}{2}"),
        (r"Is every square a rectangle?", "Yes"),
        (r"What is $e^{-1}\sqrt{\pi}$, as a product?", r"\frac{\sqrt{\pi}}{e}"),
    ],
    "math500": [
        (r"Which $x$ have $x^2 < 1$?", "(-1,1)"),
        (r"Which $x$ have $0 \le x < 2$?", "[0,2)"),
        (r"Write 0.75 as a percentage.", r"75\%"),
        (r"What is the angle of a square's corner?", r"90^\circ"),
        (r"Transpose the row $(1, 2)$.", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
        (r"Expand $(x+1)^2$.", "x^2 + 2x + 1"),
        (r"Which of (A) 1, (B) 2, (C) 3 is even?", r"\text{(B)}"),
        (r"Give the roots of $x^2 - 3x + 2$.", "1,2"),
    ],
    "amc2023": [("What is $17 + 10$?", "27.0"), ("What is half of 7?", "3.5")],
    "aime_2024": [("What is $2^5$?", "032"), ("How many seconds has an hour?", "3600")],
    "aime_2025": [("What is $7 \\cdot 11$?", "77")],
}


def _row(name: str, number: int, problem: str, answer: str) -> dict[str, Any]:
    values: dict[str, Any] = {
        "question": problem,
        "final_answer": answer,
        "difficulty": 1.5,
        "prompt": [{"content": SYSTEM, "role": "system"}, {"content": problem, "role": "user"}],
        "data_source": "math_dapo" if name == "deepmath-5k" else f"qwen_{name}",
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": number, "raw_problem": problem, "split": None},
    }
    return {column: values[column] for column in SCHEMAS[name].names}


def write_prompt_sets(folder: Path) -> dict[str, Path]:
    """FOLDER/NAME.parquet for every name in SCHEMAS."""
    files = {name: folder / f"{name}.parquet" for name in SCHEMAS}
    for name, file in files.items():
        rows = [_row(name, number, *problem) for number, problem in enumerate(PROBLEMS[name])]
        pq.write_table(pa.Table.from_pylist(rows, SCHEMAS[name]), file)
    return files
