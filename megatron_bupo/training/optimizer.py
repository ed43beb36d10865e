"""One optimizer for both phases: parameter groups cut where the schedule's policies begin and end.

Where a run goes on with another schedule they are also cut where parameters took different numbers of steps, which a
FusedAdam counts by group.

A policy trains the embedding, the unembedding and every layer that its distribution depends on. The other parameters
have no gradient and are skipped, as torch skips them: values, moments and step count stay exactly as they were.
(Megatron's buffers hold zeros for them, with which Adam would still decay weights and moments.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import ParamKey, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamPredicate
from torch import nn

from megatron_bupo.architectures.mapping import split_layer
from megatron_bupo.config.train import OptimizerConfig
from megatron_bupo.policy_spec import PolicySpec

_AFTER_ATTENTION = ("decoder.layers.{layer}.pre_mlp_layernorm.", "decoder.layers.{layer}.mlp.")


def trains(spec: PolicySpec, name: str) -> bool:
    """Whether the gradient of the policy `spec` reaches a parameter.

    Args:
        name: the parameter's name in a GPTModel, with the global index of its layer (from 0).

    >>> trains(PolicySpec.parse("attn:2"), "decoder.layers.1.mlp.linear_fc1.weight")
    False
    """
    if spec.is_full:
        return True
    if name.startswith("decoder.final_layernorm."):
        return spec.norm
    template, layer = split_layer(name)
    if layer is None:
        return True  # embedding and unembedding
    assert spec.layer is not None
    if layer + 1 == spec.layer and spec.module == "attn":
        return not template.startswith(_AFTER_ATTENTION)
    return layer < spec.layer


class PhaseOptimizer:
    """Megatron's optimizer, plain or distributed, of which only the groups that a policy trains take a step.

    `megatron` is the wrapped optimizer.

    Args:
        model: the wrapped model chunks of this rank.
        parameters: (global name, parameter) of every chunk.
        specs: the policies of the whole schedule.
        steps: of a run that goes on, how many steps were taken on a parameter of this name.
    """

    def __init__(
        self,
        config: OptimizerConfig,
        model: Sequence[DistributedDataParallel],
        parameters: Iterable[tuple[str, nn.Parameter]],
        specs: Sequence[PolicySpec],
        dtype: torch.dtype,
        steps: Callable[[str], int] = lambda name: 0,
    ) -> None:
        self._weight_decay = config.weight_decay
        # A group is the set of policies that train it, as a bit mask, and its steps so far: the same on every rank.
        groups = {
            param: (sum(1 << bit for bit, spec in enumerate(specs) if trains(spec, name)), steps(name))
            for name, param in parameters
        }
        self._bits = {spec: 1 << bit for bit, spec in enumerate(specs)}
        overrides: dict[ParamKey, Any] = {
            ParamKey(predicate=ParamPredicate(f"group {group}", lambda param, group=group: groups[param] == group)): {
                "trained_by": group[0],
                "steps_before": group[1],
            }
            for group in sorted(set(groups.values()))
        }
        # Given overrides, Megatron drops its default: no weight decay on norms and biases.
        overrides[ParamKey(predicate=ParamPredicate("vector", lambda param: param.dim() == 1))] = {"wd_mult": 0.0}
        self.megatron = get_megatron_optimizer(
            MegatronOptimizerConfig(
                optimizer="adam",
                lr=config.lr,
                weight_decay=config.weight_decay,
                adam_beta1=config.adam_beta1,
                adam_beta2=config.adam_beta2,
                adam_eps=config.adam_eps,
                clip_grad=config.clip_grad,
                bf16=dtype == torch.bfloat16,
                params_dtype=dtype,
                use_distributed_optimizer=config.use_distributed_optimizer,
            ),
            list(model),
            config_overrides=overrides,
        )

    @contextmanager
    def _only(self, spec: PolicySpec) -> Iterator[list[dict[str, Any]]]:
        """The groups that `spec` trains; meanwhile the optimizer has only those."""
        inner = [chained.optimizer for chained in self.megatron.chained_optimizers if chained.optimizer is not None]
        every_group = [optimizer.param_groups for optimizer in inner]
        bit = self._bits[spec]
        try:
            for optimizer in inner:
                optimizer.param_groups = [group for group in optimizer.param_groups if group["trained_by"] & bit]
            yield [group for optimizer in inner for group in optimizer.param_groups]
        finally:
            for optimizer, groups in zip(inner, every_group, strict=True):
                optimizer.param_groups = groups

    @property
    def kind(self) -> type:
        """The class of the optimizer inside Megatron's: torch's AdamW or a FusedAdam."""
        return type(next(part.optimizer for part in self.megatron.chained_optimizers if part.optimizer is not None))

    def zero_grad(self) -> None:
        self.megatron.zero_grad()

    def step(self, spec: PolicySpec, lr: float) -> float:
        """Clip and apply the gradients of what `spec` trains.

        Returns:
            The gradient's L2 norm before clipping, over the parameters that train, tied weights once.

        Raises:
            FloatingPointError: the norm is not finite; no parameter has been touched.
        """
        with self._only(spec) as groups:
            for group in groups:
                group["lr"] = lr
                group["weight_decay"] = self._weight_decay * group["wd_mult"]
            self.megatron.prepare_grads()
            norm = float(self.megatron.get_grad_norm())
            if not math.isfinite(norm):
                raise FloatingPointError(f"the gradient norm of policy '{spec}' is {norm}: no step was taken")
            self.megatron.step()
        return norm
