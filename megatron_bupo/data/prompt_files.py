"""Rows of prompt files, parquet and JSON lines, one by one: a file of any size is never in memory as a whole.

A file is opened by its name, and the reader gets the open file: in the name, `*`, `[1]`, `::` and the like are
characters as any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from megatron_bupo.config.data_files import DATA_SUFFIXES
from megatron_bupo.errors import UsageError
from megatron_bupo.files import json_object, text_lines

COLUMNS = ("prompt", "reward_model", "answer", "data_source")
_BATCH_ROWS = 1024
_TEXT_OR_NUMBER = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    pa.types.is_integer,
    pa.types.is_floating,
    pa.types.is_decimal,
    pa.types.is_boolean,  # refused by name in every row, as in JSON lines
    pa.types.is_null,
)


@dataclass(frozen=True)
class OtherType:
    """In place of an answer of a column type that holds neither text nor numbers (dates, bytes, lists, ...)."""

    name: str


def read_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a file, each with its name for errors ("FILE, row 3"; rows from 1, in JSON lines the number of the line).

    A row of JSON lines is the object as it stands. A row of a parquet file has every column, with the values of COLUMNS
    and None for the others, which are not read; an answer is a numpy scalar where the column is float16 or float32, the
    name of a class label, and `OtherType` where it is neither text nor a number.

    Raises:
        UsageError: a file that cannot be read, is broken or has no rows.
    """
    assert file.suffix in DATA_SUFFIXES, file
    rows = _parquet_rows(file) if file.suffix == ".parquet" else _json_rows(file)
    is_empty = True
    for number, row in rows:
        is_empty = False
        yield f"{file}, row {number}", row
    if is_empty:
        raise UsageError(f"{file}: no rows in it")


def answer_text(value: Any) -> str | None:
    """An answer as text, or None where there is none (null, NaN, blank text).

    Integers and decimals keep all their digits; a float becomes the shortest decimal that is read as the same float of
    its width (float32 0.1 is "0.1"), without exponent.

    Raises:
        ValueError: infinity, or a value that is neither text nor a number (bool, date, bytes, list, ...).

    >>> [answer_text(value) for value in (" x ", 8, np.float32(0.1), 1e-7, Decimal("1.50"), float("nan"), "")]
    [' x ', '8', '0.1', '0.0000001', '1.50', None, None]
    """
    if value is None or isinstance(value, str):
        return value if value and value.strip() else None
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float | np.floating | Decimal):
        if value != value:
            return None
        if abs(value) == float("inf"):
            raise ValueError("infinite")
        return f"{value:f}" if isinstance(value, Decimal) else np.format_float_positional(value, trim="0")
    name = value.name if isinstance(value, OtherType) else type(value).__name__
    raise ValueError(f"a {name}")


def _json_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    # Line by line: a reader with one type per column would turn answers such as "2024-01-01" into timestamps, and could
    # not name the row that is malformed.
    try:
        for number, line in enumerate(text_lines(file), start=1):
            if line.strip():
                yield number, json_object(line, where=f"{file}, row {number}")
    except OSError as error:
        raise UsageError(f"{file}: cannot be read ({error.strerror})") from error


def _parquet_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    try:
        with file.open("rb") as stream:
            parquet = pq.ParquetFile(stream)
            schema = parquet.schema_arrow
            names = [name for name in COLUMNS if name in schema.names]
            labels = _label_names(schema)
            every = dict.fromkeys(schema.names)
            for batch in parquet.iter_batches(_BATCH_ROWS, columns=names):
                columns = {name: _values(batch.column(name), name, labels) for name in names}
                for place in range(batch.num_rows):
                    number += 1
                    yield number, every | {name: column[place] for name, column in columns.items()}
    except (OSError, ValueError, ArithmeticError, LookupError, pa.ArrowException) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"{file}: cannot be read ({reason})") from error


def _label_names(schema: pa.Schema) -> dict[str, list[str]]:
    """The names of class labels by column: a parquet file of `datasets` holds their numbers, and the names beside."""
    if b"ClassLabel" not in (schema.metadata or {}).get(b"huggingface", b""):
        return {}
    from datasets import ClassLabel, Features  # takes seconds, and few files need it

    features = dict(Features.from_arrow_schema(schema))
    if isinstance(features.get("reward_model"), dict):
        features["reward_model"] = features["reward_model"].get("ground_truth")
    return {name: feature.names for name, feature in features.items() if isinstance(feature, ClassLabel)}


def _values(column: pa.Array, name: str, labels: dict[str, list[str]]) -> list[Any]:
    """The values of one of COLUMNS in a batch; of `reward_model` the ground truth only."""
    if name == "reward_model" and pa.types.is_struct(column.type):
        if column.type.get_field_index("ground_truth") < 0:
            return [{}] * len(column)
        truth = pc.struct_field(column, "ground_truth")
        values = _named(truth, labels[name]) if name in labels else _answers(truth)
        return [{"ground_truth": value} for value in values]
    if name in labels:
        return _named(column, labels[name])
    return _answers(column) if name == "answer" else column.to_pylist()


def _named(column: pa.Array, names: list[str]) -> list[str | None]:
    """Class labels by name; a negative one is not known."""
    return [None if number is None or number < 0 else names[number] for number in column.to_pylist()]


def _answers(column: pa.Array) -> list[Any]:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if pa.types.is_float16(kind) or pa.types.is_float32(kind):
        width = kind.to_pandas_dtype()
        return [None if value is None else width(value) for value in column.to_pylist()]
    if any(is_kind(kind) for is_kind in _TEXT_OR_NUMBER):
        return column.to_pylist()
    return [OtherType(str(kind)) if valid else None for valid in column.is_valid().to_pylist()]
