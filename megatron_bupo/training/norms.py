"""How far the parameters moved in a step: norms per layer over all ranks, every parameter counted once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from torch import Tensor, nn

from megatron_bupo.architectures.mapping import split_layer
from megatron_bupo.parallel.setup import ParallelState


def _part(name: str) -> str:
    """The part of the network that a parameter belongs to: layer_07, embedding, unembedding or final_norm."""
    layer = split_layer(name)[1]
    if layer is not None:
        return f"layer_{layer + 1:02d}"
    if name.startswith("embedding."):
        return "embedding"
    return "final_norm" if name.startswith("decoder.") else "unembedding"


class ParameterNorms:
    """Norms of parameter changes, measured on the optimizer's fp32 values (the masters in bf16).

    With bf16 and the distributed optimizer a rank holds the masters of its share of the parameters only
    (`sharded_masters`); elsewhere all data-parallel ranks hold the same values and the first one counts.
    """

    def __init__(
        self,
        parameters: Sequence[tuple[str, nn.Parameter]],
        state: ParallelState,
        dtype: torch.dtype,
        *,
        sharded_masters: bool,
    ) -> None:
        self._dtype = dtype
        masters_apart = dtype != torch.float32
        self._values: list[tuple[str, Tensor]] = []
        for name, param in parameters:
            # With tied embeddings a separate last stage has a copy, which megatron-core marks as shared.
            is_copy = getattr(param, "shared", False) and not name.startswith("embedding.")
            counted_elsewhere = state.dp_rank > 0 and not (masters_apart and sharded_masters)
            if is_copy or counted_elsewhere or not param_is_not_tensor_parallel_duplicate(param):
                continue
            value = getattr(param, "main_param", None) if masters_apart else param.detach()
            if value is not None:
                self._values.append((_part(name), value))
        parts: list[set[str]] = [set()] * state.world_size
        dist.all_gather_object(parts, {part for part, _ in self._values})
        self.parts = sorted(set().union(*parts))
        # bf16 holds the starting values exactly: the masters are made from them.
        self._start = [value.to("cpu", dtype, copy=True) for _, value in self._values] if masters_apart else []

    def snapshot(self) -> list[Tensor]:
        """The values now, in main memory."""
        return [value.to("cpu", copy=True) for _, value in self._values]

    def update_norms(self, before: Sequence[Tensor]) -> dict[str, float]:
        """L2 norm of the change since `before` (from `snapshot`), per part; the same on every rank."""
        squares = dict.fromkeys(self.parts, 0.0)
        for (part, value), old in zip(self._values, before, strict=True):
            squares[part] += float((value - old.to(value.device)).double().square().sum())
        total = torch.tensor([squares[part] for part in self.parts], dtype=torch.float64)
        dist.all_reduce(total)
        return dict(zip(self.parts, total.sqrt().tolist(), strict=True))

    def movement(self, before: Sequence[Tensor]) -> dict[str, float]:
        """The metrics of a step that began at `before`: `update_norm/PART`, and in bf16 `master_drift`."""
        drift = self.master_drift()
        norms = {f"update_norm/{part}": norm for part, norm in self.update_norms(before).items()}
        return norms if drift is None else {"master_drift": drift, **norms}

    def master_drift(self) -> float | None:
        """norm(fp32 master - bf16 weight) / norm(master - start): the share of training that rounding hides.

        None in fp32, where there are no masters, and before anything moved.
        """
        if self._dtype == torch.float32:
            return None
        hidden = moved = 0.0
        for (_, master), start in zip(self._values, self._start, strict=True):
            hidden += float((master - master.to(self._dtype).float()).double().square().sum())
            moved += float((master - start.to(master.device).float()).double().square().sum())
        total = torch.tensor([hidden, moved], dtype=torch.float64)
        dist.all_reduce(total)
        return float((total[0] / total[1]).sqrt()) if total[1] > 0 else None
