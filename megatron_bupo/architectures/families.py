"""The families that there are, and what a HuggingFace folder's config.json says in its family's terms.

Neither transformers nor Megatron is needed here, so that every check runs before a process group exists.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from pathlib import Path

from megatron_bupo import architectures
from megatron_bupo.architectures.architecture import Architecture
from megatron_bupo.architectures.family import Family
from megatron_bupo.architectures.hf_config import HFConfig


@functools.cache
def families() -> dict[str, Family]:
    """model_type -> family, of every file in this folder that has a `FAMILY`."""
    modules = [
        importlib.import_module(f"{architectures.__name__}.{found.name}")
        for found in pkgutil.iter_modules(architectures.__path__)
    ]
    return {module.FAMILY.model_type: module.FAMILY for module in modules if hasattr(module, "FAMILY")}


def read_architecture(folder: str | Path) -> Architecture:
    """Read FOLDER/config.json, as written by transformers 4 or 5.

    Raises:
        UsageError: no such file, no JSON, an unknown family, or what `Family.architecture` refuses; the line names the
            file and the key.
    """
    config = HFConfig.read(Path(folder))
    model_type = config.data.get("model_type")
    if model_type is None:
        config.fail("the key 'model_type' is missing")
    family = families().get(model_type) if isinstance(model_type, str) else None
    listed = config.data.get("architectures")
    named = listed[0] if isinstance(listed, list) and listed else model_type
    if family is None or named not in (model_type, family.model_class):  # such as another head on the same network
        supported = ", ".join(known.model_class for known in families().values())
        config.fail(f"the architecture {named} (model_type {model_type}) is not supported; supported: {supported}")
    return family.architecture(config)
