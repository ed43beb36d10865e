"""What a loss is given and what it returns: typed, the same for the built-in ones and a researcher's own.

A loss is a function of the response tokens of one micro-batch, all of the policy that is trained (full or internal).
How its tokens become one number (mean over tokens or responses), the KL term and the entropy bonus are the objective's
(objective.py), so that each of them is written once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LossInputs:
    """The R response tokens of whole responses. Log-probs and entropy in nats; fp32 [R] unless said otherwise.

    Where `response_mask` is False every column is 0: such a token was not written by the policy, and what the loss says
    there does not count. R is at least 1: micro-batches of padding alone never reach a loss.
    """

    logprobs: Tensor  # of the trained policy now, with gradient
    entropy: Tensor  # of the trained policy now, with gradient
    old_logprobs: Tensor  # of the trained policy at the start of the step
    advantages: Tensor
    response_mask: Tensor  # bool [R], the trained tokens
    tokens: Tensor  # int64 [R] token ids
    segments: Tensor  # int64 [R] which response of the micro-batch a token belongs to
    num_responses: int
    ref_logprobs: Tensor | None = None  # of the trained policy in the start model, where --kl-loss-coef is above 0
    rollout_logprobs: Tensor | None = None  # of the full policy in the rollout engine, where they are known

    def sum_by_response(self, per_token: Tensor) -> Tensor:
        """Sums [num_responses] of a column [R] over the tokens of each response."""
        return per_token.new_zeros(self.num_responses).index_add(0, self.segments, per_token)


@dataclass(frozen=True)
class LossOutputs:
    """The loss of each token, fp32 [R], to be minimised, with gradient to `logprobs` (and `entropy`, if it is used).

    `metrics`: columns [R] without gradient; the mean over the trained tokens of a step is logged under the name.
    """

    per_token: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


Loss = Callable[[LossInputs], LossOutputs]
