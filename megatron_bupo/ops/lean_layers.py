"""RMSNorm and SwiGLU of the local layer spec, which keep for the backward only what cannot be cheaply made again.

torch's own, composed of single operations on the CPU, keep two and four times as much: a third of all activations of a
layer. transformer-engine brings its own and needs none of this.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class _RMSNorm(torch.autograd.Function):
    """x / rms(x) * weight over the last dimension; fp32 inside; keeps x and 1 / rms(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        rstd = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        return (wide * rstd).to(x.dtype).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        normed = x.float() * rstd
        grad_wide = grad.float()
        grad_weight = (grad_wide * normed).flatten(0, -2).sum(0)
        scaled = grad_wide * weight.float()
        shrink = (scaled * normed).mean(-1, keepdim=True)
        grad_x = scaled.sub_(normed.mul_(shrink)).mul_(rstd)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


class RMSNorm(nn.Module):
    """RMSNorm with the constructor that megatron-core calls, also under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__()
        device = torch.device("cpu") if config.use_cpu_initialization else torch.device("cuda")
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        # megatron-core sums the gradients of marked parameters over the tensor-parallel ranks, whose tokens differ.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., hidden_size], in the dtype of x."""
        x = x.contiguous()  # kept for the backward: a part of the fused projection's output would keep all of it
        if x.is_cuda:  # torch has one kernel for it there
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return _RMSNorm.apply(x, self.weight, self.eps)


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up of x = [gate, up]; keeps x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        grad_x = torch.empty_like(x)
        grad_gate, grad_up = grad_x.chunk(2, dim=-1)
        torch.mul(F.silu(gate), grad, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return grad_x


class SwiGLU(MegatronModule):
    """The activation of the local spec's MLP: [..., 2 * F] -> [..., F]."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config=config)

    def forward(self, x: Tensor) -> Tensor:
        """Gate the second half of the last dimension with the first."""
        return _SwiGLU.apply(x)
