"""The flags of the objective around a loss. In a file of their own, for the command line does without torch."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_bupo.flags import Group, flag


@dataclass(frozen=True)
class ObjectiveFlags(Group):
    """objective"""

    loss_aggregation: str = flag("mean over tokens or responses", "token-mean", choices=("token-mean", "seq-mean"))
    kl_loss_coef: float = flag("weight of the KL to the start model", 0.0, low=0)
    kl_type: str = flag("estimate of the KL", "k3", choices=("k1", "k2", "k3"))
    entropy_coef: float = flag("weight of the entropy bonus", 0.0, low=0)
