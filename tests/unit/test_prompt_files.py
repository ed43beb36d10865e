"""Prompt files: a name is that file's, an answer keeps its digits, and what is no answer is refused by row."""

import datetime
import json
import os
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest

from megatron_bupo.analysis.flow_file import FILE_NAME, read_flow
from megatron_bupo.config.command_line import parse
from megatron_bupo.config.commands import SelectLayerConfig
from megatron_bupo.data.prompt_files import answer_text, read_rows
from megatron_bupo.data.rollout_files import read_rollouts
from megatron_bupo.errors import UsageError
from tests.data.prompt_sets import SCHEMAS, write_prompt_sets

DATA = Path(__file__).parents[2].parent / "shared" / "data"
DECOYS = ("b1", "sAx", "sBx", "c", "d", "x", "xy", "y", "b", "data", "q")
NAMES = (
    "b[1]", "b[!2]", "s*x", "?", "**", "{x,y}", "c::d", "zip::c", "file:c", "http:c", "hf:c", "x@y", "two words", " x ",
    "line\nbreak", "tab\tx", "\u00fcn\u00ef-\u65e5\u672c", "-dash", "--prompt-data", "~", "~root", "100%", "b%5B1%5D",
    "a#b", "q?x=1", "a&b;c", "$HOME", "back\\slash", "'q\"", ".hidden", "train-00000-of-00001", "a.jsonl.gz",
)  # fmt: skip
FLOW = Path(__file__).parents[2] / "docs" / "smollm2_flow.json"


def write(file: Path, **columns: Any) -> Path:
    """A table as parquet or JSON lines, which the name decides."""
    file.parent.mkdir(exist_ok=True)
    table = pa.table(columns)
    if file.suffix == ".parquet":
        pq.write_table(table, file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    return file


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("folder", [".", "v2", "x[v2]", "a::b", "file:", "s*"])
def test_a_name_is_that_files_and_no_other(tmp_path: Path, folder: str, suffix: str) -> None:
    """Beside every file lie others that its name would mean as a pattern or as an address."""
    for name in (*DECOYS, *NAMES):
        for place in {folder, "v2", "xv", "sv"}:
            write(tmp_path / place / f"{name}{suffix}", prompt=[f"{place}/{name}"], answer=["1"])
    for name in NAMES:
        [(_, row)] = read_rows(tmp_path / folder / f"{name}{suffix}")
        assert row == {"prompt": f"{folder}/{name}", "answer": "1"}
    (tmp_path / folder / f"b[1]{suffix}").unlink()
    with pytest.raises(UsageError, match="cannot be read"):
        list(read_rows(tmp_path / folder / f"b[1]{suffix}"))


def test_a_name_need_not_be_text(tmp_path: Path) -> None:
    file = write(tmp_path / os.fsdecode(b"\xff.jsonl"), prompt=["x"])
    assert list(read_rows(file)) == [(f"{file}, row 1", {"prompt": "x"})]


@pytest.mark.parametrize("name", NAMES)
def test_rollouts_flows_and_settings_have_any_name(tmp_path: Path, name: str, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, mark in ((Path(name), 7), (Path("b1"), 8), (Path("sAx"), 8)):
        folder.mkdir()
        record = {"group": 0, "prompt_tokens": [5], "response_tokens": [mark]}
        (folder / f"{name}.jsonl").write_text(json.dumps(record))
        flow = json.loads(FLOW.read_text()) | {"model": str(mark)}
        for file in (FILE_NAME, f"{name}.json"):
            (folder / file).write_text(json.dumps(flow))
        (folder / f"{name}.yaml").write_text(f"flow: {json.dumps(str(folder / f'{name}.json'))}\n")
    own = Path(name)
    assert read_rollouts(own / f"{name}.jsonl")[0].response_tokens == [7]
    assert read_flow(own).model == read_flow(own / f"{name}.json").model == "7"
    config = parse("select-layer", [f"--config={own / name}.yaml"])
    assert isinstance(config, SelectLayerConfig) and config.flow == str(own / f"{name}.json")


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    mark = "\ufeff".encode()
    prompts, rollouts, flow, settings = (tmp_path / name for name in ("p.jsonl", "r.jsonl", "f.json", "c.yaml"))
    prompts.write_bytes(mark + '{"prompt": "\ufeffx"}\r\n{"prompt": "y"}'.encode())
    assert [row["prompt"] for _, row in read_rows(prompts)] == ["\ufeffx", "y"]
    rollouts.write_bytes(mark + b'{"group": 0, "prompt_tokens": [5], "response_tokens": [7]}\n')
    assert len(read_rollouts(rollouts)) == 1
    flow.write_bytes(mark + FLOW.read_bytes())
    assert read_flow(flow) == read_flow(FLOW)
    settings.write_bytes(mark + f"flow: {flow}\n".encode())
    config = parse("select-layer", ["--config", str(settings)])
    assert isinstance(config, SelectLayerConfig) and config.flow == str(flow)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"])
def test_other_encodings_end_with_one_line(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(
        '{"prompt": "caf\u00e9", "group": 0, "prompt_tokens": [5], "response_tokens": [7]}\n'.encode(encoding)
    )
    readers = (lambda: list(read_rows(file)), lambda: read_rollouts(file), lambda: read_flow(file))
    for read in readers:
        with pytest.raises(UsageError, match=r"a\.jsonl: .*not UTF-8 text.*; save it as UTF-8") as error:
            read()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("column", "texts"),
    [
        (
            pa.array([0.1, 5, None, float("nan"), 1e-7, 1e20], pa.float32()),
            ["0.1", "5.0", None, None, "0.0000001", "1" + "0" * 20 + ".0"],
        ),
        (pa.array([np.float16(0.1), np.float16(5)], pa.float16()), ["0.1", "5.0"]),
        (pa.array([0.1, 1 / 3, -2.0, 1e22]), ["0.1", "0.3333333333333333", "-2.0", "1" + "0" * 22 + ".0"]),
        (pa.array([Decimal("1.50"), Decimal("-0.01"), None]), ["1.50", "-0.01", None]),
        (pa.array([Decimal("9" * 50)], pa.decimal256(60, 0)), ["9" * 50]),
        (pa.array([2**64 - 1, 0], pa.uint64()), [str(2**64 - 1), "0"]),
        (pa.array([-128, None], pa.int8()), ["-128", None]),
        (pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"]),
        (pa.array(["a", None], pa.large_string()), ["a", None]),
        (pa.array([None, None], pa.null()), [None, None]),
        (pa.array([" ", "", " x "]), [None, None, " x "]),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_answers_keep_their_digits(tmp_path: Path, column: pa.Array, texts: list[str | None]) -> None:
    truths = pa.StructArray.from_arrays([column], ["ground_truth"])
    file = write(tmp_path / "a.parquet", prompt=["x"] * len(column), answer=column, reward_model=truths)
    rows = [row for _, row in read_rows(file)]
    assert [answer_text(row["answer"]) for row in rows] == texts
    assert [answer_text(row["reward_model"]["ground_truth"]) for row in rows] == texts


@pytest.mark.parametrize(
    ("column", "name"),
    [
        (pa.array([datetime.date(2024, 1, 2)]), "a date32"),
        (pa.array([1], pa.timestamp("ns")), "a timestamp"),
        (pa.array([2**30], pa.date32()), "a date32"),  # beyond the dates that Python has
        (pa.array([1], pa.duration("ns")), "a duration"),
        (pa.array([b"8"]), "a binary"),
        (pa.array([["8"]]), "a list"),
        (pa.array([{"a": 1}]), "a struct"),
        (pa.array([True]), "a bool"),
        (pa.array([float("-inf")]), "infinite"),
        (pa.array([float("inf")], pa.float16()), "infinite"),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_what_is_no_answer_is_refused(tmp_path: Path, column: pa.Array, name: str) -> None:
    [(_, row)] = read_rows(write(tmp_path / "a.parquet", prompt=["x"], answer=column))
    with pytest.raises(ValueError, match=f"^{name}"):
        answer_text(row["answer"])


def test_numpy_scalars_are_numbers_too() -> None:
    values = [np.int16(7), np.float64(0.5), np.str_("x"), np.float32("nan")]
    assert [answer_text(value) for value in values] == ["7", "0.5", "x", None]
    for value in (np.True_, np.datetime64("2024-01-02"), np.array([1]), b"8", [8], {}):
        with pytest.raises(ValueError, match=r"^a "):
            answer_text(value)


def test_class_labels_are_their_names(tmp_path: Path) -> None:
    label = datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features(
        {
            "prompt": datasets.Value("string"),
            "answer": label,
            "reward_model": {"ground_truth": label},
            "data_source": label,
        }
    )
    rows = [{"prompt": "x", "answer": n, "reward_model": {"ground_truth": n}, "data_source": n} for n in (1, 0, -1)]
    datasets.Dataset.from_list(rows, features).to_parquet(str(tmp_path / "a.parquet"))
    read = [row for _, row in read_rows(tmp_path / "a.parquet")]
    assert [row["answer"] for row in read] == ["yes", "no", None]
    assert [row["reward_model"] for row in read] == [{"ground_truth": name} for name in ("yes", "no", None)]
    assert [row["data_source"] for row in read] == ["yes", "no", None]


def test_only_the_needed_columns_are_read(tmp_path: Path) -> None:
    """A column of another type than Python has (nanoseconds) stops nothing; its name is there for the error line."""
    file = write(tmp_path / "a.parquet", when=pa.array([1], pa.timestamp("ns")), prompt=["x"])
    assert [row for _, row in read_rows(file)] == [{"when": None, "prompt": "x"}]
    file = write(tmp_path / "a.parquet", when=pa.array([1, 2], pa.timestamp("ns")))
    assert list(read_rows(file)) == [(f"{file}, row {number}", {"when": None}) for number in (1, 2)]


def test_the_columns_of_the_data_sets_of_the_paper(tmp_path: Path) -> None:
    """Where the data sets lie beside the checkout, the small ones of the tests have their schemas."""
    for name, file in write_prompt_sets(tmp_path).items():
        rows = [row for _, row in read_rows(file)]
        assert all(answer_text(row["reward_model"]["ground_truth"]) for row in rows), name
        published = DATA / file.name
        if published.is_file():
            assert pq.read_schema(published).equals(SCHEMAS[name]), name
