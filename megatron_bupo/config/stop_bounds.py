"""When an internal phase is to end early: bounds such as `kl:0.1`, read from --internal-stop."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_bupo.errors import UsageError

# name -> (what its number must be above, what it must be at most)
_LIMITS = {"kl": (0.0, math.inf), "entropy": (0.0, math.inf), "length": (1.0, math.inf), "accuracy": (0.0, 1.0)}


@dataclass(frozen=True)
class StopBound:
    """One bound.

    >>> StopBound.parse("kl:0.1")
    StopBound(name='kl', limit=0.1)
    """

    name: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> StopBound:
        """Read ``kl:X``, ``entropy:X``, ``length:X`` or ``accuracy:X``.

        Raises:
            UsageError: anything else, or a number that could never or would always be crossed.
        """
        name, _, number = text.partition(":")
        if name not in _LIMITS or not number:
            raise UsageError(f"--internal-stop {text}: must be kl:X, entropy:X, length:X or accuracy:X")
        above, most = _LIMITS[name]
        try:
            limit = float(number)
        except ValueError:
            limit = math.nan
        if not (math.isfinite(limit) and above < limit <= most):
            ending = "" if math.isinf(most) else f" and at most {most:g}"
            raise UsageError(f"--internal-stop {text}: the number must be above {above:g}{ending}")
        return cls(name, limit)

    def __str__(self) -> str:
        return f"{self.name}:{self.limit:g}"
