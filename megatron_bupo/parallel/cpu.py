"""Everything that megatron-core needs to run without CUDA, here and nowhere else.

megatron-core 0.16 creates buffers on ``torch.cuda.current_device()`` or the literal device "cuda", keeps its random
state in the CUDA generator and recognises parameters by the name of their CUDA tensor type. `install` answers those
four questions for a machine without a GPU; nothing here runs when there is one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

_CPU = torch.device("cpu")
_installed = False


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A tensor factory that builds on the CPU what it was asked to build on "cuda"."""

    def build(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return build


def _tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """``Tensor.type()`` which tells megatron-core's optimizers the CUDA name that they look for."""
    answer = _original_type(self, *args, **kwargs)
    asks_by_name = isinstance(answer, str) and not args and not kwargs
    if asks_by_name and sys._getframe(1).f_globals.get("__name__", "").startswith("megatron.core.optimizer"):
        return answer.replace("torch.", "torch.cuda.", 1)
    return answer


_original_type = torch.Tensor.type


def _get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(new_state)


def install() -> None:
    """Make megatron-core run on the CPU in this process. Calling it again changes nothing."""
    global _installed
    if _installed:
        return
    assert not torch.cuda.is_available(), "the CPU layer is for machines without CUDA"
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.manual_seed = lambda seed: None
    torch.cuda.get_rng_state = _get_rng_state  # type: ignore[assignment]
    torch.zeros = _on_cpu(torch.zeros)  # type: ignore[assignment]
    torch.tensor = _on_cpu(torch.tensor)  # type: ignore[assignment]
    torch.Tensor.type = _tensor_type  # type: ignore[method-assign,assignment]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]

    from megatron.core.tensor_parallel import random as megatron_random

    megatron_random._get_cuda_rng_state = _get_rng_state
    megatron_random._set_cuda_rng_state = _set_rng_state
    _installed = True
