"""Flows made up from the published pattern, for what draws, reads or judges them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_bupo.analysis.flow_file import HEATMAP_TOKENS, METRICS, NORM_METRICS, EntropyFlow, Heatmap

VOCAB_SIZE = 151_936
FINAL_ENTROPY = 0.31
EMBEDDING = {"resid": 11.2, "se_resid": 0.02, "resid_norm": 1.5, "se_resid_norm": 0.03}


def synthetic_flow(
    num_layers: int,
    *,
    model: str = "Qwen3-4B",
    abrupt: bool = False,
    final_norm: bool = False,
    tokens: Sequence[str] | None = None,
) -> EntropyFlow:
    """A whole flow that read_flow takes, the same at every call.

    Args:
        num_layers: 2 or more.
        abrupt: Llama-like: the entropy stays high and falls in the last layer. Otherwise Qwen-like: with 36 layers
            exploration 1-6, integration 7-26, convergence 27-36; other numbers of layers in proportion.
        final_norm: with the policies behind the final norm.
        tokens: of a response, for a heatmap.
    """
    explored, integrated = (0, num_layers - 1) if abrupt else (round(num_layers / 6), round(num_layers * 26 / 36))
    explored = explored if abrupt else max(1, explored)
    layers: list[dict[str, float]] = []
    for layer in range(1, num_layers + 1):
        values = _layer(layer / num_layers, max(0, layer - integrated) / (num_layers - integrated), layer)
        if layer <= explored:
            values["d_ffn"] = 1.1 - 0.3 * layer / explored
        below = layers[-1]["resid"] if layers else EMBEDDING["resid"]
        values |= {"d_layer": values["resid"] - below, "ffn": values["ffn_in"] + values["d_ffn"]}
        if final_norm:
            values |= {name: 0.8 * values[name.removesuffix("@norm")] for name in NORM_METRICS}
        errors = {f"se_{name}": 0.01 + 0.02 * abs(value) for name, value in values.items()}
        layers.append({"layer": layer, **values, **errors})
    assert set(METRICS) <= layers[0].keys()
    stages: dict[str, list[int] | None] = {
        "exploration": [1, explored] if explored else None,
        "integration": [explored + 1, integrated] if integrated > explored else None,
        "convergence": [integrated + 1, num_layers],
    }
    return EntropyFlow(
        model=model,
        vocab_size=VOCAB_SIZE,
        num_responses=8,
        num_tokens=2048,
        final_entropy=FINAL_ENTROPY,
        se_final_entropy=0.01,
        embedding=dict(EMBEDDING),
        layers=layers,
        stages=stages,
        suggested_layer=explored or integrated,
        heatmap=None if tokens is None else _heatmap(layers, list(tokens)),
    )


def _layer(depth: float, converged: float, layer: int) -> dict[str, float]:
    """The means of a layer behind exploration; `depth` is its share of all layers, `converged` of the last stage's."""
    wave = math.sin(2.1 * layer)
    attn, attn_in = 9.8 - 4.0 * converged + 0.9 * wave, 10.4 - 3.2 * converged + 0.5 * math.cos(1.3 * layer)
    return {
        "resid": 10.6 - 8.9 * converged**1.4 - 0.8 * depth + 0.05 * wave,
        "attn": attn,
        "attn_in": attn_in,
        "d_attn": attn - attn_in,
        "ffn_in": 9.6 - 2.6 * converged,
        "d_ffn": 0.04 * wave - (0.8 + 1.3 * converged if converged else 0.0),
        "cos_attn": 0.1 - 0.25 * depth + 0.1 * wave,
        "cos_ffn": 0.3 - 0.5 * depth + 0.4 * converged**3,
        "resid_norm": 3.0 * math.exp(5.0 * depth),
        "kl_full": 12.0 * (1 - depth) ** 0.5 + 0.4,
        "top1_full": 0.01 + 0.8 * converged**2,
    }


def _heatmap(layers: list[dict[str, float]], tokens: list[str]) -> Heatmap:
    """Each layer's mean, moved up and down along the tokens, of which as many are kept as a measurement keeps."""
    num_tokens, tokens = len(tokens), tokens[:HEATMAP_TOKENS]
    waves = [0.5 + 0.5 * math.sin(1.7 * place) for place in range(len(tokens))]
    resid = [[layer["resid"] * (0.8 + 0.2 * wave) for wave in waves] for layer in layers]
    full = [3 * FINAL_ENTROPY * wave**2 for wave in waves]
    return Heatmap(response=1, num_tokens=num_tokens, tokens=tokens, resid=resid, full=full)
