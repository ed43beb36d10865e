"""The files of questions that flags name: their kinds, and the names of their data sets."""

from __future__ import annotations

from pathlib import Path

from megatron_bupo.config.paths import check_file
from megatron_bupo.errors import UsageError
from megatron_bupo.flags import flag_name

DATA_SUFFIXES = (".parquet", ".jsonl", ".json")


def check_data_files(paths: list[str] | None, name: str = "prompt_data") -> None:
    """Raise UsageError unless every one of the files is there and of a kind that is read; `name` is the flag's."""
    for path in paths or []:
        if Path(path).suffix not in DATA_SUFFIXES:
            raise UsageError(f"{flag_name(name)} {path}: must end in .parquet, .jsonl or .json")
        check_file(name, path)


def data_set_names(name: str, paths: list[str] | None) -> list[str]:
    """The files' names without their endings, which name the data sets of an evaluation.

    Raises:
        UsageError: two files, given for the flag of the field `name`, would have the same.
    """
    names = [Path(path).stem for path in paths or []]
    for number, data_set in enumerate(names):
        if data_set in names[:number]:
            raise UsageError(
                f"{flag_name(name)}: two files are named {data_set}, which names their results; rename one"
            )
    return names
