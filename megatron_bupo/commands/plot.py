"""`plot`: draws the figures of entropy flows and of rewards again, from the stored numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from megatron_bupo.analysis.flow_file import FILE_NAME, read_flow
from megatron_bupo.analysis.flow_plots import draw_flows
from megatron_bupo.analysis.plots import FORMATS, reward_curves
from megatron_bupo.config.commands import PlotConfig
from megatron_bupo.errors import UsageError


def run(config: PlotConfig) -> None:
    """Draw the inputs of --flow and --runs into the folder --output, and print the names of the files.

    Raises:
        UsageError: an input that cannot be read, one that is given twice, or two inputs with the same label.
    """
    flow_paths, runs = config.flow or [], config.runs or []
    flows = [read_flow(path) for path in flow_paths]
    folder, written = Path(config.output), []
    if flows:
        given = None if config.labels is None else config.labels[: len(flows)]
        labels = given or _labels([flow.model for flow in flows], flow_paths)
        _check_unlike(labels, flow_paths)
        written += draw_flows(dict(zip(labels, flows, strict=True)), folder)
    if runs:
        given = None if config.labels is None else config.labels[len(flows) :]
        labels = given or _labels([Path(run).resolve().name for run in runs], runs)
        _check_unlike(labels, runs)
        for suffix in FORMATS:
            written.append(folder / f"rewards.{suffix}")
            reward_curves(dict(zip(labels, runs, strict=True)), written[-1])
    for path in written:
        print(path)


def _labels(names: Sequence[str], paths: Sequence[str]) -> list[str]:
    """The names; where several inputs have the same one, each with its path."""
    counts = Counter(names)
    places = (Path(path).parent if Path(path).name == FILE_NAME else path for path in paths)
    return [name if counts[name] == 1 else f"{name} ({place})" for name, place in zip(names, places, strict=True)]


def _check_unlike(labels: Sequence[str], paths: Sequence[str]) -> None:
    for number, label in enumerate(labels):
        first = labels.index(label)
        if first < number:
            raise UsageError(
                f"{paths[first]} and {paths[number]} would both be called {label!r}; give each input once, and "
                "--labels that differ"
            )
