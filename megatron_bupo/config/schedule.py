"""The flags of steps and phases."""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_bupo.errors import UsageError
from megatron_bupo.flags import Group, flag
from megatron_bupo.policy_spec import INTERNAL_MODULES
from megatron_bupo.rl.schedule import PolicySchedule

AUTO = "auto"


@dataclass(frozen=True)
class ScheduleConfig(Group):
    """steps and phases"""

    train_iters: int = flag("steps; a step is one rollout batch", low=1)
    internal_layer: str | None = flag(
        "phase 1 trains the policy of this layer (layers count from 1); auto: the layer that the entropy flow of the "
        "first rollouts suggests",
        None,
        metavar="L|auto",
    )
    internal_steps: int = flag("steps of phase 1; 0 is plain GRPO", 0, low=0)
    internal_module: str = flag("output that the policy reads", "layer", choices=INTERNAL_MODULES)
    policy_schedule: str | None = flag("phases and their steps: layer:6x30,full", None, metavar="TEXT")
    internal_policy_norm: str = flag("norm before the unembedding", "none", choices=("none", "final"))

    def check(self) -> None:
        super().check()
        layer = self.internal_layer
        if layer is not None and layer != AUTO and not re.fullmatch(r"[1-9]\d{0,5}", layer, re.ASCII):
            raise UsageError(f"--internal-layer {layer}: must be the number of a layer, from 1, or {AUTO}")
        if layer == AUTO and self.internal_steps == 0:
            raise UsageError(f"--internal-layer {AUTO}: chooses the layer of phase 1; give --internal-steps as well")

        self.phases(1 if self.is_auto else self.layer)  # any layer will do to check the flags

    def phases(self, layer: int | None) -> PolicySchedule:
        """The schedule of these flags; `layer` is that of phase 1, which for `auto` is known later.

        Raises:
            UsageError: flags that contradict each other, as in `PolicySchedule.from_flags`.
        """
        return PolicySchedule.from_flags(
            train_iters=self.train_iters,
            internal_layer=layer,
            internal_steps=self.internal_steps,
            internal_module=self.internal_module,
            internal_policy_norm=self.internal_policy_norm,
            policy_schedule=self.policy_schedule,
        )

    @property
    def is_auto(self) -> bool:
        """Whether the layer of phase 1 is still to be chosen."""
        return self.internal_layer == AUTO

    @property
    def layer(self) -> int | None:
        """The layer of phase 1, once it is known."""
        assert not self.is_auto, "the layer is not chosen yet"
        return None if self.internal_layer is None else int(self.internal_layer)
