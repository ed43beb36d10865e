"""Streaming means and standard errors of the flow against numpy on all tokens at once, and the npz file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_bupo.analysis.flow_tokens import FlowTotals, TokenValues
from megatron_bupo.model.flow import TokenFlow
from megatron_bupo.samples import MicroBatch

LAYERS, RESPONSES = 3, 4


def random_tokens(count: int, seed: int) -> TokenValues:
    rng = np.random.default_rng(seed)
    values = {
        "d_ffn": rng.normal(size=(LAYERS, count)).astype(np.float32),
        # Far from 0 with a small spread: where naive sums in fp32 lose the deviation.
        "resid_norm": (5e4 + rng.normal(size=(LAYERS, count))).astype(np.float32),
        "full": rng.normal(size=(1, count)).astype(np.float32),
    }
    return TokenValues(rng.integers(1, RESPONSES + 1, count), rng.integers(0, 99, count), values)


@pytest.fixture
def parts() -> list[TokenValues]:
    return [random_tokens(count, seed) for seed, count in enumerate((5, 1, 0, 300))]


def test_totals_equal_numpy_on_everything(parts: list[TokenValues]) -> None:
    totals = FlowTotals(RESPONSES, LAYERS)
    for part in parts:
        totals.add(part)
    mean, error = totals.means()
    response = np.concatenate([part.response for part in parts])
    assert totals.num_tokens.tolist() == [(response == number).sum() for number in range(1, RESPONSES + 1)]
    for name in parts[0].values:
        together = np.concatenate([part.values[name] for part in parts], axis=1).astype(np.float64)
        np.testing.assert_allclose(mean[name], together.mean(axis=1), rtol=1e-12)
        np.testing.assert_allclose(error[name], together.std(axis=1, ddof=1) / np.sqrt(306), rtol=1e-6)
    d_ffn = np.concatenate([part.values["d_ffn"] for part in parts], axis=1).astype(np.float64)
    for number in range(1, RESPONSES + 1):
        np.testing.assert_allclose(totals.d_ffn_sums[number - 1], d_ffn[:, response == number].sum(axis=1), rtol=1e-12)


def test_joined_is_ordered_by_response_and_keeps_the_order_within(parts: list[TokenValues], tmp_path: Path) -> None:
    joined = TokenValues.joined(parts)
    assert joined.response.tolist() == sorted(joined.response.tolist())
    for number in range(1, RESPONSES + 1):
        expected = np.concatenate([part.token[part.response == number] for part in parts])
        assert joined.of_response(number).token.tolist() == expected.tolist()
        column = np.concatenate([part.values["d_ffn"][:, part.response == number] for part in parts], axis=1)
        assert np.array_equal(joined.of_response(number).values["d_ffn"], column)
    joined.write(tmp_path / "flow.npz")
    with np.load(tmp_path / "flow.npz") as stored:
        assert sorted(stored) == ["d_ffn", "full", "resid_norm", "response", "token"]
        assert np.array_equal(stored["resid_norm"], joined.values["resid_norm"])
    assert [path.name for path in tmp_path.iterdir()] == ["flow.npz"]


def test_tokens_of_a_micro_batch_know_their_response() -> None:
    batch = MicroBatch(
        tokens=torch.zeros(5, dtype=torch.int64),
        cu_seqlens=torch.tensor([0, 3, 4, 5], dtype=torch.int32),
        rows=torch.tensor([1, 2, 3]),
        targets=torch.tensor([7, 8, 9]),
        segments=torch.tensor([0, 0, 1]),
        mask=torch.ones(3),
        responses=[5, 2],  # counted from 0
    )
    layers = {"resid": torch.arange(6.0).view(2, 3)}
    tokens = TokenValues.of(batch, TokenFlow(layers, torch.ones(3), torch.full((3,), 2.0), torch.full((3,), 3.0)))
    assert tokens.response.tolist() == [6, 6, 3]
    assert tokens.token.tolist() == [7, 8, 9]
    assert tokens.of_response(3).values["resid"].tolist() == [[2.0], [5.0]]
    assert [tokens.values[name].shape for name in ("embedding_resid", "embedding_resid_norm", "full")] == [(1, 3)] * 3
