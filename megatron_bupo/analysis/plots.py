"""Figures from the numbers that runs leave behind; no model is needed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

# Okabe and Ito's palette: told apart with any kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """The lines of RUN/metrics.jsonl, one dict a step."""
    with (Path(run) / "metrics.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def moving_average(values: list[float], window: int) -> list[float]:
    """Mean of each value and up to window - 1 values before it.

    >>> moving_average([1.0, 2.0, 6.0], 2)
    [1.0, 1.5, 4.0]
    """
    starts = (max(0, end - window) for end in range(1, len(values) + 1))
    return [sum(values[start:end]) / (end - start) for end, start in enumerate(starts, start=1)]


def reward_curves(runs: Mapping[str, str | Path], output: str | Path, window: int = 5) -> None:
    """Mean reward by step for several runs: the steps as dots, their moving average as a line.

    Internal phases are shaded and named. Written beside and renamed, in the format that the name of `output` ends in.
    """
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.0, 4.0), layout="constrained")
    for (name, run), colour in zip(runs.items(), COLOURS, strict=False):
        metrics = read_metrics(run)
        steps = [step["step"] for step in metrics]
        rewards = [step["reward_mean"] for step in metrics]
        axes.plot(steps, rewards, "o", color=colour, markersize=3, alpha=0.35)
        axes.plot(steps, moving_average(rewards, window), color=colour, linewidth=2, label=name)
        for phase, members in groupby(metrics, key=lambda step: step["phase"]):
            if phase == "full":
                continue
            first, *rest = (step["step"] for step in members)
            last = rest[-1] if rest else first
            axes.axvspan(first - 0.5, last + 0.5, color=colour, alpha=0.10, linewidth=0)
            middle = (first + last) / 2
            place = axes.get_xaxis_transform()
            axes.text(
                middle, 0.97, f"{name}: {phase}", transform=place, ha="center", va="top", fontsize=8, color=colour
            )
    axes.set(xlabel="step", ylabel="mean reward", title=f"Reward by step (line: mean of the last {window} steps)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    beside = output.with_name(f".{output.name}.part")
    figure.savefig(beside, dpi=150, format=output.suffix.lstrip("."))
    pyplot.close(figure)
    os.replace(beside, output)
