"""The tree of a checkpoint, Megatron's own: latest_checkpointed_iteration.txt beside the folder that it names.

CKPT/latest_checkpointed_iteration.txt     `release`, as a converter writes it, or a training run's iteration
CKPT/release/ or CKPT/iter_0000030/        the distributed checkpoint
CKPT/hf/                                   config, tokenizer, generation config, the tensors' map
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_bupo.config.paths import HF
from megatron_bupo.errors import UsageError

TRACKER, RELEASE = "latest_checkpointed_iteration.txt", "release"


@dataclass(frozen=True)
class Checkpoint:
    """A found checkpoint: the distributed folder, the HuggingFace side, and whether a converter wrote it."""

    folder: Path
    hf: Path
    converted: bool


def find_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint that a folder's tracker file names.

    Raises:
        UsageError: no folder, no tracker, what it names is not there, or there is no hf/ with a config.json.
    """
    path = Path(path)
    tracker = path / TRACKER
    if not tracker.is_file():
        raise UsageError(f"{path} has no {TRACKER}; give a converted checkpoint or a training run's --save folder")
    word = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if word != RELEASE and not word.isdecimal():
        raise UsageError(f"{tracker} holds {word!r}; it must be {RELEASE} or an iteration")
    folder = path / (RELEASE if word == RELEASE else f"iter_{int(word):07d}")
    if not folder.is_dir():
        raise UsageError(f"{folder} is missing; {tracker} names it")
    if not (path / HF / "config.json").is_file():
        raise UsageError(f"{path / HF} has no config.json; it is written beside every checkpoint")
    return Checkpoint(folder, path / HF, word == RELEASE)


def check_checkpoint_output(output: str | Path, force: bool) -> None:
    """Raise UsageError if `output` exists, unless `force` is set and it is a converted checkpoint."""
    output = Path(output)
    if not output.exists() and not output.is_symlink():
        return
    if not force:
        raise UsageError(f"{output} exists; give another output, or --force to replace it")
    tracker = output / TRACKER
    if output.is_symlink() or not tracker.is_file() or tracker.read_text(encoding="utf-8").strip() != RELEASE:
        raise UsageError(f"{output} exists and is no converted checkpoint; only such a folder is replaced")
