"""How far a tensor moved: squared distances in float64 of fp32 values, in one pass and without waiting for a device."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

# Elements that torch takes at a time: their float64 copies are small, and on a CPU stay in its cache.
_CHUNK = 2**20


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
    if value.device.type == "cuda" and importlib.util.find_spec("triton") is not None:
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
