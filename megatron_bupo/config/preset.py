"""Presets of `evaluate`: settings under a name. Each is a file in presets/, found by listing that folder."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """What is evaluated how, where no flag says otherwise.

    Attributes:
        num_samples: from the name of a data set to the responses to each of its questions.
        temperature, top_p: of the sampling.
    """

    num_samples: Callable[[str], int]
    temperature: float = 1.0
    top_p: float = 1.0


@functools.cache
def presets() -> dict[str, Preset]:
    """The presets by name: the PRESET of every file in presets/ under its NAME."""
    package = importlib.import_module("megatron_bupo.config.presets")
    names = sorted(info.name for info in pkgutil.iter_modules(package.__path__))
    modules = [importlib.import_module(f"{package.__name__}.{name}") for name in names]
    return {module.NAME: module.PRESET for module in modules}
