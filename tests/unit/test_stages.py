"""Stages and suggested layer against a search in plain loops, hand-made flows, and a bootstrap of its own."""

import json
import math

import numpy as np
import pytest

from megatron_bupo.analysis import stages
from megatron_bupo.analysis.stages import select_layer, stage_ends
from megatron_bupo.errors import UsageError

GRADUAL = 10.5, 0.4


def searched(row):
    """(squared error, a, b) of the best of all a <= b, one after the other; ties: the latest b, then the earliest a."""
    best = None
    for b in range(len(row), -1, -1):
        for a in range(b + 1):
            error = sum(change**2 for change in row[a:b])
            for part, sign in ((row[:a], 1), (row[b:], -1)):
                mean = sum(part) / len(part) if part else 0.0
                error += sum((change - mean) ** 2 for change in part) if mean * sign > 0 or not part else math.inf
            if best is None or error < best[0]:
                best = (error, a, b)
    return best


def step_flow(num_layers, explored, integrated, noise=0.0):
    """+0.8 in layers 1..explored, then 0, then -1.2 from layer integrated + 1 on."""
    levels = [0.8] * explored + [0.0] * (integrated - explored) + [-1.2] * (num_layers - integrated)
    return np.array(levels) + noise * np.random.default_rng(5).normal(size=num_layers)


def gradual(num_layers):
    """Entropies that decline evenly from 10.5 to 0.4."""
    return np.linspace(10.5, 0.4, num_layers)


def collapsing(num_layers, num_high):
    """Entropies of 10.5 in the first layers, then 0.5."""
    return [10.5] * num_high + [0.5] * (num_layers - num_high)


@pytest.mark.parametrize("num_layers", [2, 3, 4, 7, 12, 19])
def test_the_search_finds_what_plain_loops_find(num_layers):
    generator = np.random.default_rng(num_layers)
    slopes = np.linspace(1.0, -1.0, num_layers) * generator.normal(size=(60, 1))
    rows = generator.normal(size=(60, num_layers)) + generator.choice([0.0, 1.0, 3.0], size=(60, 1)) * slopes
    explored, integrated = stage_ends(rows)
    expected = [searched(row.tolist()) for row in rows]
    assert list(zip(explored.tolist(), integrated.tolist(), strict=True)) == [(a, b) for _, a, b in expected]
    # All kinds of answers are among them, else the comparison says little.
    assert len({(a > 0, b > a, b < num_layers) for _, a, b in expected}) >= 5
    for row, (error, a, _) in zip(rows, expected, strict=True):
        selection = select_layer(row, gradual(num_layers), 10.0)
        assert selection.evidence["squared_error"] == pytest.approx(error, rel=1e-9, abs=1e-12)
        assert selection.suggested_layer == (a or None)
        assert a == 0 or row[a - 1] > 0


@pytest.mark.parametrize(
    ("row", "exploration", "integration", "convergence", "error"),
    [
        ([2.0, 2.0, 0.0, -1.0], [1, 2], [3, 3], [4, 4], 0.0),
        ([0.0, 0.0, 0.0], None, [1, 3], None, 0.0),
        ([1.0, 3.0], [1, 2], None, None, 2.0),
        ([-3.0, -1.0], None, None, [1, 2], 2.0),
        # A fit with 0 leaves 1, a mean of -2 leaves 1 + 1.
        ([-1.0, -3.0], None, [1, 1], [2, 2], 1.0),
        ([1.0, -1.0], [1, 1], None, [2, 2], 0.0),
        ([0.0, 0.0, -4.0], None, [1, 2], [3, 3], 0.0),
        ([4.0, 0.0, 0.0], [1, 1], [2, 3], None, 0.0),
        # The wrong way round: the means of both ends have the wrong sign.
        ([-2.0, 2.0], None, [1, 2], None, 8.0),
        # Ties: 1^2 / 1 = (1 + 1)^2 / 4. The shorter stage is taken.
        ([1.0, 0.0, 0.0, 1.0], [1, 1], [2, 4], None, 1.0),
        ([-1.0, 0.0, 0.0, -1.0], None, [1, 3], [4, 4], 1.0),
    ],
)
def test_by_hand(row, exploration, integration, convergence, error):
    selection = select_layer(row, [5.0] * len(row), 5.0)
    expected = {"exploration": exploration, "integration": integration, "convergence": convergence}
    assert selection.stages == expected
    assert selection.evidence["squared_error"] == error
    for stage, span in expected.items():
        mean = None if span is None else sum(row[span[0] - 1 : span[1]]) / (span[1] - span[0] + 1)
        assert selection.evidence["mean_d_ffn"][stage] == mean


def test_the_published_pattern():
    selection = select_layer(step_flow(36, 6, 26, noise=0.15), gradual(36), 0.3)
    assert selection.stages == {"exploration": [1, 6], "integration": [7, 26], "convergence": [27, 36]}
    assert selection.suggested_layer == 6
    assert selection.evidence["pattern"] == "progressive"
    # The level is 0.3 + 3/4 (10.5 - 0.3) = 7.95; a layer is 10.1 / 35 = 0.2886 less than the one below: 2.55 is 8.8.
    assert selection.evidence["high_level"] == pytest.approx(7.95)
    assert selection.evidence["collapse_layer"] == 10


@pytest.mark.parametrize("num_layers", [28, 32])
def test_an_abrupt_model_takes_the_layer_below_the_last(num_layers):
    selection = select_layer(step_flow(num_layers, 3, 20), collapsing(num_layers, num_layers - 1), 0.3)
    assert (selection.suggested_layer, selection.evidence["pattern"]) == (num_layers - 1, "abrupt")
    assert selection.evidence["collapse_layer"] == num_layers
    assert selection.stages["exploration"] == [1, 3]


@pytest.mark.parametrize(("num_layers", "late"), [(2, 1), (4, 1), (14, 1), (15, 2), (28, 3), (32, 3), (36, 4), (80, 8)])
def test_how_late_a_collapse_is_abrupt(num_layers, late):
    changes = step_flow(num_layers, 1, num_layers)
    abrupt = select_layer(changes, collapsing(num_layers, num_layers - late), 0.3)
    assert (abrupt.evidence["pattern"], abrupt.suggested_layer) == ("abrupt", num_layers - 1)
    if num_layers > 2:
        earlier = select_layer(changes, collapsing(num_layers, num_layers - late - 1), 0.3)
        assert (earlier.evidence["pattern"], earlier.suggested_layer) == ("progressive", 1)


def test_what_is_abrupt_and_what_is_not():
    def pattern(resid, final_entropy):
        evidence = select_layer(step_flow(len(resid), 1, len(resid)), resid, final_entropy).evidence
        return evidence["pattern"], evidence["collapse_layer"]

    # Only the final norm brings the collapse.
    assert pattern([10.0] * 20, 1.0) == ("abrupt", None)
    # Random weights: almost uniform to the end, and behind the final norm.
    assert pattern([10.8] * 20, 10.6) == ("progressive", None)
    # It falls by half, not by more.
    assert pattern([10.0] * 20, 5.0) == ("progressive", None)
    # Low from the first layer on, as in a model whose embedding points at the last token.
    assert pattern([1.4, *[0.2] * 19], 1.7) == ("progressive", None)
    # High at both ends only.
    assert pattern([10.0, *[2.0] * 10, *[10.0] * 9], 0.3) == ("progressive", 2)
    # A steady fall over the convergence stage of the published pattern: layers 27 to 36.
    assert pattern([10.0] * 26 + np.linspace(9.0, 0.5, 10).tolist(), 0.3) == ("progressive", 29)
    # 0.4 + 3/4 (10.4 - 0.4) = 7.9: a little less in the layers below, and just as little.
    assert pattern([10.4, *[8.0] * 18, 0.5], 0.4) == ("abrupt", 20)
    assert pattern([10.4, *[7.8] * 18, 0.5], 0.4) == ("progressive", 2)


def test_without_an_exploration_stage_nothing_is_suggested():
    selection = select_layer([0.0, -1.0, -1.0], [3.0, 2.0, 1.0], 0.9)
    assert selection.suggested_layer is None
    assert "no exploration stage" in selection.evidence["reasons"][1]


def test_exploration_through_all_layers_is_said():
    selection = select_layer([1.0, 1.0, 1.0], [3.0, 2.0, 1.0], 0.9)
    assert selection.suggested_layer == 3
    assert "no integration follows" in selection.evidence["reasons"][1]


@pytest.mark.parametrize(
    ("changes", "resid", "message"),
    [([1.0], [1.0], "1 layer"), ([], [], "0 layer"), ([1.0, math.nan], [1.0, 1.0], "not finite")],
)
def test_what_has_no_stages_is_refused(changes, resid, message):
    with pytest.raises(UsageError, match=message):
        select_layer(changes, resid, 0.5)


def sampled_responses(noise, num_responses=24, seed=3):
    """Sums of d_ffn fp64 [N, 8] around a step flow with the ends 2 and 5, and numbers of tokens [N] from 1 to 60."""
    generator = np.random.default_rng(seed)
    num_tokens = generator.integers(1, 61, size=num_responses)
    means = step_flow(8, 2, 5) + noise * generator.normal(size=(num_responses, 8))
    return means * num_tokens[:, None], num_tokens


def judged(responses, num_tokens, resid=GRADUAL):
    mean = responses.sum(axis=0) / num_tokens.sum()
    return select_layer(mean, np.linspace(*resid, 8), 10.0, responses, num_tokens)


def test_a_clear_flow_is_stable():
    selection = judged(*sampled_responses(noise=0.2))
    assert selection.stages == {"exploration": [1, 2], "integration": [3, 5], "convergence": [6, 8]}
    assert selection.evidence["stable"] is True
    assert selection.evidence["agreement"] == {"exploration": 1.0, "integration": 1.0, "suggested_layer": 1.0}
    assert selection.evidence["interval"] == {"exploration": [2, 2], "integration": [5, 5]}
    assert (selection.evidence["num_responses"], selection.evidence["num_resamples"]) == (24, 1000)
    assert json.loads(json.dumps(selection.evidence)) == selection.evidence


@pytest.mark.parametrize("noise", [2.0, 4.0])
def test_noise_is_not_stable_and_the_shares_are_those_of_plain_resampling(noise):
    responses, num_tokens = sampled_responses(noise)
    selection = judged(responses, num_tokens)
    mean = (responses.sum(axis=0) / num_tokens.sum()).tolist()
    _, a, b = searched(mean)
    # Whole responses, drawn one by one, long ones counting for more; other random numbers.
    generator = np.random.default_rng(77)
    found = []
    for _ in range(600):
        drawn = generator.integers(len(responses), size=len(responses)).tolist()
        total = sum(int(num_tokens[response]) for response in drawn)
        found.append(searched([sum(responses[drawn, layer].tolist()) / total for layer in range(8)])[1:])
    shares = {
        "exploration": np.mean([ends[0] == a for ends in found]),
        "integration": np.mean([ends[1] == b for ends in found]),
    }
    shares["suggested_layer"] = shares["exploration"]
    # Two standard errors of the difference are below 0.053.
    assert selection.evidence["agreement"] == pytest.approx(shares, abs=0.08)
    assert min(shares.values()) < 0.8
    for place, end in enumerate(("exploration", "integration")):
        ends = np.array([ends[place] for ends in found])
        for share, value in zip((0.05, 0.95), selection.evidence["interval"][end], strict=True):
            assert (ends < value).mean() - 0.03 < share < (ends <= value).mean() + 0.03
    assert selection.evidence["stable"] is False
    assert "not stable" in selection.evidence["stability"]


def test_both_ends_must_be_stable():
    """Layers 1 to 6 are the same in every response; the end of the integration is anyone's guess."""
    generator = np.random.default_rng(0)
    responses = np.tile([1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], (30, 1))
    responses[:, 6:] += generator.normal(size=(30, 2))
    evidence = judged(responses, np.ones(30)).evidence
    assert evidence["agreement"]["exploration"] == 1.0
    assert evidence["agreement"]["integration"] < 0.9
    assert evidence["stable"] is False


def test_the_bootstrap_is_the_same_every_time_and_in_pieces(monkeypatch):
    whole = judged(*sampled_responses(noise=2.0))
    assert judged(*sampled_responses(noise=2.0)) == whole
    monkeypatch.setattr(stages, "_CHUNK", 24 * 7)
    assert judged(*sampled_responses(noise=2.0)) == whole


def test_the_layer_of_an_abrupt_model_does_not_come_from_the_bootstrap():
    responses, num_tokens = sampled_responses(noise=0.2)
    mean = responses.sum(axis=0) / num_tokens.sum()
    evidence = select_layer(mean, collapsing(8, 7), 0.3, responses, num_tokens).evidence
    assert evidence["agreement"] == {"exploration": 1.0, "integration": 1.0, "suggested_layer": None}
    assert evidence["stable"] is True


def test_without_enough_responses():
    responses, num_tokens = sampled_responses(noise=0.2)
    mean = responses[0] / num_tokens[0]
    unjudged = select_layer(mean, np.linspace(*GRADUAL, 8), 10.0).evidence
    assert (unjudged["stable"], unjudged["agreement"], unjudged["num_resamples"]) == (None, None, 0)
    assert "not judged" in unjudged["stability"]
    # One response, and two of which one has no token.
    for rows, counts in ((responses[:1], num_tokens[:1]), (responses[:2] * [[1], [0]], num_tokens[:2] * [1, 0])):
        evidence = judged(rows, counts).evidence
        assert (evidence["stable"], evidence["agreement"], evidence["num_responses"]) == (False, None, 1)
        assert "1 response" in evidence["stability"]
    # Responses without tokens change nothing.
    padded = judged(np.concatenate([responses, np.zeros((9, 8))]), np.concatenate([num_tokens, np.zeros(9)]))
    assert padded == judged(responses, num_tokens)
