"""The entropy flow token by token, and its means and standard errors without keeping the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_bupo.files import new_file
from megatron_bupo.model.flow import TokenFlow
from megatron_bupo.samples import MicroBatch

# Beside the numbers of the layers: entropy and norm of H_0, entropy of the full policy.
SINGLE_NAMES = ("embedding_resid", "embedding_resid_norm", "full")


@dataclass(frozen=True)
class TokenValues:
    """The values of T tokens.

    `response` int64 [T] is the response's number from 1, `token` int64 [T] what was generated there. `values` has
    float32 [L, T] for each name of a layer's numbers, and [1, T] for embedding_resid and embedding_resid_norm (of H_0)
    and full (the entropy of the full policy).
    """

    response: np.ndarray
    token: np.ndarray
    values: dict[str, np.ndarray]

    @classmethod
    def of(cls, batch: MicroBatch, flow: TokenFlow) -> TokenValues:
        """Those of a micro-batch."""
        single = (flow.embedding_resid, flow.embedding_norm, flow.full)
        tensors = flow.layers | {name: column[None] for name, column in zip(SINGLE_NAMES, single, strict=True)}
        response = np.asarray(batch.responses, dtype=np.int64)[batch.segments.cpu().numpy()] + 1
        return cls(response, batch.targets.cpu().numpy(), {k: v.cpu().numpy() for k, v in tensors.items()})

    @classmethod
    def joined(cls, parts: Sequence[TokenValues]) -> TokenValues:
        """Several, ordered by response; within one the order stays."""
        response = np.concatenate([part.response for part in parts])
        order = np.argsort(response, kind="stable")
        token = np.concatenate([part.token for part in parts])
        values = {
            name: np.concatenate([part.values[name] for part in parts], axis=1)[:, order] for name in parts[0].values
        }
        return cls(response[order], token[order], values)

    def of_response(self, number: int) -> TokenValues:
        """Those of one response, from 1; there may be none."""
        chosen = self.response == number
        values = {name: column[:, chosen] for name, column in self.values.items()}
        return TokenValues(self.response[chosen], self.token[chosen], values)

    def write(self, path: str | Path) -> None:
        """A npz file: response, token, and an array for each name. Written beside and renamed."""
        arrays: dict[str, Any] = {"response": self.response, "token": self.token, **self.values}
        with new_file(path) as beside, beside.open("wb") as file:
            np.savez_compressed(file, **arrays)


class FlowTotals:
    """Sums over tokens in float64, from which means and standard errors follow; of d_ffn for each response as well.

    Attributes:
        num_tokens: float64 [N] tokens of each response.
        d_ffn_sums: float64 [N, L] each response's sum of d_ffn.
    """

    def __init__(self, num_responses: int, num_layers: int) -> None:
        self.num_tokens = np.zeros(num_responses)
        self.d_ffn_sums = np.zeros((num_responses, num_layers))
        self._sums: dict[str, np.ndarray] = {}
        self._squares: dict[str, np.ndarray] = {}

    def add(self, tokens: TokenValues) -> None:
        """Count in some tokens."""
        np.add.at(self.num_tokens, tokens.response - 1, 1)
        np.add.at(self.d_ffn_sums, tokens.response - 1, tokens.values["d_ffn"].T)
        for name, column in tokens.values.items():
            wide: np.ndarray = column.astype(np.float64)
            self._sums[name] = self._sums.get(name, 0.0) + wide.sum(axis=1)
            self._squares[name] = self._squares.get(name, 0.0) + np.square(wide).sum(axis=1)

    def reduce(self, names: dict[str, int], group: ProcessGroup) -> None:
        """Add up what the ranks of `group` have, some of them nothing; all know the result then.

        Args:
            names: of every value, with the number of its rows; the same on every rank.
        """
        tables = [self.num_tokens, self.d_ffn_sums]
        tables += [self._sums.get(name, np.zeros(rows)) for name, rows in names.items()]
        tables += [self._squares.get(name, np.zeros(rows)) for name, rows in names.items()]
        flat = torch.from_numpy(np.concatenate([table.ravel() for table in tables]))
        dist.all_reduce(flat, group=group)
        parts = np.split(flat.numpy(), np.cumsum([table.size for table in tables])[:-1])
        shaped = [part.reshape(table.shape) for part, table in zip(parts, tables, strict=True)]
        self.num_tokens, self.d_ffn_sums = shaped[:2]
        self._sums = dict(zip(names, shaped[2 : 2 + len(names)], strict=True))
        self._squares = dict(zip(names, shaped[2 + len(names) :], strict=True))

    def means(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """By name, the mean over tokens and its standard error (unbiased deviation / root of the number of tokens)."""
        count = self.num_tokens.sum()
        assert count > 1, f"standard errors of {count} tokens"
        mean = {name: sums / count for name, sums in self._sums.items()}
        error = {}
        for name, squares in self._squares.items():
            variance = np.maximum(squares - count * np.square(mean[name]), 0.0) / (count - 1)
            error[name] = np.sqrt(variance / count)
        return mean, error
