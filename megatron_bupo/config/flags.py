"""How a flag is declared as a dataclass field, and how its value is checked.

Nothing in this folder imports torch or Megatron: a mistyped flag must not cost the seconds of those imports.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import MISSING, Field, field, fields
from pathlib import Path
from typing import Any, ClassVar

from megatron_bupo.config import launch
from megatron_bupo.errors import UsageError


def flag(
    help: str,
    default: Any = MISSING,
    *,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
    metavar: str | None = None,
) -> Any:
    """A dataclass field that is a flag; without a default it is required.

    Numbers lie in [low, high] or, with the open ends, in (above, below); a value of None is never checked.
    """
    limits = {"low": low, "above": above, "high": high, "below": below}
    return field(default=default, metadata={"help": help, "choices": choices, "metavar": metavar, **limits})


def same_flag(group: type[Group], name: str, default: Any = MISSING) -> Any:
    """The flag of another group once more, for a command that does not use the rest of that group."""
    declared = group.__dataclass_fields__[name]
    return field(default=declared.default if default is MISSING else default, metadata=declared.metadata)


def flag_name(name: str) -> str:
    return "--" + name.replace("_", "-")


def _allowed(value: Any, metadata: Mapping[str, Any]) -> str | None:
    """What a value must be, in words, or None when it is that."""
    if isinstance(value, str):
        if not value:
            return "not be empty"
        if metadata["choices"] and value not in metadata["choices"]:
            return f"be one of {', '.join(metadata['choices'])}"
    elif isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            return "be a finite number"
        low, above, high, below = (metadata[name] for name in ("low", "above", "high", "below"))
        inside = (low is None or value >= low) and (above is None or value > above)
        if not (inside and (high is None or value <= high) and (below is None or value < below)):
            ends = (("at least", low), ("greater than", above), ("at most", high), ("less than", below))
            return "be " + " and ".join(f"{words} {end}" for words, end in ends if end is not None)
    return None


class Group:
    """A frozen dataclass of flags, or of other groups. Its docstring is the title over its flags in --help."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def check(self) -> None:
        """Raise UsageError for the first flag whose value is not allowed, or combination that cannot be."""
        for declared in fields(self):
            value = getattr(self, declared.name)
            if isinstance(value, Group):
                value.check()
                continue
            for single in value if isinstance(value, list) else [value]:
                allowed = _allowed(single, declared.metadata)
                if allowed:
                    shown = single if single != "" else "''"
                    raise UsageError(f"{flag_name(declared.name)} {shown}: must {allowed}")


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
        _is_there(target.parent / f".{target.name}.{os.getpid()}.partial")  # what is written takes its name at the end
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
