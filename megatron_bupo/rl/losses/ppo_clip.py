"""The clipped surrogate of PPO with a dual clip: the loss of GRPO and BuPO.

With ratio = exp(logprobs - old_logprobs) and A the advantage, per token:

    -min(ratio * A, clip(ratio, 1 - low, 1 + high) * A)        PPO, arXiv 1707.06347, eq. 7
    for A < 0 and c = dual_clip > 0: at most -c * A            dual clip, arXiv 1912.09729
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_bupo.errors import UsageError
from megatron_bupo.flags import Group, flag
from megatron_bupo.rl.loss import LossInputs, LossOutputs

NAME = "ppo-clip"
MAX_LOG_RATIO = 20.0
"""Log-ratios are cut above this before exp: past exp(88) fp32 overflows and the backward gives 0 * inf = NaN."""


@dataclass(frozen=True)
class Flags(Group):
    """loss ppo-clip"""

    clip_ratio_low: float = flag("ratios are clipped below 1 minus this", 0.2, low=0, below=1)
    clip_ratio_high: float = flag("ratios are clipped above 1 plus this", 0.2, low=0)
    dual_clip: float = flag("largest ratio for negative advantages, above 1; 0 = off", 10.0, low=0)

    def check(self) -> None:
        super().check()
        if 0 < self.dual_clip <= 1:
            raise UsageError(f"--dual-clip {self.dual_clip}: must be greater than 1, or 0 to switch it off")


def loss(inputs: LossInputs, flags: Flags) -> LossOutputs:
    """Metrics: `clip_frac` marks tokens whose clipped branch has strictly the larger loss, `clip_frac_dual` those whose
    loss lay strictly above -c * A; `ratio_mean` is the ratio.
    """
    advantages = inputs.advantages
    ratio = (inputs.logprobs - inputs.old_logprobs).clamp(max=MAX_LOG_RATIO).exp()
    unclipped = -ratio * advantages
    clipped = -ratio.clamp(1.0 - flags.clip_ratio_low, 1.0 + flags.clip_ratio_high) * advantages
    per_token = unclipped.maximum(clipped)
    bound = -flags.dual_clip * advantages
    above = (advantages < 0) & (per_token > bound) & (flags.dual_clip > 0)
    metrics = {"clip_frac": clipped > unclipped, "clip_frac_dual": above, "ratio_mean": ratio.detach()}
    return LossOutputs(bound.where(above, per_token) if flags.dual_clip else per_token, metrics)
