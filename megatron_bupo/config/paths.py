"""Files and folders that flags name: what is read must be there, what is written is tried before anything starts."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from megatron_bupo.config import launch
from megatron_bupo.errors import UsageError
from megatron_bupo.flags import flag_name

HF = "hf"
"""In the folder of checkpoints: configuration and tokenizer, for every one of them."""


def check_file(name: str, path: str) -> None:
    """Raise UsageError unless `path`, given for the flag of that field name, is a file."""
    if not Path(path).is_file():
        found = "is a folder" if Path(path).is_dir() else "is not there"
        raise UsageError(f"{flag_name(name)} {path}: the file {found}; give an existing file")


def check_output_file(name: str, path: str) -> None:
    """Raise UsageError unless a file can be written at `path`, in place of the one that may be there."""
    _try_writing(name, path, Path(path).absolute().parent)
    if Path(path).exists() and not Path(path).is_file():
        kind = "a folder" if Path(path).is_dir() else "no regular file"
        raise UsageError(f"{flag_name(name)} {path}: is {kind}; give the name of a file")


def check_output_folder(name: str, path: str | None, taken: str | None = None) -> None:
    """Raise UsageError unless files can be written into a folder at `path`; `taken` is what an earlier run leaves."""
    if path is None:
        return
    _try_writing(name, path, Path(path).absolute())
    if taken is not None and (Path(path) / taken).exists():
        raise UsageError(f"{flag_name(name)} {path}: already holds {taken} of an earlier run; choose another folder")


def check_new_folder(name: str, path: str | None) -> None:
    """Raise UsageError unless a folder can be written beside `path` and then take its name."""
    if path is not None:
        _try_writing(name, path, Path(path).absolute().parent)


def _try_writing(name: str, path: str, folder: Path) -> None:
    """Raise UsageError unless a new folder with a file fits into `folder`, or into the nearest one above it.

    They are really written, and removed again: permissions do not tell about root under /proc, full disks and read-only
    ones. They have another name than `path`, which other ranks may be looking for. Only the first rank writes.
    """
    nearest, target = folder, Path(path).absolute()
    try:
        # What is written has this name until it is whole.
        _is_there(target.parent / f".{target.name}.{os.getpid()}.partial")
        while not _is_there(nearest):
            nearest = nearest.parent
        if not nearest.is_dir():
            kind = "file" if nearest.exists() else "link to nothing"
            raise UsageError(f"{flag_name(name)} {path}: {nearest} is a {kind}, not a folder; choose another place")
        if launch.rank() == 0:
            with (
                tempfile.TemporaryDirectory(dir=nearest, prefix=".megatron-bupo-") as trial,
                (Path(trial) / "file").open("wb") as file,
            ):
                file.write(bytes(4096))
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        reason = f"nothing can be written in {nearest} ({error.strerror})"
        raise UsageError(f"{flag_name(name)} {path}: {reason}; choose another place") from error


def _is_there(path: Path) -> bool:
    """Whether something has this name, a link to nothing too; OSError where nothing can have it."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
