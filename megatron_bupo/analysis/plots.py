"""Figures of training runs from their metrics, and what all figures share: colours, text, saving."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from itertools import cycle, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_bupo.errors import UsageError
from megatron_bupo.files import new_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart with any kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
FONT = "DejaVu Sans"  # comes with matplotlib
# For text that users give: a $ is printed as $, in the font whose characters `drawable` checks.
PLAIN_TEXT: dict[str, Any] = {"parse_math": False, "fontfamily": FONT}
FORMATS = ("png", "pdf")
_ROW = 0.05  # of the height of the reward curves: a row of names
_METRIC_KEYS = ("step", "phase", "reward_mean")


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches. It is not registered with pyplot, so it is freed with its last reference."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | Path) -> None:
    """Written beside and renamed, in the format that the name of `path` ends in; its folder is made if need be."""
    import matplotlib

    # Fonts that publishers take: matplotlib's default for pdf is a kind that they refuse.
    with new_file(path) as beside, matplotlib.rc_context({"pdf.fonttype": 42}):
        figure.savefig(beside, dpi=200, format=Path(path).suffix.lstrip("."))


def drawable(text: str) -> str:
    r"""The text with an escape for each character that the font lacks or that shows nothing.

    >>> drawable("π 你\n")
    'π \\u4f60\\n'
    """
    known = _characters()
    escaped = (char.encode("unicode_escape").decode("ascii") for char in text)
    return "".join(
        char if char.isprintable() and ord(char) in known else escape
        for char, escape in zip(text, escaped, strict=True)
    )


@cache
def _characters() -> frozenset[int]:
    """The code points that FONT has."""
    from matplotlib.font_manager import findfont, get_font

    return frozenset(get_font(findfont(FONT)).get_charmap())


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """The steps in RUN/metrics.jsonl, one dict a step, without the evaluation before the first one.

    Raises:
        UsageError: it cannot be read, is empty, or has a line that no training step wrote.
    """
    path = Path(run) / "metrics.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; give the --save folder of a training run") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text; give the --save folder of a training run") from error
    parsed = [_parse_step(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]
    steps = [step for step in parsed if step is not None]
    if not steps:
        raise UsageError(f"{path}: is empty; wait for the first step of the run")
    return steps


def _parse_step(line: str, where: str) -> dict[str, Any] | None:
    try:
        step = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{where}: not JSON; each line is one step that training wrote") from error
    if isinstance(step, dict) and step.get("step") == 0:
        return None
    if not isinstance(step, dict) or (missing := [key for key in _METRIC_KEYS if key not in step]):
        lacking = "an object" if not isinstance(step, dict) else " and ".join(missing)
        raise UsageError(f"{where}: lacks {lacking}; each line is one step that training wrote")
    for key in ("step", "reward_mean"):
        if not isinstance(step[key], int | float):
            raise UsageError(f"{where}: {key} is {step[key]!r}, not a number; each line is one step of a training")
    return step


def moving_average(values: list[float], window: int) -> list[float]:
    """Mean of each value and up to window - 1 values before it.

    >>> moving_average([1.0, 2.0, 6.0], 2)
    [1.0, 1.5, 4.0]
    """
    starts = (max(0, end - window) for end in range(1, len(values) + 1))
    return [sum(values[start:end]) / (end - start) for end, start in enumerate(starts, start=1)]


def reward_curves(runs: Mapping[str, str | Path], output: str | Path, window: int = 5) -> None:
    """Mean reward by step for several runs, saved: the steps as dots, their moving average as a line.

    Internal phases are shaded; a row for each run that has some names them, above the curves.

    Raises:
        UsageError: metrics of a run that cannot be read.
    """
    from matplotlib.ticker import MaxNLocator

    all_metrics = {name: read_metrics(run) for name, run in runs.items()}
    figure = new_figure(7.0, 4.0)
    axes = figure.subplots()
    styles = cycle((colour, style) for style in ("-", "--", ":") for colour in COLOURS)
    rows = 0
    for (name, metrics), (colour, style) in zip(all_metrics.items(), styles, strict=False):
        steps = [step["step"] for step in metrics]
        rewards = [step["reward_mean"] for step in metrics]
        axes.plot(steps, rewards, "o", color=colour, markersize=3, alpha=0.35)
        average = moving_average(rewards, window)
        axes.plot(steps, average, color=colour, linestyle=style, linewidth=2, label=drawable(name))
        phases = _internal_phases(metrics)
        for _, first, last in phases:
            axes.axvspan(first - 0.5, last + 0.5, color=colour, alpha=0.10, linewidth=0)
        if phases:
            words = drawable(f"{name}: {', '.join(phase for phase, _, _ in phases)}")
            look: dict[str, Any] = {"va": "top", "fontsize": 8, "color": colour, **PLAIN_TEXT}
            axes.text(phases[0][1] - 0.4, 0.98 - _ROW * rows, words, transform=axes.get_xaxis_transform(), **look)
            rows += 1
    low, high = axes.get_ylim()
    axes.set_ylim(low, low + (high - low) / (1 - _ROW * rows))
    axes.set(xlabel="step", ylabel="mean reward", title=f"Reward by step (line: mean of the last {window} steps)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    for text in figure.legend(frameon=False, loc="outside lower center", ncols=4).get_texts():
        text.set(**PLAIN_TEXT)
    save_figure(figure, output)


def _internal_phases(metrics: Iterable[dict[str, Any]]) -> list[tuple[str, int, int]]:
    """(phase, first step, last step) of each phase that trained an internal policy."""
    phases = []
    for phase, members in groupby(metrics, key=lambda step: step["phase"]):
        if phase != "full":
            steps = [step["step"] for step in members]
            phases.append((phase, steps[0], steps[-1]))
    return phases
