"""Whose kernels compute a model that was built: one line at the start of a run, and an entry of run.json.

Read from the modules that are there, so that a package that is installed and not used is not named.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.transformer.identity_op import IdentityOp

from megatron_bupo.model.build import HiddenStateModel
from megatron_bupo.ops import torch_passes
from megatron_bupo.ops.attention import PackedAttention
from megatron_bupo.ops.tiles import passes_for

# Packages with kernels of their own -> their names in texts; everything else is torch's.
_LIBRARIES = {"transformer_engine": "transformer-engine", "apex": "apex", "triton": "triton"}


def library_of(kind: type) -> str:
    """The library, with its version, whose class `kind` is or is derived from: 'transformer-engine 2.11.0'."""
    roots = (base.__module__.partition(".")[0] for base in kind.__mro__)
    return _versioned(next((root for root in roots if root in _LIBRARIES), "torch"))


def kernels_of(model: HiddenStateModel, device: torch.device) -> dict[str, str]:
    """Part of the computation -> the library that computes it, of a stage of a model with at least one layer."""
    layer, config = model.decoder.layers[0], model.config
    # transformer-engine has the norm in the linear layer behind it.
    norm: Any = layer.pre_mlp_layernorm
    in_linear = isinstance(norm, IdentityOp)
    in_torch = passes_for(device, torch.float32) is torch_passes
    attention = layer.self_attention.core_attention
    flash = ", one flash call" if isinstance(attention, PackedAttention) and attention.is_one_call else ""
    return {
        "attention": library_of(type(attention)) + flash,
        "norms": library_of(type(layer.mlp.linear_fc1 if in_linear else norm)),
        "rope": _versioned("transformer_engine" if config.apply_rope_fusion else "torch"),
        "SwiGLU": library_of(type(layer.mlp.activation_func)),
        "unembedding": _versioned("torch" if in_torch else "triton"),
    }


def kernels_line(kernels: Mapping[str, str]) -> str:
    """For people: 'kernels: transformer-engine 2.11.0 (attention, norms), torch 2.11.0 (SwiGLU)'."""
    parts: dict[str, list[str]] = {}
    for part, library in kernels.items():
        parts.setdefault(library, []).append(part)
    return "kernels: " + ", ".join(f"{library} ({', '.join(names)})" for library, names in parts.items())


def _versioned(package: str) -> str:
    if package == "torch":
        return f"torch {torch.__version__}"
    try:
        return f"{_LIBRARIES[package]} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:  # put on the path, not installed
        return _LIBRARIES[package]
