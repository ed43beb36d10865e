"""How a flag is declared as a dataclass field, and how its value is checked.

No check here or in config/ imports torch or Megatron: a mistyped flag must not cost the seconds of those imports.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, field, fields
from typing import Any, ClassVar

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


def shown(value: Any) -> Any:
    """The value of a flag as a user writes it: a list as words."""
    return " ".join(map(str, value)) if isinstance(value, list) else value


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
                    given = single if single != "" else "''"
                    raise UsageError(f"{flag_name(declared.name)} {given}: must {allowed}")
