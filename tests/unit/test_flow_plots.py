"""What the figures of an entropy flow show: the numbers of the flow, read back from lines, bars and images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from megatron_bupo.analysis.flow_file import EntropyFlow, read_flow, write_flow
from megatron_bupo.analysis.flow_plots import draw_flows, flow_figures
from megatron_bupo.analysis.heatmap import token_heatmap, token_label
from megatron_bupo.analysis.plots import drawable
from tests.unit.flows import VOCAB_SIZE, synthetic_flow

pytestmark = pytest.mark.filterwarnings("error")  # matplotlib's about missing glyphs, for one

NAMES = ["entropy_flow", "entropy_change", "residual_cosine", "agreement"]
ODD_TOKENS = [
    "你好",
    " $",
    "$x_1^{2}$",
    "\n\n",
    "\t",
    "",
    "\u200d",
    "\ufffd",
    "😀",
    "\ud83d",
    "\u0301",
    "هنا",
    "\\frac{",
]


def figure_of(flows: Mapping[str, EntropyFlow], name: str) -> Figure:
    return next(figure for found, figure in flow_figures(flows) if found == name)


def panels(flow: EntropyFlow, name: str) -> list[Axes]:
    """The panels of one figure of one model, from top to bottom."""
    return figure_of({"model": flow}, name).axes


def drawn(axes: Axes, label: str) -> np.ndarray:
    """[N, 2]: x and y of the line with a label that begins so."""
    (line,) = [line for line in axes.lines if str(line.get_label()).startswith(label)]
    return line.get_xydata()


def spans(axes: Axes) -> dict[str, list[float]]:
    """First and last x of each shaded stage."""
    found = {}
    for patch in axes.patches:
        if patch.get_label() in ("exploration", "integration", "convergence"):
            xs = patch.get_patch_transform().transform(patch.get_path().vertices)[:, 0]
            found[patch.get_label()] = [xs.min(), xs.max()]
    return found


def numbers(flow: EntropyFlow, name: str, shift: float = 0.0) -> list[tuple[float, float]]:
    return [(layer["layer"] + shift, layer[name]) for layer in flow.layers]


@pytest.mark.parametrize("num_layers", [4, 80])
def test_entropy_flow_goes_through_all_points_in_order(num_layers: int) -> None:
    flow = synthetic_flow(num_layers, final_norm=True)
    (axes,) = panels(flow, "entropy_flow")
    start = (0.0, flow.embedding["resid"])
    attn, ffn, resid = (
        numbers(flow, name, shift) for name, shift in (("attn", -2 / 3), ("ffn", -1 / 3), ("resid", 0.0))
    )
    np.testing.assert_allclose(drawn(axes, "attention output"), attn)
    np.testing.assert_allclose(drawn(axes, "FFN output"), ffn)
    np.testing.assert_allclose(drawn(axes, "layer state"), [start, *resid])
    everything = sorted([start, *attn, *ffn, *resid])
    np.testing.assert_allclose(drawn(axes, "order of computation"), everything)
    np.testing.assert_allclose(drawn(axes, "embedding"), [start])
    np.testing.assert_allclose(drawn(axes, "$A_l$, final norm"), numbers(flow, "attn@norm", -2 / 3))
    np.testing.assert_allclose(drawn(axes, "$H_l$, final norm"), numbers(flow, "resid@norm"))
    assert set(drawn(axes, "full policy")[:, 1]) == {flow.final_entropy}
    assert drawn(axes, "uniform")[0, 1] == pytest.approx(math.log(VOCAB_SIZE))
    left, right = axes.get_xlim()
    assert left < 0 and right > num_layers  # embedding and last layer lie inside
    (line,) = [line for line in axes.lines if str(line.get_label()).startswith("layer state")]
    assert line.get_markevery() == math.ceil((num_layers + 1) / 40)


def test_bands_are_one_standard_error_wide() -> None:
    flow = synthetic_flow(5)
    band = panels(flow, "agreement")[0].collections[0].get_paths()[0].vertices
    for layer in flow.layers:
        ys = band[band[:, 0] == layer["layer"], 1]
        assert ys.max() - ys.min() == pytest.approx(2 * layer["se_kl_full"])


def test_entropy_change_has_a_bar_for_each_layer() -> None:
    flow = synthetic_flow(36)
    figure = panels(flow, "entropy_change")
    assert len(figure) == 3
    for axes, name, word in zip(figure, ("d_attn", "d_ffn", "d_layer"), ("attention", "FFN", "layer"), strict=True):
        bars, errors = axes.containers[1], axes.containers[0]
        assert [bar.get_height() for bar in bars] == flow.column(name)
        assert [bar.get_x() + bar.get_width() / 2 for bar in bars] == pytest.approx(range(1, 37))
        ends = [segment[:, 1] for segment in errors.lines[2][0].get_segments()]
        assert [(high - low) / 2 for low, high in ends] == pytest.approx(flow.column(f"se_{name}"))
        assert word in axes.get_ylabel() and "nats" in axes.get_ylabel()
        assert any(list(line.get_ydata()) == [0.0, 0.0] for line in axes.lines)


def test_cosines_norms_and_agreement() -> None:
    flow = synthetic_flow(36)
    cosines, norms = panels(flow, "residual_cosine")
    np.testing.assert_allclose(drawn(cosines, "attention output"), numbers(flow, "cos_attn"))
    np.testing.assert_allclose(drawn(cosines, "FFN output"), numbers(flow, "cos_ffn"))
    assert any(list(line.get_ydata()) == [0.0, 0.0] for line in cosines.lines)
    start = (0.0, flow.embedding["resid_norm"])
    np.testing.assert_allclose(drawn(norms, "layer state"), [start, *numbers(flow, "resid_norm")])
    assert norms.get_yscale() == "log"
    kl, top1 = panels(flow, "agreement")
    np.testing.assert_allclose(drawn(kl, "layer state"), numbers(flow, "kl_full"))
    np.testing.assert_allclose(drawn(top1, "layer state"), numbers(flow, "top1_full"))


@pytest.mark.parametrize(("values", "scale"), [([3.0, 2.0], "linear"), ([9.0, 0.1], "log"), ([9.0, 0.0], "symlog")])
def test_the_kl_axis_fits_the_numbers(values: list[float], scale: str) -> None:
    flow = synthetic_flow(2)
    layers = [layer | {"kl_full": value} for layer, value in zip(flow.layers, values, strict=True)]
    assert panels(replace(flow, layers=layers), "agreement")[0].get_yscale() == scale


def test_stages_are_shaded_and_the_suggested_layer_marked() -> None:
    figures = dict(flow_figures({"model": synthetic_flow(36)}))
    assert list(figures) == NAMES
    for name, figure in figures.items():
        # In the flow a layer has its points at l - 2/3, l - 1/3 and l, elsewhere one at l.
        shift = -1 / 3 if name == "entropy_flow" else 0.0
        expected = {"exploration": (0.5, 6.5), "integration": (6.5, 26.5), "convergence": (26.5, 36.5)}
        for axes in figure.axes:
            assert {stage: pytest.approx([x + shift for x in ends]) for stage, ends in expected.items()} == spans(axes)
            assert drawn(axes, "suggested layer")[:, 0].tolist() == [6, 6]
        assert [text.get_text() for text in figure.legends[0].get_texts()][:3] == list(expected)
        assert figure.axes[0].get_title() == "model\nstages 1–6 / 7–26 / 27–36, suggested layer 6"


def test_an_empty_stage_and_no_suggestion() -> None:
    (axes,) = panels(replace(synthetic_flow(28, abrupt=True), suggested_layer=None), "entropy_flow")
    assert set(spans(axes)) == {"integration", "convergence"}
    assert not any(line.get_label() == "suggested layer" for line in axes.lines)
    assert axes.get_title() == "model\nstages none / 1–27 / 28, no suggested layer"


def test_models_side_by_side_share_the_y_axis_only() -> None:
    flows = {"a": synthetic_flow(36), "b": synthetic_flow(80, abrupt=True), "c": synthetic_flow(4)}
    figure = figure_of(flows, "entropy_change")
    assert len(figure.axes) == 9
    columns = [figure.axes[start : start + 3] for start in (0, 3, 6)]
    for column, (label, flow) in zip(columns, flows.items(), strict=True):
        assert column[0].get_title().startswith(f"{label}\n")
        assert [bar.get_height() for bar in column[1].containers[1]] == flow.column("d_ffn")
        assert len({axes.get_xlim() for axes in column}) == 1
    assert len({axes.get_ylim() for axes in figure.axes[1::3]}) == 1
    assert len({column[0].get_xlim() for column in columns}) == 3
    cells = [(axes.get_subplotspec().rowspan.start, axes.get_subplotspec().colspan.start) for axes in figure.axes]
    assert cells == [(row, column) for column in range(3) for row in range(3)]


def test_more_than_six_models_wrap() -> None:
    flows = {f"step {number}": synthetic_flow(2) for number in range(7)}
    axes = figure_of(flows, "entropy_flow").axes
    cells = [(one.get_subplotspec().rowspan.start, one.get_subplotspec().colspan.start) for one in axes]
    assert cells == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2)]


@pytest.mark.parametrize("sizes", [(80,), (36, 80, 4)])
def test_text_is_readable_and_apart(sizes: tuple[int, ...]) -> None:
    flows = {f"{size} layers of $some_model$ at {'a/long/path/' * 7}": synthetic_flow(size) for size in sizes}
    figure = figure_of(flows, "entropy_flow")
    figure.canvas.draw()
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
    assert min(text.get_fontsize() for text in texts) >= 7
    assert not any(axes.title.get_parse_math() for axes in figure.axes)
    boxes = [figure.legends[0].get_window_extent(), *(axes.title.get_window_extent() for axes in figure.axes)]
    boxes += [*(axes.get_window_extent() for axes in figure.axes)]
    for axes in figure.axes:
        left, right = axes.get_xlim()
        ticks = [text for text in axes.get_xticklabels() if left <= text.get_position()[0] <= right]
        boxes += [text.get_window_extent() for text in ticks]
    for one, other in combinations(boxes, 2):
        assert not one.overlaps(other)
    whole = figure.bbox
    assert all(box.x0 >= 0 and box.x1 <= whole.x1 and box.y0 >= 0 and box.y1 <= whole.y1 for box in boxes)


def test_both_formats_are_written_from_the_json_alone(tmp_path: Path) -> None:
    flow = synthetic_flow(3, tokens=["a", "b"])
    path = write_flow(tmp_path / "measured", flow)
    assert read_flow(path) == flow
    written = draw_flows({"model": read_flow(path)}, tmp_path / "figures")
    expected = [f"{name}.{suffix}" for name in [*NAMES, "token_heatmap"] for suffix in ("png", "pdf")]
    assert [file.name for file in written] == expected
    assert sorted(file.name for file in (tmp_path / "figures").iterdir()) == sorted(expected)
    for file in written:
        assert file.read_bytes().startswith(b"\x89PNG" if file.suffix == ".png" else b"%PDF")
        assert file.stat().st_size > 5000


def test_heatmaps_of_several_models_are_numbered() -> None:
    flows = {"a": synthetic_flow(2, tokens=["x"]), "b": synthetic_flow(2), "c": synthetic_flow(2, tokens=["y"])}
    assert [name for name, _ in flow_figures(flows)] == [*NAMES, "token_heatmap_1", "token_heatmap_3"]


def heatmap_of(num_layers: int, tokens: list[str]) -> tuple[EntropyFlow, Figure]:
    flow = synthetic_flow(num_layers, tokens=tokens)
    assert flow.heatmap is not None
    return flow, token_heatmap("$a_model$ 你", flow.heatmap)


def test_heatmap_wraps_and_shows_the_entropies() -> None:
    flow, figure = heatmap_of(5, [f"t{place}" for place in range(90)])
    assert flow.heatmap is not None
    grid = [axes for axes in figure.axes if axes.images]
    assert len(grid) == 3
    for panel, axes in enumerate(grid):
        start, end = 30 * panel, 30 * (panel + 1)
        layers, full = axes.images
        np.testing.assert_allclose(layers.get_array(), [values[start:end] for values in flow.heatmap.resid])
        np.testing.assert_allclose(full.get_array(), [flow.heatmap.full[start:end]])
        assert layers.origin == "lower" and list(layers.get_extent()) == [start - 0.5, end - 0.5, 0.5, 5.5]
        assert full.get_extent()[2] > 5.5
        assert axes.get_ylim() == (0.5, full.get_extent()[3])
        assert layers.get_clim() == full.get_clim() == (0.0, max(map(max, flow.heatmap.resid)))
        assert [text.get_text() for text in axes.get_xticklabels()] == flow.heatmap.tokens[start:end]
        assert [text.get_text() for text in axes.get_yticklabels()] == ["1", "2", "3", "4", "5", "full"]
    assert figure.axes[-1].get_ylabel() == "entropy (nats)"
    assert figure.get_suptitle() == "$a_model$ \\u4f60\nresponse 1"


def test_a_long_response_says_what_is_shown() -> None:
    _, figure = heatmap_of(80, ["x"] * 200)
    grid = [axes for axes in figure.axes if axes.images]
    assert [axes.images[0].get_array().shape for axes in grid] == [(80, 40)] * 4
    assert figure.get_suptitle().endswith("response 1 (first 160 of 200 tokens)")


def test_any_token_can_be_drawn() -> None:
    _, figure = heatmap_of(2, ODD_TOKENS)
    figure.canvas.draw()
    labels = [text for text in figure.axes[0].get_xticklabels() if text.get_text()]
    shown = ["\\u4f60\\u597d", "␣$", "$x_1^{2}$", "\\n\\n", "\\t", "\\u200d", "\ufffd", "😀", "\\ud83d"]
    assert [text.get_text() for text in labels][: len(shown)] == shown
    assert not any(text.get_parse_math() for text in labels)


def test_labels_of_tokens() -> None:
    assert token_label("  if") == "␣␣if"
    assert token_label("12345678901234") == "12345678901234"
    assert token_label("123456789012345") == "1234567890123…"
    assert token_label("你好你好") == "\\u4f60\\u597d…"
    assert drawable("a b π\n\u3000") == "a b π\\n\\u3000"
