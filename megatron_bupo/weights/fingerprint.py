"""Fingerprints of models on disk, that cost nothing at any size."""

from __future__ import annotations

import hashlib
from pathlib import Path

_SAMPLED_BYTES = 1 << 20
_HF, _CHECKPOINT = ("config.json", "*.safetensors"), (".metadata", "metadata.json", "*.distcp")


def fingerprint(folder: Path) -> str:
    """sha256 over names, sizes and content of a HuggingFace folder's config and weights.

    Of each file only the first, middle and last MiB are read: it tells models apart, it does not prove that every byte
    is the same.
    """
    return _digest(folder, _HF)


def checkpoint_fingerprint(folder: Path) -> str:
    """The same of the distributed checkpoint in a folder."""
    return _digest(folder, _CHECKPOINT)


def _digest(folder: Path, patterns: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for pattern in patterns for path in folder.glob(pattern)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for start in sorted({0, max(0, size // 2), max(0, size - _SAMPLED_BYTES)}):
                file.seek(start)
                digest.update(file.read(_SAMPLED_BYTES))
    return digest.hexdigest()
