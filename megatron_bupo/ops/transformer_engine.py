"""When transformer-engine's layers are used, and what is known to go wrong with them."""

from __future__ import annotations

import functools

import torch


@functools.cache
def is_available() -> bool:
    """Whether there is a GPU, and a transformer-engine that megatron-core could import (a broken install cannot be)."""
    if not torch.cuda.is_available():
        return False
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return bool(HAVE_TE)


def is_used(dtype: torch.dtype) -> bool:
    """Whether a model of this dtype has its layers: below fp32 only.

    In fp32 its products are in TF32, which is 3e-4 off, and its attention keeps all scores.
    """
    return dtype != torch.float32 and is_available()


def other_cudnn() -> str | None:
    """A line about two versions of cuDNN in this process, or None.

    transformer-engine prefers a system's copy to the one that torch has loaded. Its fused attention then ends in
    CUDNN_STATUS_SUBLIBRARY_LOADING_FAILED, for the parts of one do not fit the other.
    """
    from transformer_engine.pytorch.utils import get_cudnn_version

    theirs, ours = tuple(get_cudnn_version()), _version(torch.backends.cudnn.version())
    if theirs == ours:
        return None
    first, second = (".".join(map(str, version)) for version in (theirs, ours))
    return (
        f"transformer-engine has loaded cuDNN {first} and torch {second}, which fail together: attention is torch's. "
        "For transformer-engine's let CUDNN_HOME and LD_LIBRARY_PATH point to torch's copy (site-packages/nvidia/cudnn)"
    )


def _version(number: int | None) -> tuple[int, int, int]:
    """(9, 19, 0) of 91900, as cuDNN counts since version 9."""
    major, rest = divmod(number or 0, 10000)
    return (major, *divmod(rest, 100))
