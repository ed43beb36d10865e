"""The entropy of every layer's policy along the tokens of one response, as a figure."""

from __future__ import annotations

import math
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from megatron_bupo.analysis.flow_file import Heatmap
from megatron_bupo.analysis.plots import PLAIN_TEXT, drawable, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

TOKENS_PER_PANEL = 40
MAX_LABEL_CHARS = 14
_MARKS = {" ": "␣", "\n": "\\n", "\t": "\\t", "\r": "\\r"}


def token_heatmap(label: str, heatmap: Heatmap) -> Figure:
    """Layers by tokens, layer 1 at the bottom, the full policy in a separate row at the top; colour is the entropy.

    Each panel shows 40 tokens; longer responses continue in further panels.
    """
    num_drawn = len(heatmap.tokens)
    num_panels = math.ceil(num_drawn / TOKENS_PER_PANEL)
    per_panel = math.ceil(num_drawn / num_panels)
    num_layers = len(heatmap.resid)
    panel_height = min(2.4, max(0.9, 0.045 * num_layers)) + 1.0
    width = max(4.0, 1.4 + 0.15 * per_panel)
    figure = new_figure(width, 0.5 + num_panels * panel_height)
    grid = figure.subplots(num_panels, squeeze=False)[:, 0]
    largest = max(max(values) for values in (*heatmap.resid, heatmap.full))
    for panel, axes in enumerate(grid):
        image = _draw_panel(axes, heatmap, panel * per_panel, min((panel + 1) * per_panel, num_drawn), largest)
        axes.set_xlim(panel * per_panel - 0.5, (panel + 1) * per_panel - 0.5)  # the last panel's cells are as wide
    bar = figure.colorbar(image, ax=list(grid), aspect=15 * num_panels, pad=0.015)
    bar.set_label("entropy (nats)", fontsize=8.5)
    bar.ax.tick_params(labelsize=8)
    part = "" if num_drawn == heatmap.num_tokens else f" (first {num_drawn} of {heatmap.num_tokens} tokens)"
    title = [*wrap(drawable(label), int(12 * width)), f"response {heatmap.response}{part}"]
    figure.suptitle("\n".join(title), fontsize=9, **PLAIN_TEXT)
    return figure


def token_label(token: str) -> str:
    r"""A token as a tick label: whitespace and what the font lacks made visible, a long one cut.

    >>> token_label(" so\n")
    '␣so\\n'
    """
    label = ""
    for number, char in enumerate(token):
        mark = _MARKS.get(char) or drawable(char)
        if len(label) + len(mark) > MAX_LABEL_CHARS - (number < len(token) - 1):
            return f"{label}…"
        label += mark
    return label


def _draw_panel(axes: Axes, heatmap: Heatmap, start: int, end: int, largest: float) -> AxesImage:
    """The tokens [start, end) of the response."""
    num_layers = len(heatmap.resid)
    # The full policy's row: high enough to be seen at 80 layers, with a gap below as it is not one more layer.
    gap, high = max(0.4, 0.02 * num_layers), max(1.0, 0.06 * num_layers)
    bottom = num_layers + 0.5 + gap
    look: dict[str, Any] = {
        "origin": "lower",
        "aspect": "auto",
        "interpolation": "nearest",
        "cmap": "viridis",
        "vmin": 0.0,
    }
    for rows, low, top in (
        ([values[start:end] for values in heatmap.resid], 0.5, num_layers + 0.5),
        ([heatmap.full[start:end]], bottom, bottom + high),
    ):
        extent = (start - 0.5, end - 0.5, low, top)
        image = axes.imshow(rows, extent=extent, vmax=largest or 1.0, **look)
    axes.set_ylim(0.5, bottom + high)
    step = next(step for step in (1, 2, 5, 10, 20, 50) if num_layers <= 6 * step or step == 50)
    layers = [1, *range(step, num_layers + 1, step)] if step > 1 else list(range(1, num_layers + 1))
    axes.set_yticks([*layers, bottom + high / 2], [*map(str, layers), "full"], fontsize=8)
    axes.set_ylabel("layer", fontsize=8.5)
    labels = [token_label(token) for token in heatmap.tokens[start:end]]
    axes.set_xticks(range(start, end), labels, rotation=90, fontsize=7, **PLAIN_TEXT)
    axes.tick_params(length=2)
    axes.spines[:].set_visible(False)
    return image
