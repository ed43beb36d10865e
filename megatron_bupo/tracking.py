"""What a run leaves behind: run.json, metrics.jsonl and the same numbers in TensorBoard."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.tensorboard import SummaryWriter

from megatron_bupo import __version__
from megatron_bupo.config import TrainConfig
from megatron_bupo.files import new_file
from megatron_bupo.training.run_state import RunIdentity

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCHEMA = 1
_LIBRARIES = ("torch", "megatron-core", "transformers", "datasets", "math-verify")
_SAMPLED_BYTES = 1 << 20

Metrics = dict[str, Any]


class Tracker:
    """Writes on one rank; without `save` and `tensorboard_dir` it writes nothing. `done` steps were logged before."""

    def __init__(self, save: str | None, tensorboard_dir: str | None, done: int = 0) -> None:
        self._folder = Path(save) if save else None
        if self._folder:
            self._folder.mkdir(parents=True, exist_ok=True)
        board = tensorboard_dir or (str(self._folder / "tensorboard") if self._folder else None)
        self._board = SummaryWriter(board, purge_step=done + 1) if board else None

    def write_run(self, run: dict[str, Any]) -> None:
        """SAVE/run.json, written beside and renamed."""
        if self._folder is None:
            return
        with new_file(self._folder / "run.json") as beside:
            beside.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")

    def log(self, metrics: Metrics) -> None:
        """One step: a line of metrics.jsonl, and its numbers and texts in TensorBoard (a list as its mean)."""
        if self._folder is not None:
            with (self._folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(metrics) + "\n")
        if self._board is None:
            return
        step = metrics["step"]
        for name, value in metrics.items():
            if isinstance(value, list):
                value = sum(value) / len(value)
            if isinstance(value, str):
                self._board.add_text(name, value, step)
            elif isinstance(value, int | float) and name != "step":
                self._board.add_scalar(name, value, step)
        self._board.flush()

    def log_numbers(self, numbers: Mapping[str, float], step: int) -> None:
        """Numbers that only TensorBoard has."""
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)

    def log_figures(self, figures: Iterable[tuple[str, Figure]], step: int) -> None:
        """Figures by name; none is drawn without TensorBoard."""
        if self._board is not None:
            for name, figure in figures:
                self._board.add_figure(name, figure, step)
            self._board.flush()

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


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
