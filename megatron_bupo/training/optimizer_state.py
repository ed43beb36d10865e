"""Adam's state of each parameter: read from the optimizer for a checkpoint, and restored in any layout.

megatron-core's own checkpoints have one step count for all parameters. Here phases train different parameters, so the
counts differ, and a parameter that never trained has no state: it must have none after a resume either.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from torch import Tensor, nn

from megatron_bupo.architectures.table import WeightTable

MOMENTS = ("exp_avg", "exp_avg_sq")
MASTER = "master"
EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class Slot:
    """One parameter in the optimizer: `value` is the fp32 tensor that steps.

    With the distributed optimizer it is the part [start, end) of the flattened parameter, or nothing on a rank that
    holds none of it.
    """

    inner: torch.optim.Optimizer
    group: dict[str, Any]
    value: Tensor
    start: int
    end: int


def slots(optimizer: Any) -> dict[nn.Parameter, Slot]:
    """The slot of every parameter of which this rank steps something. `optimizer` is megatron-core's."""
    found: dict[nn.Parameter, Slot] = {}
    for part in optimizer.chained_optimizers:
        if part.optimizer is None:
            continue
        group_of = {id(value): group for group in part.optimizer.param_groups for value in group["params"]}
        for param, value in _pairs(part):
            start, end = 0, param.numel()
            if _is_spread(part):
                span = part._get_model_param_range_map(param)["param"]
                start, end = span.start, span.end
            found[param] = Slot(part.optimizer, group_of[id(value)], value, start, end)
    return found


def _is_spread(part: Any) -> bool:
    """Whether this is megatron-core's distributed optimizer, of which each data-parallel rank holds a share."""
    return hasattr(part, "model_fp32_groups")


def _pairs(part: Any) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """(model parameter, tensor that steps) of one of megatron-core's optimizers: distributed, bf16 or fp32."""
    if _is_spread(part):
        kinds = [
            (part.model_fp32_groups, part.shard_fp32_groups),
            (part.model_float16_groups, part.shard_fp32_from_float16_groups),
        ]
    elif hasattr(part, "fp32_from_float16_groups"):
        kinds = [
            (part.float16_groups, part.fp32_from_float16_groups),
            (part.fp32_from_fp32_groups, part.fp32_from_fp32_groups),
        ]
    else:
        groups = [group["params"] for group in part.optimizer.param_groups]
        kinds = [(groups, groups)]
    for models, values in kinds:
        for model_group, value_group in zip(models, values, strict=True):
            yield from zip(model_group, value_group, strict=True)


def _counts_per_parameter(slot: Slot) -> bool:
    """torch's Adam counts steps by parameter, the FusedAdam of transformer-engine and apex by group."""
    return isinstance(slot.inner, torch.optim.Adam)


def _count_group(group: dict[str, Any], count: int) -> None:
    """Set the steps of a group, of whose parameters this is one; PhaseOptimizer cuts groups so that they agree."""
    if count > 0:
        assert group.get("step", count) == count, f"one group with {group['step']} and {count} steps"
        group["step"] = count
    else:
        assert "step" not in group, f"one group with {group['step']} and 0 steps"


def steps_of(name: str, steps: Mapping[str, int]) -> int:
    """How many steps were taken on a parameter, by its local name, from what `OptimizerState.steps` returned."""
    # A pipeline's last stage has a copy of tied embeddings, which another layout may not have had.
    return steps[EMBEDDING if name == "output_layer.weight" and name not in steps else name]


def _gather(param: nn.Parameter, slot: Slot | None, part: Tensor | None, group: dist.ProcessGroup) -> Tensor:
    """A tensor of the parameter's shape from the parts of the data-parallel ranks, bit for bit; a collective."""
    whole = torch.zeros(param.numel(), dtype=torch.float32, device=param.device)
    if slot is not None and part is not None:
        whole[slot.start : slot.end] = part.detach().flatten()
    # Summed as integers: all ranks but one have 0 in each place, and a sum of floats would lose the sign of -0.0.
    dist.all_reduce(whole.view(torch.int32), group=group)
    return whole.view(param.shape)


class OptimizerState:
    """Reads and writes Adam's state of all parameters of this rank.

    Args:
        optimizer: megatron-core's.
        parameters: (global name, parameter) of every chunk of this rank.
        dtype: of the model; below fp32 the masters are kept too.
        dp_group: the ranks among which the distributed optimizer spreads its state.
        table: of the model, for names that do not depend on the layer spec.
    """

    def __init__(
        self,
        optimizer: Any,
        parameters: Sequence[tuple[str, nn.Parameter]],
        dtype: torch.dtype,
        dp_group: dist.ProcessGroup,
        table: WeightTable,
    ) -> None:
        self._parameters, self._slots, self._dp_group = parameters, slots(optimizer), dp_group
        self._local_name = table.local_name
        self._is_spread = any(_is_spread(part) for part in optimizer.chained_optimizers)
        self._kinds = MOMENTS if dtype == torch.float32 else (*MOMENTS, MASTER)

    def steps(self) -> dict[str, int]:
        """How many steps Adam took on each parameter of this rank or of its data-parallel peers, by its local name."""
        mine = {}
        for spelling, param in self._parameters:
            name = self._local_name(spelling)
            slot = self._slots.get(param)
            state = slot.inner.state.get(slot.value, {}) if slot else {}
            if slot is None or not state:
                mine[name] = 0
            else:
                mine[name] = int((state if _counts_per_parameter(slot) else slot.group)["step"])
        peers: list[dict[str, int]] = [{}] * dist.get_world_size(self._dp_group)
        dist.all_gather_object(peers, mine, group=self._dp_group)
        return {name: max(peer[name] for peer in peers) for name in mine}

    def sharded(self, model_state: Mapping[str, Any], *, empty: bool = False) -> dict[str, Any]:
        """The state as megatron-core's sharded tensors, laid out as the model's; zeros where nothing was trained.

        Args:
            model_state: global name -> sharded tensor or factory of the parameter.
            empty: zeros everywhere, to be loaded into.
        """
        state: dict[str, Any] = {}
        for name, param in self._parameters:
            slot = self._slots.get(param)
            held = slot.inner.state.get(slot.value, {}) if slot else {}
            for kind in self._kinds:
                part = slot.value if slot and kind == MASTER else held.get(kind)
                if not empty and self._is_spread:
                    whole = _gather(param, slot, part, self._dp_group)
                elif not empty and part is not None:
                    whole = part.detach()
                else:
                    whole = torch.zeros(param.shape, dtype=torch.float32, device=param.device)
                state[f"{kind}.{name}"] = make_sharded_optimizer_tensor(model_state[name], whole, f"optimizer.{kind}")
        return state

    def restore(self, loaded: Mapping[str, Tensor], steps: Mapping[str, int]) -> None:
        """Put loaded tensors (as from `sharded`) back; a parameter with 0 steps has no state, as before its first."""
        for name, param in self._parameters:
            slot = self._slots.get(param)
            if slot is None:
                continue
            count = steps_of(self._local_name(name), steps)
            parts = {kind: loaded[f"{kind}.{name}"].flatten()[slot.start : slot.end] for kind in self._kinds}
            with torch.no_grad():
                if MASTER in parts:
                    slot.value.copy_(parts[MASTER].view(slot.value.shape))
            slot.inner.state.pop(slot.value, None)
            if not _counts_per_parameter(slot):
                _count_group(slot.group, count)
            if count == 0:
                continue
            state: dict[str, Any] = {kind: parts[kind].clone().view(slot.value.shape) for kind in MOMENTS}
            if _counts_per_parameter(slot):
                state["step"] = torch.tensor(float(count), dtype=torch.float32)
            slot.inner.state[slot.value] = state
