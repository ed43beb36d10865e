"""How far the parameters moved in a step: norms per layer over all ranks, every parameter counted once.

Everything stays on the device, and is waited for once a step. What it costs there, for each parameter and shared by the
data-parallel ranks: 4 bytes for the value before the step, from its first optimizer step to its last; in bf16 2 more,
always, for the value that the run started from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from torch import Tensor, nn

from megatron_bupo.architectures.mapping import split_layer
from megatron_bupo.ops.tiles import has_triton
from megatron_bupo.parallel.setup import ParallelState
from megatron_bupo.policy_spec import PolicySpec
from megatron_bupo.training.optimizer import trains

# Elements that torch takes at a time: their float64 copies are small, and on a CPU stay in its cache.
_CHUNK = 2**20


def _part(name: str) -> str:
    """The part of the network that a parameter belongs to: layer_07, embedding, unembedding or final_norm."""
    layer = split_layer(name)[1]
    if layer is not None:
        return f"layer_{layer + 1:02d}"
    if name.startswith("embedding."):
        return "embedding"
    return "final_norm" if name.startswith("decoder.") else "unembedding"


@dataclass
class _Counted:
    """A parameter that this rank counts: its fp32 value (a share of it, in several ranks), its value at the start."""

    part: str
    trained_by: frozenset[PolicySpec]
    value: Tensor
    start: Tensor | None
    before: Tensor | None = None


class ParameterNorms:
    """Norms of parameter changes, measured on the optimizer's fp32 values (the masters in bf16).

    With bf16 and the distributed optimizer a rank holds the masters of its share of the parameters only
    (`sharded_masters`); elsewhere all data-parallel ranks hold the same values and share the counting.

    Args:
        specs: the policies of the whole schedule.
        interval: measure every so many steps; 0: never, and nothing is kept.
    """

    def __init__(
        self,
        parameters: Sequence[tuple[str, nn.Parameter]],
        specs: Sequence[PolicySpec],
        state: ParallelState,
        dtype: torch.dtype,
        *,
        sharded_masters: bool,
        interval: int,
    ) -> None:
        self._interval, self._is_due, self._group = interval, False, state.host_group
        has_masters = dtype != torch.float32
        mine = parameters if has_masters and sharded_masters else _share(parameters, state)
        self._counted: list[_Counted] = []
        for name, param in mine if interval else ():
            # With tied embeddings a separate last stage has a copy, which megatron-core marks as shared.
            is_copy = getattr(param, "shared", False) and not name.startswith("embedding.")
            value = getattr(param, "main_param", None) if has_masters else param.detach()
            if value is not None and not is_copy and param_is_not_tensor_parallel_duplicate(param):
                # bf16 holds the starting values exactly: the masters are made from them.
                start = value.to(dtype) if has_masters else None
                trained_by = frozenset(spec for spec in specs if trains(spec, name))
                self._counted.append(_Counted(_part(name), trained_by, value, start))
        parts: list[set[str]] = [set()] * state.world_size
        dist.all_gather_object(parts, {one.part for one in self._counted}, group=state.host_group)
        self.parts = sorted(set().union(*parts))

    def begin(self, step: int) -> None:
        """Say which step comes: it is measured, or nothing of it is kept."""
        self._is_due = self._interval > 0 and step % self._interval == 0

    def keep(self, spec: PolicySpec) -> None:
        """Before an optimizer step on `spec`; before the first one of a step the values that will change are kept."""
        if not self._is_due or any(one.before is not None for one in self._counted):
            return
        for one in self._counted:
            if spec in one.trained_by:
                one.before = one.value.clone(memory_format=torch.contiguous_format)

    def movement(self) -> dict[str, float]:
        """The metrics of the step: `update_norm/PART`, the L2 norm of its change, and in bf16 `master_drift`.

        That is norm(fp32 master - bf16 weight) / norm(master - start): the share of training that rounding hides; it
        is missing before anything moved. The same numbers on every rank; nothing where the step is not measured.
        Collective.
        """
        if not self._is_due:
            return {}
        # Waits for the device once, and the sums' order is always the same.
        measured = [squared_distances(one.value, one.before, one.start) for one in self._counted]
        squares = torch.stack(measured).cpu() if measured else torch.zeros(0, 3, dtype=torch.float64)
        sums = torch.zeros(len(self.parts) + 2, dtype=torch.float64)
        for one, (moved, *drift) in zip(self._counted, squares, strict=True):
            sums[self.parts.index(one.part)] += moved
            sums[-2:] += torch.stack(drift)
            one.before = None
        dist.all_reduce(sums, group=self._group)
        *norms, hidden, total = sums.sqrt().tolist()
        drift_of_run = {"master_drift": hidden / total} if total > 0 else {}
        return drift_of_run | {f"update_norm/{part}": norm for part, norm in zip(self.parts, norms, strict=True)}


def _share(parameters: Sequence[tuple[str, nn.Parameter]], state: ParallelState) -> Iterator[tuple[str, nn.Parameter]]:
    """This rank's share of what all data-parallel ranks hold alike, of nearly the same size on each."""
    sizes = [0] * state.dp_size
    for name, param in parameters:
        rank = sizes.index(min(sizes))
        sizes[rank] += param.numel()
        if rank == state.dp_rank:
            yield name, param


def squared_distances(value: Tensor, before: Tensor | None, start: Tensor | None) -> Tensor:
    """Squared L2 norms of value - before, of value - `value` rounded to the dtype of `start`, and of value - start.

    Differences are in fp32, as the tensors are; squares and sums in float64. The same tensors give the same bits.

    Args:
        value: fp32, contiguous.
        before: fp32, contiguous, of the same size; None: the first number is 0.
        start: of a lower precision, contiguous, of the same size; None: the second and third are 0.

    Returns:
        float64 [3] on the device of `value`; a GPU is not waited for.
    """
    assert value.dtype == torch.float32 and value.is_contiguous(), (value.dtype, value.stride())
    now = value.detach().view(-1)
    then = None if before is None else before.view(-1)
    origin = None if start is None else start.view(-1)
    if has_triton(value.device):
        from megatron_bupo.ops.triton_movement import squared_distances_triton

        return squared_distances_triton(now, then, origin)
    sums = torch.zeros(3, dtype=torch.float64, device=value.device)
    for first in range(0, len(now), _CHUNK):
        chunk = slice(first, first + _CHUNK)
        if then is not None:
            sums[0] += (now[chunk] - then[chunk]).double().square_().sum()
        if origin is not None:
            sums[1] += (now[chunk] - now[chunk].to(origin.dtype)).double().square_().sum()
            sums[2] += (now[chunk] - origin[chunk]).double().square_().sum()
    return sums
