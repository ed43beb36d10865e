"""The entropy flow as figures, of one model or of several side by side. All that they show is in EntropyFlow.

    draw_flows({"Qwen3-4B": flow}, "figures")           png and pdf files
    for name, figure in flow_figures({"now": flow}):    the same figures, for TensorBoard

A model has a column; its panels share the x axis, and each row of panels the y axis.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_bupo.analysis.flow_file import STAGES, EntropyFlow, span_text
from megatron_bupo.analysis.heatmap import token_heatmap
from megatron_bupo.analysis.plots import COLOURS, FORMATS, PLAIN_TEXT, drawable, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_COLUMNS = 6
SMALL, MEDIUM = 8.0, 8.5  # points
# Lighter than any line, and of three lightnesses: exploration, integration, convergence.
_SHADES = ("#C5DDF0", "#F5F5F5", "#FBE6D0")
_MAX_MARKERS = 40  # on one line: with more layers only every second or third has one


class _Series(NamedTuple):
    """A quantity that is one colour and one marker in all figures. `place`: x of layer l's point is l + place."""

    name: str
    words: str
    symbol: str
    colour: str
    marker: str
    place: float


_SERIES = (
    _Series("attn", "attention output", "$A_l$", COLOURS[0], "^", -2 / 3),
    _Series("ffn", "FFN output", "$F_l$", COLOURS[1], "s", -1 / 3),
    _Series("resid", "layer state", "$H_l$", COLOURS[2], "o", 0.0),
)


def draw_flows(flows: Mapping[str, EntropyFlow], folder: str | Path) -> list[Path]:
    """Save every figure as png and pdf; `flows` by the names that they have in the figures.

    Returns:
        The files written, FOLDER/entropy_flow.png and so on.
    """
    written = []
    for name, figure in flow_figures(flows):
        for suffix in FORMATS:
            path = Path(folder) / f"{name}.{suffix}"
            save_figure(figure, path)
            written.append(path)
    return written


def flow_figures(flows: Mapping[str, EntropyFlow]) -> Iterator[tuple[str, Figure]]:
    """Names and figures, one at a time: each may be closed before the next is made.

    Heatmaps, where a flow has one, are a figure each: token_heatmap, or token_heatmap_1, ... by the place in `flows`.
    """
    assert flows, "nothing to draw"
    yield "entropy_flow", _entropy_flow(flows)
    yield "entropy_change", _entropy_change(flows)
    yield "residual_cosine", _residual_cosine(flows)
    yield "agreement", _agreement(flows)
    for number, (label, flow) in enumerate(flows.items(), start=1):
        if flow.heatmap is not None:
            name = "token_heatmap" if len(flows) == 1 else f"token_heatmap_{number}"
            yield name, token_heatmap(label, flow.heatmap)


def _entropy_flow(flows: Mapping[str, EntropyFlow]) -> Figure:
    """The entropies in order of computation: H_0, A_1, F_1, H_1, A_2, ... with the full policy's as the goal."""
    figure, columns = _grid(flows, ["entropy (nats)"], [3.4])
    for flow, (axes,) in zip(flows.values(), columns, strict=True):
        _mark_stages(axes, flow, shift=-1 / 3)  # the middle of a layer's three points
        points = [(0.0, flow.embedding["resid"])]
        points += [(layer["layer"] + one.place, layer[one.name]) for layer in flow.layers for one in _SERIES]
        grey = "0.65" if len(flow.layers) <= 20 else "0.82"  # many lines would hide what they join
        axes.plot(*zip(*points, strict=True), color=grey, linewidth=0.5, zorder=1.5, label="order of computation")
        embedding = flow.embedding["resid"], flow.embedding["se_resid"]
        for one in _SERIES:
            _draw(axes, flow, one.name, one, below=embedding if one.name == "resid" else None)
            if f"{one.name}@norm" in flow.layers[0]:
                xs = [layer["layer"] + one.place for layer in flow.layers]
                look: dict[str, Any] = {"color": one.colour, "linewidth": 0.8, "linestyle": (0, (4, 2))}
                axes.plot(xs, flow.column(f"{one.name}@norm"), label=f"{one.symbol}, final norm", **look)
        axes.plot(0.0, embedding[0], "D", color="black", markersize=4.5, zorder=4, label="embedding $H_0$")
        final, error = flow.final_entropy, flow.se_final_entropy
        axes.axhspan(final - error, final + error, color="black", alpha=0.15, linewidth=0)
        axes.axhline(final, color="black", linewidth=1.0, linestyle="--", label="full policy")
        axes.axhline(math.log(flow.vocab_size), color="black", linewidth=1.0, linestyle=":", label="uniform, log V")
        axes.set_ylim(bottom=0.0)
        axes.set_xlabel("layer (attention and FFN of a layer are left of it)", fontsize=MEDIUM)
    return _finish(figure, columns)


def _entropy_change(flows: Mapping[str, EntropyFlow]) -> Figure:
    """What each module, and each layer as a whole, does to the entropy."""
    names = ("d_attn", "d_ffn", "d_layer")
    titles = [rf"$\Delta H$ {word} (nats)" for word in ("attention", "FFN", "layer")]
    figure, columns = _grid(flows, titles, [1.5, 1.5, 1.5])
    for flow, column in zip(flows.values(), columns, strict=True):
        for axes, name, one in zip(column, names, _SERIES, strict=True):
            _mark_stages(axes, flow)
            look: dict[str, Any] = {
                "width": 0.75,
                "color": one.colour,
                "error_kw": {"elinewidth": 0.7, "ecolor": "0.2"},
            }
            axes.bar(flow.column("layer"), flow.column(name), yerr=flow.column(f"se_{name}"), **look)
            axes.axhline(0.0, color="black", linewidth=0.8)
    return _finish(figure, columns)


def _residual_cosine(flows: Mapping[str, EntropyFlow]) -> Figure:
    """What the modules write against what is there: above 0 amplifies, near 0 is new, below 0 suppresses."""
    figure, columns = _grid(flows, ["cosine with the residual stream", "norm of the layer state"], [2.6, 1.6])
    for flow, (cosines, norms) in zip(flows.values(), columns, strict=True):
        for axes in (cosines, norms):
            _mark_stages(axes, flow)
        cosines.axhline(0.0, color="black", linewidth=0.8)
        for one in _SERIES[:2]:
            _draw(cosines, flow, f"cos_{one.name}", one._replace(place=0.0))
        _draw(norms, flow, "resid_norm", _SERIES[2], (flow.embedding["resid_norm"], flow.embedding["se_resid_norm"]))
        norms.set_yscale("log")
    return _finish(figure, columns)


def _agreement(flows: Mapping[str, EntropyFlow]) -> Figure:
    """How far each layer's policy is from the full one."""
    titles = ["KL(full || layer) (nats)", "top-1 agreement"]
    figure, columns = _grid(flows, titles, [2.1, 2.1])
    scale = _scale([value for flow in flows.values() for value in flow.column("kl_full")])
    for flow, column in zip(flows.values(), columns, strict=True):
        for axes, name in zip(column, ("kl_full", "top1_full"), strict=True):
            _mark_stages(axes, flow)
            _draw(axes, flow, name, _SERIES[2])
        column[0].set_yscale(scale)
        column[1].set_ylim(-0.03, 1.03)
    return _finish(figure, columns)


def _scale(values: Sequence[float]) -> str:
    """Logarithmic for what spans decades; symlog where some of it is 0, or below by rounding."""
    if max(values) <= 30 * min(values) or max(values) <= 0:
        return "linear"
    return "log" if min(values) > 0 else "symlog"


def _grid(
    flows: Mapping[str, EntropyFlow], titles: Sequence[str], heights: Sequence[float]
) -> tuple[Figure, list[list[Axes]]]:
    """The empty panels of each model from top to bottom, at most 6 models in a row; heights in inches."""
    from matplotlib.ticker import MaxNLocator

    num_rows = math.ceil(len(flows) / MAX_COLUMNS)
    num_columns = math.ceil(len(flows) / num_rows)
    width = max(6.5, 3.2 * num_columns)
    figure = new_figure(width, num_rows * (sum(heights) + 0.6) + 0.6)
    grid = figure.add_gridspec(num_rows * len(heights), num_columns, height_ratios=list(heights) * num_rows)
    columns: list[list[Axes]] = []
    for index, (label, flow) in enumerate(flows.items()):
        row, column = divmod(index, num_columns)
        panels: list[Axes] = []
        for number, title in enumerate(titles):
            shared: dict[str, Any] = {
                "sharex": panels[0] if panels else None,
                "sharey": columns[0][number] if columns else None,
            }
            axes = figure.add_subplot(grid[row * len(heights) + number, column], **shared)
            axes.tick_params(labelsize=SMALL, labelbottom=number == len(titles) - 1, labelleft=column == 0)
            if column == 0:
                axes.set_ylabel(title, fontsize=MEDIUM)
            axes.grid(axis="y", color="0.85", linewidth=0.5)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            panels.append(axes)
        panels[0].set_title(_title(label, flow, int(12 * width / num_columns)), fontsize=MEDIUM, **PLAIN_TEXT)
        panels[0].set_xlim(-0.03 * len(flow.layers), 1.02 * len(flow.layers) + 0.5)
        panels[0].xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
        panels[-1].set_xlabel("layer", fontsize=MEDIUM)
        columns.append(panels)
    return figure, columns


def _title(label: str, flow: EntropyFlow, width: int) -> str:
    """The name in lines of at most `width` characters, and where the stages are."""
    words = [span_text(flow.stages[stage]).replace("-", "–") for stage in STAGES]
    suggested = "no suggested layer" if flow.suggested_layer is None else f"suggested layer {flow.suggested_layer}"
    return "\n".join([*wrap(drawable(label), width), f"stages {' / '.join(words)}, {suggested}"])


def _mark_stages(axes: Axes, flow: EntropyFlow, shift: float = 0.0) -> None:
    """Shade the stages and mark the suggested layer; `shift` moves the shades along x."""
    for stage, shade in zip(STAGES, _SHADES, strict=True):
        span = flow.stages[stage]
        if span is not None:
            axes.axvspan(span[0] - 0.5 + shift, span[1] + 0.5 + shift, color=shade, linewidth=0, zorder=0, label=stage)
    if flow.suggested_layer is not None:
        look: dict[str, Any] = {"color": COLOURS[3], "linewidth": 1.2, "linestyle": "-.", "label": "suggested layer"}
        axes.axvline(flow.suggested_layer, zorder=1.2, **look)  # above bars, below lines


def _draw(axes: Axes, flow: EntropyFlow, name: str, one: _Series, below: tuple[float, float] | None = None) -> None:
    """A line with a band of one standard error; `below`: mean and standard error of the embedding, at x = 0."""
    xs, values, errors = ([0.0], [below[0]], [below[1]]) if below else ([], [], [])
    xs += [layer["layer"] + one.place for layer in flow.layers]
    values += flow.column(name)
    errors += flow.column(f"se_{name}")
    every = math.ceil(len(xs) / _MAX_MARKERS)
    look: dict[str, Any] = {"color": one.colour, "linewidth": 1.2, "marker": one.marker, "markersize": 3.5}
    axes.plot(xs, values, markevery=every, label=f"{one.words} {one.symbol}", **look)
    low, high = zip(*((value - error, value + error) for value, error in zip(values, errors, strict=True)), strict=True)
    axes.fill_between(xs, low, high, color=one.colour, alpha=0.25, linewidth=0, label="± 1 standard error")


def _finish(figure: Figure, columns: list[list[Axes]]) -> Figure:
    """One legend for all panels, below them."""
    entries: dict[str, Any] = {}
    for axes in (axes for column in columns for axes in column):
        handles, labels = axes.get_legend_handles_labels()
        entries |= {label: handle for label, handle in zip(labels, handles, strict=True) if label not in entries}
    figure.align_ylabels()
    num_rows = math.ceil(len(entries) / int(figure.get_figwidth() / 1.6))
    look: dict[str, Any] = {"ncols": math.ceil(len(entries) / num_rows), "frameon": False, "fontsize": SMALL}
    names = sorted(entries, key=lambda name: STAGES.index(name) if name in STAGES else len(STAGES))
    figure.legend([entries[name] for name in names], names, loc="outside lower center", **look)
    return figure
