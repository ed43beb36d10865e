"""What a run was: the content of run.json, and the fingerprint of its model."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_bupo import __version__
from megatron_bupo.config.train import TrainConfig
from megatron_bupo.training.run_state import RunIdentity

SCHEMA = 1
_LIBRARIES = ("torch", "megatron-core", "transformers", "datasets", "math-verify")
_SAMPLED_BYTES = 1 << 20


def describe_run(
    config: TrainConfig,
    phases: str,
    identity: RunIdentity,
    changes: tuple[str, ...],
    chosen_layer: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of run.json: what it takes to run it again, and to see that it is the same run.

    `changes` is what a resumed run was told to go on with, `chosen_layer` what --internal-layer auto chose, and why.
    """
    return {
        "schema": SCHEMA,
        "flags": asdict(config),
        "phases": phases,
        "versions": {"megatron_bupo": __version__, "python": platform.python_version(), **_versions()},
        "commit": _commit(),
        "model": identity.model,
        "data": identity.data or list(identity.replay),
        "changes": list(changes),
        **({"internal_layer": chosen_layer} if chosen_layer is not None else {}),
    }


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in _LIBRARIES}


def _commit() -> str | None:
    """The commit of the checkout that this package runs from, with a + if it is changed; None outside of one."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def fingerprint(folder: Path) -> str:
    """sha256 over names, sizes and content of a HuggingFace folder's config and weights.

    Of each file only the first, middle and last MiB are read, so that it costs nothing at any size: it tells models
    apart, it does not prove that every byte is the same.
    """
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for start in sorted({0, max(0, size // 2), max(0, size - _SAMPLED_BYTES)}):
                file.seek(start)
                digest.update(file.read(_SAMPLED_BYTES))
    return digest.hexdigest()
