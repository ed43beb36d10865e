"""A function in a file of the user's, FILE.py:function: found before anything starts, loaded where it is called."""

from __future__ import annotations

import functools
import importlib.util
import symtable
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_bupo.errors import UsageError


class UserFunction(NamedTuple):
    """The function `name` of the file `path` (absolute)."""

    path: str
    name: str

    @classmethod
    def parse(cls, flag: str, text: str, signature: str, names: Sequence[str]) -> UserFunction:
        """Read ``FILE.py:function``. The file is compiled to look for the name, but not run.

        Args:
            flag: such as --reward, for the errors.
            signature: of the function, such as `record`, for the advice.
            names: what the flag can be instead, for the errors.

        Raises:
            UsageError: another spelling, a missing file, one that is no Python, or one without that function.
        """
        file, _, name = text.rpartition(":")
        given = f"{flag} {text}"
        if not file.endswith(".py") or not name.isidentifier():
            raise UsageError(f"{given}: must be {', '.join(names)} or FILE.py:function, such as mine.py:score")
        try:
            source = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise UsageError(f"{given}: cannot read the file {file} ({reason})") from error
        try:
            module = symtable.symtable(source, file, "exec")
        except (SyntaxError, ValueError) as error:
            raise UsageError(f"{given}: {file} is not valid Python ({one_line(error)})") from error
        symbol = module.lookup(name) if name in module.get_identifiers() else None
        if symbol is None or not (symbol.is_assigned() or symbol.is_imported()):
            raise UsageError(f"{given}: {file} defines no {name}; write `def {name}({signature}): ...` there")
        return cls(str(Path(file).resolve()), name)

    def load(self) -> Callable[..., Any]:
        """Run the file and return its function, once in this process. The folder of the file is importable for it.

        Raises:
            UsageError: running the file fails, or the name is no function.
        """
        return _load(self)

    def __str__(self) -> str:
        return f"{self.path}:{self.name}"


@functools.cache
def _load(function: UserFunction) -> Callable[..., Any]:
    folder = str(Path(function.path).parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    name = f"megatron_bupo_user_{Path(function.path).stem}"
    spec = importlib.util.spec_from_file_location(name, function.path)
    assert spec is not None and spec.loader is not None, function.path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UsageError(f"running the file {function.path} failed ({one_line(error)})") from error
    loaded: Any = getattr(module, function.name, None)
    if not callable(loaded):
        raise UsageError(f"{function.name} in {function.path} is not a function")
    return loaded  # type: ignore[no-any-return]


def one_line(error: BaseException | str) -> str:
    """An error, or a text, on one line of at most 300 characters."""
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:300]
