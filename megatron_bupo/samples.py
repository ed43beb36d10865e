"""The small data classes that data, rollouts, rewards and training pass to each other."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from megatron_bupo.errors import UsageError
from megatron_bupo.files import json_object


@dataclass(frozen=True)
class Prompt:
    """One prompt, tokenized. `index` is its row over all data files (from 0) and part of every sampling seed."""

    index: int
    tokens: list[int]
    text: str
    answer: str | None = None
    data_source: str | None = None


@dataclass(frozen=True)
class Rollout:
    """One response to one prompt: a line of a rollout file.

    `response_tokens` include the stop token; `response_mask` has 0 for tokens that the policy did not write;
    `rollout_logprobs` are the engine's, of the full policy at the temperature, before top-p, in nats. `policy` names
    the policy that wrote the response, in files with responses of several policies.

    >>> Rollout.from_json('{"group": 0, "prompt_tokens": [5, 6], "response_tokens": [7], "reward": 1.0}').num_tokens
    3
    """

    group: int
    prompt_tokens: list[int]
    response_tokens: list[int]
    reward: float | None = None
    response_mask: list[int] | None = None
    prompt: str | None = None
    response: str | None = None
    answer: str | None = None
    rollout_logprobs: list[float] | None = None
    finish_reason: str | None = None
    weight_version: str | None = None
    data_source: str | None = None
    policy: str | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_tokens) + len(self.response_tokens)

    @property
    def mask(self) -> list[int]:
        """1 for every response token that the policy wrote and that is trained on."""
        return self.response_mask if self.response_mask is not None else [1] * len(self.response_tokens)

    def with_reward(self, reward: float) -> Rollout:
        return replace(self, reward=reward)

    def record(self) -> dict[str, Any]:
        """What is known, by the names of the format."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def to_json(self) -> str:
        return json.dumps(self.record(), ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str, where: str = "rollout record") -> Rollout:
        """Read one line of a rollout file; `where` names file and line in the errors.

        Raises:
            UsageError: no JSON object, a required key that is missing, or lists of lengths that do not match.
        """
        record = json_object(line, where)
        missing = [key for key in ("group", "prompt_tokens", "response_tokens") if key not in record]
        if missing:
            raise UsageError(f"{where}: the key '{missing[0]}' is missing")
        known = {name: record[name] for name in cls.__dataclass_fields__ if name in record}
        rollout = cls(**known)
        rollout._check(where)
        return rollout

    def _check(self, where: str) -> None:
        if not isinstance(self.group, int) or isinstance(self.group, bool):
            raise UsageError(f"{where}: 'group' is {self.group!r}; it must be an integer")
        for name in ("prompt_tokens", "response_tokens"):
            tokens = getattr(self, name)
            if not isinstance(tokens, list) or not tokens:
                raise UsageError(f"{where}: '{name}' must be a list of at least one token id")
            if not all(type(token) is int and token >= 0 for token in tokens):
                raise UsageError(f"{where}: '{name}' has entries that are no token ids (integers from 0)")
        for name in ("response_mask", "rollout_logprobs"):
            values: list[Any] | None = getattr(self, name)
            if values is None:
                continue
            if not isinstance(values, list) or len(values) != len(self.response_tokens):
                raise UsageError(f"{where}: '{name}' must have one entry per response token")
            if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
                raise UsageError(f"{where}: '{name}' has entries that are no finite numbers")
        if any(value not in (0, 1) for value in self.mask):
            raise UsageError(f"{where}: 'response_mask' has entries other than 0 and 1")
        if self.reward is not None and not (isinstance(self.reward, int | float) and math.isfinite(self.reward)):
            raise UsageError(f"{where}: 'reward' is {self.reward!r}; it must be a finite number")


@dataclass
class TokenColumns:
    """What a loss needs beside the trained policy's outputs: fp32 [R] each, None where it is not known (yet).

    What is of a policy is known on the last pipeline stage only. The old one is the trained policy at the start of the
    step; its entropy is a metric.
    """

    advantages: Tensor | None = None
    old_logprobs: Tensor | None = None
    old_entropy: Tensor | None = None
    ref_logprobs: Tensor | None = None
    rollout_logprobs: Tensor | None = None

    def keep_old(self, logprobs: Tensor, entropy: Tensor) -> None:
        """Set what the old policy says; tensors without a graph."""
        self.old_logprobs, self.old_entropy = logprobs, entropy


@dataclass
class MicroBatch:
    """Whole responses packed one after the other into one sequence of T tokens.

    The last token of a response predicts nothing and is not an input. With two responses "ab|cd" and "e|f":

        tokens      a b c e 0        T = 5, the last one is padding
        cu_seqlens  0 3 4 5          segments [0, 3), [3, 4) and the padding [4, 5)
        rows        1 2 3            the positions that predict response tokens
        targets     c d f
        segments    0 0 1            which response of `responses` a row belongs to

    `tokens` int64 [T], `cu_seqlens` int32 [segments + 1], `rows`, `targets`, `segments` int64 [R], `mask` fp32 [R].
    `responses` are the positions of the responses in the rollout batch.
    """

    tokens: Tensor
    cu_seqlens: Tensor
    rows: Tensor
    targets: Tensor
    segments: Tensor
    mask: Tensor
    responses: list[int]
    columns: TokenColumns = field(default_factory=TokenColumns)

    def to(self, device: torch.device) -> MicroBatch:
        """On another device, but for `cu_seqlens`, which attention reads as numbers; before the columns are set."""
        names = ("tokens", "rows", "targets", "segments", "mask")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})

    def per_response(self, column: Tensor) -> list[list[float]]:
        """Split a column [R] into one list per response, in the order of `responses`."""
        counts = torch.bincount(self.segments.cpu(), minlength=len(self.responses)).tolist()
        return [part.tolist() for part in column.detach().float().cpu().split(counts)]
