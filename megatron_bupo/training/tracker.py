"""Writes the files of a run: run.json, metrics.jsonl, and the same numbers for TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_bupo.files import new_file
from megatron_bupo.policy_spec import PolicySpec
from megatron_bupo.training.board import add_first_page, add_flags, samples

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter

    from megatron_bupo.samples import Rollout

Metrics = dict[str, Any]


class Tracker:
    """Writes on one rank; without `save` and `tensorboard_dir` it writes nothing. `done` steps were logged before."""

    def __init__(self, save: str | None, tensorboard_dir: str | None, done: int = 0) -> None:
        self._folder = Path(save) if save else None
        if self._folder:
            self._folder.mkdir(parents=True, exist_ok=True)
        board = tensorboard_dir or (str(self._folder / "tensorboard") if self._folder else None)
        self._board: SummaryWriter | None = None
        if board:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(board, purge_step=done + 1 if done else 0)
            add_first_page(self._board)

    def write_run(self, run: dict[str, Any]) -> None:
        """SAVE/run.json, written beside and renamed; its flags for TensorBoard."""
        if self._board is not None:
            add_flags(self._board, run["flags"])
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
        if "phase" in metrics:  # not where the model is evaluated before the first step
            self._board.add_scalar("trained_layer", PolicySpec.parse(metrics["phase"]).layer or 0, step)
        for name, value in metrics.items():
            if isinstance(value, list):
                value = sum(value) / len(value)
            if isinstance(value, str):
                self._board.add_text(name, value, step)
            elif isinstance(value, int | float) and name != "step":
                self._board.add_scalar(name, value, step)
        self._board.flush()

    def log_samples(self, rollouts: Sequence[Rollout], step: int) -> None:
        """Responses of the step, for TensorBoard alone."""
        if self._board is not None:
            for name, text in samples(rollouts, step):
                self._board.add_text(name, text, step)

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
