"""Everything that megatron-core needs to run without CUDA, here and nowhere else.

megatron-core 0.16 creates buffers on ``torch.cuda.current_device()`` or the literal device "cuda", keeps its random
state in the CUDA generator and recognises parameters by the name of their CUDA tensor type. `install` replaces these
four things on a machine without a GPU. On a machine with one nothing here runs.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_CPU = torch.device("cpu")
_GPU_PACKAGES = ("transformer_engine", "apex", "amp_C", "flash_attn")
_installed = False


class _TorchOnCpu:
    """The torch module as some of megatron-core's modules see it: factories that take "cuda" for the CPU.

    Only those modules: replaced in torch itself, the factories would be missing from the set by which
    ``with torch.device("meta")`` knows them, and transformers would load models with wrong weights.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(*args, **_without_cuda(kwargs))

    @staticmethod
    def tensor(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.tensor(*args, **_without_cuda(kwargs))


def _without_cuda(kwargs: dict[str, Any]) -> dict[str, Any]:
    return kwargs | {"device": _CPU} if kwargs.get("device") == "cuda" else kwargs


def _tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """``Tensor.type()`` that returns the name of the CUDA type to megatron-core's optimizers, which compare with it."""
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


def give_freed_memory_back() -> None:
    """Return free memory inside glibc's heap to the system: a step's freed activations leave gigabytes of it.

    (Allocating large blocks outside the heap, by mallopt, took less memory still and a third more time.)
    """
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other systems' libraries have none
    if malloc_trim is not None:
        malloc_trim(0)


@contextmanager
def without_gpu_packages() -> Iterator[None]:
    """For the import of megatron-core: torch.compile returns functions as they are, packages for GPUs are not there.

    megatron-core decorates its fused functions with the one; the model uses none of them (model/build.py), and the
    decorator imports the whole compiler, which takes longer than megatron-core itself. Of the others it takes optimizer
    and norms as soon as they can be imported, which fail without a GPU.
    """
    compiler, modules = torch.compile, dict(sys.modules)
    torch.compile = lambda function: function  # type: ignore[assignment]
    sys.modules.update(dict.fromkeys(_GPU_PACKAGES))  # type: ignore[arg-type] # None: there is no such module
    try:
        yield
    finally:
        torch.compile = compiler
        for name in _GPU_PACKAGES:
            del sys.modules[name]
        sys.modules.update({name: module for name, module in modules.items() if name in _GPU_PACKAGES})


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
    torch.Tensor.type = _tensor_type  # type: ignore[method-assign,assignment]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]

    from megatron.core import utils
    from megatron.core.optimizer import clip_grads, optimizer
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.tensor_parallel import random as megatron_random

    for module in (clip_grads, optimizer, schedules, utils):
        module.torch = _TorchOnCpu()
    megatron_random._get_cuda_rng_state = _get_rng_state
    megatron_random._set_cuda_rng_state = _set_rng_state
    _installed = True
