"""Bottom-up Policy Optimization (arXiv 2512.19673) on Megatron-core models. In a notebook: `load` (lens.py)."""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`load` and `PolicyLens`; torch and transformers take seconds to import and are imported with them only."""
    if name in ("load", "PolicyLens"):
        from megatron_bupo import lens

        return getattr(lens, name)
    raise AttributeError(f"module 'megatron_bupo' has no attribute '{name}'")
