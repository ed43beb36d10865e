"""training.norms.squared_distances as one Triton kernel, which reads every element once.

Composed of torch's operations it moves six times the bytes, with float64 copies among them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024  # elements that a program holds at once
_PROGRAMS = 1024


@triton.jit
def _movement_kernel(  # type: ignore[no-untyped-def]
    value, before, start, squares, size, HAS_BEFORE: tl.constexpr, HAS_START: tl.constexpr, BLOCK: tl.constexpr
):
    """Every program takes each num_programs-th block; its three squares are a row of `squares`."""
    program = tl.program_id(0).to(tl.int64)
    moved = tl.zeros((BLOCK,), tl.float64)
    hidden = tl.zeros((BLOCK,), tl.float64)
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(program * BLOCK, size, tl.num_programs(0) * BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = at < size
        now = tl.load(value + at, mask=inside, other=0.0)
        if HAS_BEFORE:
            step = (now - tl.load(before + at, mask=inside, other=0.0)).to(tl.float64)
            moved += step * step
        if HAS_START:
            lost = (now - now.to(start.dtype.element_ty).to(tl.float32)).to(tl.float64)
            way = (now - tl.load(start + at, mask=inside, other=0.0).to(tl.float32)).to(tl.float64)
            hidden += lost * lost
            total += way * way
    tl.store(squares + 3 * program, tl.sum(moved, 0))
    tl.store(squares + 3 * program + 1, tl.sum(hidden, 0))
    tl.store(squares + 3 * program + 2, tl.sum(total, 0))


def squared_distances_triton(value: Tensor, before: Tensor | None, start: Tensor | None) -> Tensor:
    """See training.norms.squared_distances; the tensors are flat."""
    programs = max(1, min(_PROGRAMS, triton.cdiv(value.numel(), _BLOCK)))
    squares = torch.empty(programs, 3, dtype=torch.float64, device=value.device)
    tensors = (value, value if before is None else before, value if start is None else start, squares)
    has = {"HAS_BEFORE": before is not None, "HAS_START": start is not None}
    _movement_kernel[(programs,)](*tensors, value.numel(), **has, BLOCK=_BLOCK)
    return squares.sum(0)
