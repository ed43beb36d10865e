"""Writing a file or a folder whole or not at all, also if the power fails; reading text lines and JSON objects."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_bupo.errors import UsageError

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


@contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to `path` at the end; an older file of that name is replaced.

    The folder is created where it is missing. After an error the temporary file is removed and an older file is kept.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield beside
        _sync(beside)
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """An empty folder .NAME.partial beside `path`, renamed to `path` at the end; an older folder there is replaced.

    For one process. After an error it is removed; after a kill it is left, and the next write removes it.

    Raises:
        UsageError: an OSError of any kind, inside the `with` too: the disk is full, the place cannot be written.
    """
    target = Path(path).absolute()
    partial, old = (target.with_name(f".{target.name}.{kind}") for kind in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        for written in [*partial.rglob("*"), partial]:
            _sync(written)
        if target.exists():  # a folder with files cannot be renamed over
            shutil.rmtree(old, ignore_errors=True)
            os.replace(target, old)
        os.replace(partial, target)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UsageError(f"{target} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def text_lines(path: str | Path) -> Iterator[str]:
    """The lines of a UTF-8 text file with their line ends, without a byte-order mark at the start.

    Raises:
        UsageError: the file is not UTF-8 text.
        OSError: it cannot be opened or read.
    """
    with Path(path).open("rb") as stream:
        start = stream.peek(4)[:4]
        # ASCII text in UTF-16 is valid UTF-8 as well: it is known by its zero bytes.
        if start.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) or b"\0" in start:
            raise UsageError(f"{path}: cannot be read (not UTF-8 text but UTF-16, or no text); save it as UTF-8")
        try:
            with io.TextIOWrapper(stream, encoding="utf-8-sig") as text:
                yield from text
        except UnicodeDecodeError as error:
            raise UsageError(f"{path}: cannot be read (not UTF-8 text); save it as UTF-8") from error


def json_object(line: str, where: str) -> dict[str, Any]:
    """The JSON object in a line of a JSON-lines file; `where` names file and line in the errors.

    Raises:
        UsageError: no JSON, another value than an object, or text that is not Unicode (half a surrogate pair).
    """
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError: also an integer of more than 4300 digits
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error).partition(";")[0]
        raise UsageError(f"{where}: not JSON ({reason}); write one JSON object a line") from error
    if not isinstance(value, dict):
        raise UsageError(f"{where}: a {type(value).__name__} instead of a JSON object; write one JSON object a line")
    if _SURROGATE.search(line):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise UsageError(
                f"{where}: one half of a surrogate pair (\\ud800 to \\udfff); write both halves"
            ) from error
    return value
