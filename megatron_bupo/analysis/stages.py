"""The three stages of an entropy flow and the internal layer that they suggest (arXiv 2512.19673, section 3).

    exploration [1..a]        d_ffn > 0 in the lower layers
    integration [a+1..b]      d_ffn near 0 in the middle
    convergence [b+1..L]      d_ffn < 0 in the upper layers         0 <= a <= b <= L: any of them may be empty

a and b minimise the squared error of d_ffn. Exploration is fitted with its mean, which must be above 0, integration
with 0, convergence with its mean, which must be below 0. A bootstrap over the responses estimates how often other
responses would give the same a and b.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from megatron_bupo.analysis.flow_file import STAGES
from megatron_bupo.errors import UsageError

NUM_RESAMPLES = 1000
STABLE_SHARE = 0.9
"""Share of the resamples that must agree."""
COLLAPSE_SHARE = 0.5
"""A collapse takes away more than this share of the highest entropy."""
HIGH_SHARE = 0.75
"""A layer's entropy is high if more than this share of the collapse is still to come."""
LATE_SHARE = 0.1
"""Share of the layers that count as the last ones."""
_SEED = 0
_CHUNK = 2**22  # counts drawn at once: 32 MiB in fp64


@dataclass(frozen=True)
class Selection:
    """The stages ([first, last] layer, or None), the suggested layer or None, and the evidence, all of it JSON:

    pattern            "progressive" or "abrupt"
    reasons            why this pattern, and why this layer or none: a sentence each
    max_resid          the highest residual entropy of a layer; nats
    high_level         above it an entropy is high; nats
    collapse_layer     the first layer that is not high; None without a collapse, or if only the final norm brings it
    mean_d_ffn         by stage, None where it is empty; nats
    squared_error      of the fit; nats^2
    stable             True, False, or None where no responses were given
    stability          why: a sentence
    num_responses, num_resamples    that the bootstrap had, 0 without one
    agreement          share of resamples with the same end of "exploration", end of "integration", "suggested_layer"
                       (the last is None in an abrupt model, where d_ffn does not decide); None without a bootstrap
    interval           5 % and 95 % quantile of the two ends over the resamples; None without a bootstrap
    """

    stages: dict[str, list[int] | None]
    suggested_layer: int | None
    evidence: dict[str, Any]


def select_layer(
    d_ffn: Sequence[float],
    resid: Sequence[float],
    final_entropy: float,
    responses: np.ndarray | None = None,
    num_tokens: np.ndarray | None = None,
) -> Selection:
    """The stages and the layer to optimise, as the paper reads them off the flow.

    In a progressive model (Qwen) it is the last layer of the exploration stage, in an abrupt one (Llama) L - 1.

    A model is abrupt if its residual entropy stays high and collapses in the last layers only. That is: it falls by
    more than half from the highest entropy of a layer to the full policy's, and in all layers but the last tenth
    (rounded, at least one: 3 of 28 and of 32) less than a quarter of this fall is done.

    Args:
        d_ffn: L entropy changes through the FFN, from layer 1; nats, means over tokens.
        resid: L entropies of the raw residual stream, from layer 1; nats.
        final_entropy: of the full policy; nats.
        responses: fp64 [N, L], each response's sum of d_ffn over its tokens; None: stability is not judged.
        num_tokens: [N], each response's number of tokens; goes with `responses`.

    Raises:
        UsageError: fewer than two layers, or a number that is not finite.
    """
    changes, entropies = np.asarray(d_ffn, dtype=np.float64), np.asarray(resid, dtype=np.float64)
    num_layers = len(changes)
    assert len(entropies) == num_layers, f"{len(entropies)} entropies for {num_layers} changes"
    assert (responses is None) == (num_tokens is None), "responses and num_tokens go together"
    if num_layers < 2:
        raise UsageError(f"a model of {num_layers} layer(s) has no stages; the entropy flow needs 2 layers or more")
    if not np.isfinite([*changes, *entropies, final_entropy]).all():
        raise UsageError("the entropy flow has numbers that are not finite; check the model's weights")
    explored, integrated = (int(ends[0]) for ends in stage_ends(changes[None]))
    spans = pairwise([0, explored, integrated, num_layers])
    stages = {name: [low + 1, high] if low < high else None for name, (low, high) in zip(STAGES, spans, strict=True)}
    abrupt, why_pattern, collapse = _pattern(entropies, final_entropy)
    suggested = num_layers - 1 if abrupt else explored or None
    evidence = {
        "pattern": "abrupt" if abrupt else "progressive",
        "reasons": [why_pattern, _why_layer(suggested, changes, abrupt)],
        **collapse,
        **_fit(changes, explored, integrated),
        **_stability(explored, integrated, responses, num_tokens),
    }
    if evidence["agreement"] is not None:
        evidence["agreement"]["suggested_layer"] = None if abrupt else evidence["agreement"]["exploration"]
    return Selection(stages, suggested, evidence)


def stage_ends(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The last layers a and b, int [R] each, of exploration and integration, for R rows of d_ffn, fp64 [R, L].

    Exact: compared with a fit of 0, the mean of n layers with the sum S lowers the squared error by S^2 / n. So a and b
    maximise the sum of two gains, and the best a for each b is a running maximum. Of equal fits it takes the latest b,
    then the earliest a: no stage is claimed without evidence.

    d_ffn of layer a is above 0. Without a layer that is not, the stage would have no smaller a sum in fewer layers.
    """
    num_rows, num_layers = rows.shape
    ends = np.arange(num_layers + 1)
    sums_to, sums_from = np.zeros((2, num_rows, num_layers + 1))
    sums_to[:, 1:] = np.cumsum(rows, axis=1)
    sums_from[:, :-1] = np.cumsum(rows[:, ::-1], axis=1)[:, ::-1]
    # A sum of the wrong sign gains nothing, like the empty stage, which wins the tie.
    explored_gains = np.maximum(sums_to, 0) ** 2 / np.maximum(ends, 1)
    converged_gains = np.minimum(sums_from, 0) ** 2 / np.maximum(num_layers - ends, 1)
    best_gains = np.maximum.accumulate(explored_gains, axis=1)
    integrated = num_layers - np.argmax((best_gains + converged_gains)[:, ::-1], axis=1)
    best_gain = np.take_along_axis(best_gains, integrated[:, None], axis=1)
    explored = np.argmax(explored_gains == best_gain, axis=1)
    return explored, integrated


def _fit(changes: np.ndarray, explored: int, integrated: int) -> dict[str, Any]:
    """The means of the stages, and the squared error of the fit."""
    parts = np.split(changes, [explored, integrated])
    means = [float(part.mean()) if len(part) else None for part in parts]
    fitted = [means[0], 0.0, means[2]]
    error = sum(float(((part - fit) ** 2).sum()) for part, fit in zip(parts, fitted, strict=True) if fit is not None)
    return {"mean_d_ffn": dict(zip(STAGES, means, strict=True)), "squared_error": error}


def _pattern(resid: np.ndarray, final_entropy: float) -> tuple[bool, str, dict[str, Any]]:
    """Whether the model is abrupt, why (a sentence), and the numbers of that."""
    num_layers, highest = len(resid), float(resid.max())
    fall = highest - final_entropy
    level = final_entropy + HIGH_SHARE * fall
    numbers = {"max_resid": highest, "high_level": level, "collapse_layer": None}
    between = f"from {highest:.3f} nats (the highest of the layers) to {final_entropy:.3f} (the full policy)"
    if fall <= COLLAPSE_SHARE * highest:
        limit = f"a collapse is by more than {100 * COLLAPSE_SHARE:.0f} %"
        return False, f"not abrupt: the entropy goes {between}, {limit}", numbers
    low = np.flatnonzero(resid <= level)
    num_high = int(low[0]) if len(low) else num_layers
    if len(low):
        numbers["collapse_layer"] = num_high + 1
    needed = num_layers - max(1, int(LATE_SHARE * num_layers + 0.5))
    abrupt = num_high >= needed
    reason = (
        f"the entropy falls {between} and is high (above {level:.3f}) in the first {num_high} of {num_layers} layers, "
        f"abrupt takes {needed}"
    )
    return abrupt, f"{'abrupt' if abrupt else 'not abrupt'}: {reason}", numbers


def _why_layer(suggested: int | None, changes: np.ndarray, abrupt: bool) -> str:
    """Why this layer, or none: a sentence."""
    if suggested is None:
        return "no layer is suggested: the best fit has no exploration stage (lower layers with a mean d_ffn above 0)"
    if abrupt:
        return f"layer {suggested} is the one below the last"
    reason = f"layer {suggested} is the last of the exploration stage, with d_ffn {changes[suggested - 1]:+.3f}"
    return f"{reason}; the stage has all layers, no integration follows" if suggested == len(changes) else reason


def _stability(
    explored: int, integrated: int, responses: np.ndarray | None, num_tokens: np.ndarray | None
) -> dict[str, Any]:
    """Whether the bootstrap finds the same ends, with its numbers."""
    unjudged = {"stable": None, "num_responses": 0, "num_resamples": 0, "agreement": None, "interval": None}
    if responses is None or num_tokens is None:
        return {**unjudged, "stability": "not judged: a bootstrap needs the numbers of every response"}
    assert len(responses) == len(num_tokens), f"{len(responses)} responses, {len(num_tokens)} numbers of tokens"
    # A response without tokens says nothing.
    has_tokens = np.asarray(num_tokens) > 0
    count = int(has_tokens.sum())
    if count < 2:
        why = f"not stable: {count} response(s) with tokens, a bootstrap needs 2 or more"
        return {**unjudged, "stable": False, "stability": why, "num_responses": count}
    sampled = _bootstrap(np.asarray(responses, dtype=np.float64)[has_tokens])
    agreement, interval, sentences = {}, {}, []
    found = {"exploration": explored, "integration": integrated}
    for (name, end), ends in zip(found.items(), sampled, strict=True):
        agreement[name] = share = float((ends == end).mean())
        low, high = (int(quantile) for quantile in np.quantile(ends, [0.05, 0.95], method="inverted_cdf"))
        interval[name] = [low, high]
        sentences.append(f"{100 * share:.1f} % have the end of {name} at {end} (5 % to 95 %: {low} to {high})")
    stable = min(agreement.values()) >= STABLE_SHARE
    why = f"{'stable' if stable else 'not stable'}: of {NUM_RESAMPLES} resamples of {count} responses "
    return {
        "stable": stable,
        "stability": f"{why}{' and '.join(sentences)}; {100 * STABLE_SHARE:.0f} % of both are called stable",
        "num_responses": count,
        "num_resamples": NUM_RESAMPLES,
        "agreement": agreement,
        "interval": interval,
    }


def _bootstrap(responses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The stage ends, int [NUM_RESAMPLES] each, of resampled responses, fp64 [N, L], sums over their tokens.

    A resample's mean over tokens is its sum divided by its number of tokens. The ends do not depend on a row's scale:
    its sum has the same ones.
    """
    generator = np.random.default_rng(_SEED)
    count = len(responses)
    chunk = max(1, _CHUNK // count)
    sums = []
    for start in range(0, NUM_RESAMPLES, chunk):
        # How often each response is drawn: a resample's sum is then a product, without copies of the responses.
        size = min(chunk, NUM_RESAMPLES - start)
        drawn = generator.multinomial(count, np.full(count, 1 / count), size=size).astype(np.float64)
        sums.append(drawn @ responses)
    return stage_ends(np.concatenate(sums))
