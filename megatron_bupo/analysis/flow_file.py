"""The entropy flow of a model as numbers: what entropy_flow.json holds. Reads and writes without torch.

The names of a layer's numbers, all means over the tokens that the model generated (arXiv 2512.19673, section 3), with
their standard errors over tokens as se_<name>; A, F, M and H as in the paper, entropies in nats at temperature 1:

    resid, attn, ffn       entropy of the policies of H_l, A_l and F_l: softmax(state W^T)
    attn_in, ffn_in        entropy at the modules' normed inputs LN1_l(H_{l-1}) and LN2_l(M_l)
    d_layer                resid minus resid of the layer below (the embedding below layer 1)
    d_attn, d_ffn          attn - attn_in, ffn - ffn_in
    cos_attn, cos_ffn      cosine of A_l with H_{l-1}, of F_l with M_l
    resid_norm             L2 norm of H_l
    kl_full                KL(full policy || policy of H_l)
    top1_full              share of tokens where both hold the same token for the most likely one
    resid@norm, ...        the first three with the final norm in front of the unembedding (only when asked for)
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_bupo.errors import UsageError
from megatron_bupo.files import new_file, text_lines

if TYPE_CHECKING:
    from pandas import DataFrame  # type: ignore[import-untyped]

    from megatron_bupo.samples import Rollout  # which needs torch

SCHEMA = 1
FILE_NAME = "entropy_flow.json"
METRICS = (
    "resid", "attn", "ffn", "attn_in", "ffn_in", "d_layer", "d_attn", "d_ffn", "cos_attn", "cos_ffn", "resid_norm",
    "kl_full", "top1_full",
)  # fmt: skip
NORM_METRICS = ("resid@norm", "attn@norm", "ffn@norm")
HEATMAP_TOKENS = 160  # the beginning of a response that a heatmap shows
STAGES = ("exploration", "integration", "convergence")


@dataclass(frozen=True)
class Heatmap:
    """The entropies along the beginning of one response, which has `num_tokens` tokens.

    `tokens` are its first T tokens as text; `resid` has a list of T entropies for each layer from 1, `full` those of
    the full policy: of the position that predicts the token.
    """

    response: int
    num_tokens: int
    tokens: list[str]
    resid: list[list[float]]
    full: list[float]


@dataclass(frozen=True)
class EntropyFlow:
    """What entropy_flow.json holds.

    `embedding` has resid, se_resid, resid_norm and se_resid_norm of H_0; `layers` one dict a layer, from layer 1, with
    "layer" and every name of METRICS and its se_. `stages` has [first, last] layer or None for each of STAGES;
    `selection` the evidence for them and for `suggested_layer` (analysis/stages.py says what is in it).
    """

    model: str
    vocab_size: int
    num_responses: int
    num_tokens: int
    final_entropy: float
    se_final_entropy: float
    embedding: dict[str, float]
    layers: list[dict[str, float]]
    stages: dict[str, list[int] | None]
    suggested_layer: int | None
    selection: dict[str, Any] = field(default_factory=dict)
    heatmap: Heatmap | None = None

    def column(self, name: str) -> list[float]:
        """One number by layer, from layer 1."""
        return [layer[name] for layer in self.layers]

    def frame(self) -> DataFrame:
        """A row for each layer, with every number of METRICS and its se_."""
        from pandas import DataFrame

        return DataFrame(self.layers).set_index("layer")


def check_measurable(rollouts: Sequence[Rollout], where: str) -> None:
    """Raise UsageError unless the policy wrote two tokens or more: a standard error takes two."""
    num_tokens = sum(sum(rollout.mask) for rollout in rollouts)
    if num_tokens < 2:
        found = "no response tokens" if num_tokens == 0 else "a single response token"
        raise UsageError(f"{where}: {found} that the policy wrote (response_mask 1); give responses with 2 or more")


def span_text(span: list[int] | None) -> str:
    """The layers of a stage.

    >>> span_text([1, 6]), span_text([4, 4]), span_text(None)
    ('1-6', '4', 'none')
    """
    return "none" if span is None else "-".join(map(str, sorted(set(span))))


def write_flow(folder: str | Path, flow: EntropyFlow) -> Path:
    """Write FOLDER/entropy_flow.json, whole or not at all; returns its path."""
    path = Path(folder) / FILE_NAME
    with new_file(path) as beside:
        beside.write_text(json.dumps({"schema": SCHEMA, **asdict(flow)}, indent=1) + "\n", encoding="utf-8")
    return path


def read_flow(path: str | Path) -> EntropyFlow:
    """Read the flow from a file, or from the entropy_flow.json of a folder.

    Raises:
        UsageError: no such file, no UTF-8 text, no JSON, another schema, something missing, or one layer only.
    """
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    try:
        text = "".join(text_lines(path))
    except OSError as error:
        hint = f"give an {FILE_NAME} that entropy-flow wrote"
        if (path.parent / "metrics.jsonl").is_file():
            hint = f"of a training run give {path.parent}/entropy_flow/step_... or {path.parent}/internal_layer"
        raise UsageError(f"{path}: {error.strerror}; {hint}") from error
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not JSON; give an {FILE_NAME} that entropy-flow wrote") from error
    if not isinstance(content, dict) or "schema" not in content:
        raise UsageError(f"{path}: no entropy flow (it has no schema); give an {FILE_NAME} that entropy-flow wrote")
    if content.pop("schema") != SCHEMA:
        raise UsageError(f"{path}: is of another schema than {SCHEMA}; measure again with this version")
    try:
        heatmap = content.pop("heatmap", None)
        flow = EntropyFlow(**content, heatmap=None if heatmap is None else Heatmap(**heatmap))
        _check(flow)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise UsageError(f"{path}: the entropy flow is incomplete ({error}); measure again") from error
    return flow


def _check(flow: EntropyFlow) -> None:
    """Raise ValueError, TypeError or KeyError for what is missing, is no number or does not fit."""
    types: dict[str, type] = {"model": str, "vocab_size": int, "num_responses": int, "num_tokens": int}
    types |= {"stages": dict, "selection": dict}
    for name, wanted in types.items():
        if not isinstance(getattr(flow, name), wanted):
            raise ValueError(f"{name} is {getattr(flow, name)!r}")
    if flow.vocab_size < 2:
        raise ValueError(f"vocab_size is {flow.vocab_size}")
    num_layers = len(flow.layers)
    if num_layers < 2:
        raise ValueError(f"{num_layers} layer(s), a flow has 2 or more")
    if [layer["layer"] for layer in flow.layers] != list(range(1, num_layers + 1)):
        raise ValueError("the layers are not 1, 2, 3, ...")
    metrics = [*METRICS, *(name for name in NORM_METRICS if name in flow.layers[0])]
    for layer in flow.layers:
        where = f"of layer {layer['layer']}"
        _check_finite({f"{name} {where}": layer[name] for metric in metrics for name in (metric, f"se_{metric}")})
    embedding = ("resid", "se_resid", "resid_norm", "se_resid_norm")
    _check_finite({f"{name} of the embedding": flow.embedding[name] for name in embedding})
    _check_finite({"final_entropy": flow.final_entropy, "se_final_entropy": flow.se_final_entropy})
    if set(flow.stages) != set(STAGES):
        raise ValueError(f"the stages are {sorted(flow.stages)}")
    for name, span in flow.stages.items():
        if span is not None and not (len(span) == 2 and span[0] <= span[1] and {*span} <= {*range(1, num_layers + 1)}):
            raise ValueError(f"{name} is {span}, of {num_layers} layers")
    if flow.suggested_layer is not None and flow.suggested_layer not in range(1, num_layers + 1):
        raise ValueError(f"suggested_layer is {flow.suggested_layer}, of {num_layers}")
    if flow.heatmap is not None:
        _check_heatmap(flow.heatmap, num_layers)


def _check_heatmap(heatmap: Heatmap, num_layers: int) -> None:
    width = len(heatmap.tokens)
    if not all(isinstance(token, str) for token in heatmap.tokens) or heatmap.num_tokens < width:
        raise ValueError("the heatmap's tokens are not the beginning of a response")
    rows = [*heatmap.resid, heatmap.full]
    if width == 0 or len(rows) != num_layers + 1 or {len(row) for row in rows} != {width}:
        raise ValueError(f"the heatmap is not {num_layers} layers by {width} tokens")
    for place in range(width):
        column = enumerate((row[place] for row in rows), start=1)
        _check_finite({f"row {number}, token {place + 1} of the heatmap": value for number, value in column})


def _check_finite(numbers: dict[str, float]) -> None:
    for name, number in numbers.items():
        if not math.isfinite(number):
            raise ValueError(f"{name} is {number}")
