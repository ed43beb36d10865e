"""A function in a file of the user's, FILE.py:function: found before anything starts, loaded where it is called."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import inspect
import symtable
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
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
        """Run the file, once in this process, and return its function. The folder of the file is importable for it.

        Raises:
            UsageError: running the file fails, or the name is no function of one argument.
        """
        loaded = getattr(_module(self.path), self.name, None)
        if not callable(loaded):
            raise UsageError(f"{self.name} in {self.path} is not a function")
        try:
            inspect.signature(loaded).bind(None)
        except TypeError as error:
            raise UsageError(f"{self.name} in {self.path} must take one argument ({error})") from error
        return loaded  # type: ignore[no-any-return]

    def fingerprint(self) -> str:
        """`mine.py:score (sha256 0123456789abcdef)`: the same wherever the file lies, another once it is changed."""
        digest = hashlib.sha256(Path(self.path).read_bytes()).hexdigest()
        return f"{Path(self.path).name}:{self.name} (sha256 {digest[:16]})"


def fingerprint(flag: str, text: str, signature: str, names: Sequence[str]) -> str:
    """What a flag says, to tell whether it is the same in another start: one of the names, or a function with the hash
    of its file. Arguments and errors as of `UserFunction.parse`.
    """
    return text if text in names else UserFunction.parse(flag, text, signature, names).fingerprint()


@functools.cache
def _module(path: str) -> ModuleType:
    name = f"megatron_bupo_user_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    folder = str(Path(path).parent)
    # First while the file runs, then last: a checkout of Megatron beside it must not replace the installed one later.
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UsageError(f"running the file {path} failed ({one_line(error)})") from error
    finally:
        sys.path.remove(folder)
        if folder not in sys.path:
            sys.path.append(folder)
    return module


def one_line(error: BaseException | str) -> str:
    """An error, or a text, on one line of at most 300 characters."""
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:300]
