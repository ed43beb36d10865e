"""Imports that take seconds."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_gc() -> Iterator[None]:
    """For imports: their objects stay, and to look for garbage among them takes a quarter of the whole time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
