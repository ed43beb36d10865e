"""`select-layer`: the suggested internal layer of a measured entropy flow, with its reasons."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_bupo.analysis.flow_file import EntropyFlow, read_flow, span_text
from megatron_bupo.analysis.stages import Selection, select_layer
from megatron_bupo.config.commands import SelectLayerConfig


def run(config: SelectLayerConfig) -> None:
    """Print the suggested layer, or that none is suggested, with the evidence."""
    flow = read_flow(config.flow)
    selection = select_layer(flow.column("d_ffn"), flow.column("resid"), flow.final_entropy)
    print("\n".join(_report(flow, selection)))


def _report(flow: EntropyFlow, selection: Selection) -> Iterator[str]:
    """The lines to print."""
    evidence, suggested = selection.evidence, selection.suggested_layer
    yield f"{flow.model}: {len(flow.layers)} layers, {flow.num_tokens} tokens of {flow.num_responses} responses"
    if suggested is None:
        yield "suggested layer: none"
    else:
        yield f"suggested layer: {suggested}, to train it: --internal-layer {suggested}"
    if (flow.stages, flow.suggested_layer) != (selection.stages, suggested):
        yield f"(the file says {flow.suggested_layer or 'none'}: it is of another version, or was edited)"
    yield ""
    yield from evidence["reasons"]
    yield f"stages {_stability(flow, selection)}"
    yield ""
    yield f"{'stage':<12}  {'layers':>7}  {'mean d_ffn':>10}      squared error {evidence['squared_error']:.4g}"
    for stage, span in selection.stages.items():
        mean = "" if span is None else f"{evidence['mean_d_ffn'][stage]:+.3f}"
        yield f"{stage:<12}  {span_text(span):>7}  {mean:>10}".rstrip()
    yield ""
    yield from _table(flow, selection)


def _table(flow: EntropyFlow, selection: Selection) -> Iterator[str]:
    """One line a layer: what the choice was made from."""
    marks = {layer: stage for stage, span in selection.stages.items() if span for layer in range(span[0], span[1] + 1)}
    yield f"{'layer':>5}  {'resid':>8}  {'d_ffn':>8}  {'se':>7}  stage"
    for numbers in flow.layers:
        layer = int(numbers["layer"])
        chosen = "  <- suggested" if layer == selection.suggested_layer else ""
        values = f"{numbers['resid']:>8.3f}  {numbers['d_ffn']:>+8.3f}  {numbers['se_d_ffn']:>7.4f}"
        yield f"{layer:>5}  {values}  {marks[layer]}{chosen}"
    yield f" full  {flow.final_entropy:>8.3f}"


def _stability(flow: EntropyFlow, selection: Selection) -> str:
    """What the bootstrap said when the flow was measured: the file has no numbers of single responses to repeat it."""
    judged = flow.stages == selection.stages and "stability" in flow.selection
    return str((flow.selection if judged else selection.evidence)["stability"])
