r"""Draw groups of training runs side by side, each as the mean over its runs with a band: BuPO against GRPO over seeds.

    python tools/compare_runs.py --output comparison.png \
        --runs BuPO=runs/bupo_0,runs/bupo_1,runs/bupo_2 GRPO=runs/grpo_0,runs/grpo_1,runs/grpo_2

The band is the standard error over the runs. Against --x seconds a run's value holds until its next step ends. A table
says what the last --window steps of every group come to.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from megatron_bupo.analysis.plots import (
    COLOURS,
    FORMATS,
    PLAIN_TEXT,
    drawable,
    moving_average,
    new_figure,
    read_metrics,
    save_figure,
)
from megatron_bupo.analysis.side_by_side import open_console
from megatron_bupo.config.paths import check_output_file
from megatron_bupo.config.program import run_program
from megatron_bupo.errors import UsageError
from megatron_bupo.flags import Group, flag

POINTS = 200  # of a curve against seconds


@dataclass(frozen=True, kw_only=True)
class CompareRunsConfig(Group):
    """groups of runs side by side"""

    runs: list[str] = flag("groups of --save folders", metavar="NAME=DIR,DIR...")
    output: str = flag("figure that is written, .png or .pdf", metavar="FILE")
    metric: str = flag("key of metrics.jsonl; of a list its mean", "reward_mean")
    x: str = flag("what the curves are drawn against", "step", choices=("step", "seconds"))
    window: int = flag("steps of the moving average of each run, and of the table", 5, low=1)

    def check(self) -> None:
        super().check()
        _ = self.groups
        if Path(self.output).suffix.lstrip(".") not in FORMATS:
            raise UsageError(f"--output {self.output}: must end in .png or .pdf")
        check_output_file("output", self.output)

    @property
    def groups(self) -> dict[str, list[str]]:
        """Name -> folders. Raises UsageError: a word of another form, or a name twice."""
        groups: dict[str, list[str]] = {}
        for word in self.runs:
            name, _, folders = word.partition("=")
            listed = [folder for folder in folders.split(",") if folder]
            if not name or not listed or name in groups:
                raise UsageError(f"--runs {word}: must be NAME=DIR,DIR..., each name once")
            groups[name] = listed
        return groups


@dataclass(frozen=True)
class Curve:
    """One run: x of its steps (step numbers, or seconds since its start) and the metric there."""

    x: list[float]
    y: list[float]

    @classmethod
    def read(cls, run: str, metric: str, x: str) -> Curve:
        """Raises UsageError: no metrics, or a step without the metric."""
        steps = read_metrics(run)
        values = [_number(step, metric, run) for step in steps]
        if x == "step":
            return cls([float(step["step"]) for step in steps], values)
        return cls(list(accumulate(_number(step, "time/step", run) for step in steps)), values)

    def smoothed(self, window: int) -> Curve:
        return Curve(self.x, moving_average(self.y, window))

    def at(self, x: np.ndarray) -> np.ndarray:
        """The value of the last step that has ended at each x; NaN before the first."""
        index = np.searchsorted(self.x, x, side="right") - 1
        return np.where(index >= 0, np.asarray(self.y)[index.clip(min=0)], np.nan)


def _number(step: Mapping[str, Any], metric: str, run: str) -> float:
    value = step.get(metric)
    if isinstance(value, list) and value:
        value = sum(value) / len(value)
    if not isinstance(value, int | float):
        known = ", ".join(sorted(key for key, one in step.items() if isinstance(one, int | float | list)))
        raise UsageError(f"--metric {metric}: step {step['step']} of {run} has no such number; it has {known}")
    return float(value)


def band(curves: Sequence[Curve], x: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, mean and standard error over the runs [N] each (0 for a single run), where all runs have values."""
    if x == "step":
        common = sorted(set.intersection(*(set(curve.x) for curve in curves)))
    else:
        common = np.linspace(max(curve.x[0] for curve in curves), min(curve.x[-1] for curve in curves), POINTS).tolist()
    if not common:
        raise UsageError("--runs: the runs of a group have no step in common")
    places = np.asarray(common)
    values = np.stack([curve.at(places) for curve in curves])
    errors = values.std(axis=0, ddof=1) / math.sqrt(len(curves)) if len(curves) > 1 else np.zeros(len(places))
    return places, values.mean(axis=0), errors


def draw(groups: Mapping[str, Sequence[Curve]], config: CompareRunsConfig) -> None:
    """The figure of all groups, saved."""
    figure = new_figure(7.0, 4.0)
    axes = figure.subplots()
    for index, (name, curves) in enumerate(groups.items()):
        x, mean, error = band([curve.smoothed(config.window) for curve in curves], config.x)
        colour = COLOURS[index % len(COLOURS)]
        runs = f"{len(curves)} runs" if len(curves) > 1 else "1 run"
        axes.plot(x, mean, color=colour, linewidth=2, label=drawable(f"{name} ({runs})"))
        axes.fill_between(x, mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)
    axes.set_xlabel(config.x)
    axes.set_ylabel(drawable(f"{config.metric}, mean of {config.window} steps"), **PLAIN_TEXT)
    axes.set_title("mean over runs; band: standard error")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    for text in axes.legend(frameon=False).get_texts():
        text.set(**PLAIN_TEXT)
    save_figure(figure, config.output)


def print_table(groups: Mapping[str, Sequence[Curve]], config: CompareRunsConfig) -> None:
    """Each group's runs over the last steps: mean, standard error over runs, lowest and highest."""
    table = Table(title=f"{config.metric}, mean of the last {config.window} steps", title_justify="left")
    for column in ("", "runs", "mean", "±", "lowest", "highest"):
        table.add_column(column, justify="left" if not column else "right")
    for name, curves in groups.items():
        ends = [statistics.fmean(curve.y[-config.window :]) for curve in curves]
        error = f"{statistics.stdev(ends) / math.sqrt(len(ends)):.4f}" if len(ends) > 1 else ""
        table.add_row(
            Text(name), str(len(ends)), f"{statistics.fmean(ends):.4f}", error, f"{min(ends):.4f}", f"{max(ends):.4f}"
        )
    open_console().print(table)


def main(words: Sequence[str] | None = None) -> int:
    """The command line; 0, or 2 with one line on stderr."""

    def work(config: CompareRunsConfig) -> None:
        groups = {
            name: [Curve.read(run, config.metric, config.x) for run in runs] for name, runs in config.groups.items()
        }
        draw(groups, config)
        print_table(groups, config)
        print(config.output)

    return run_program("compare_runs", CompareRunsConfig, work, words)


if __name__ == "__main__":
    sys.exit(main())
