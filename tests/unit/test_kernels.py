"""Which library is named for what was built. Nothing is named that is only installed."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch

from megatron_bupo.model.kernels import kernels_line, library_of
from megatron_bupo.ops.attention import PackedAttention
from megatron_bupo.ops.lean_layers import SwiGLU

TORCH = f"torch {torch.__version__}"


def kind(module: str, base: type = object) -> type:
    return type("Kind", (base,), {"__module__": module})


def test_a_wrapper_of_another_package_is_named_after_what_it_wraps(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"transformer_engine": "2.11.0"}
    monkeypatch.setattr(importlib.metadata, "version", versions.__getitem__)
    theirs = kind("transformer_engine.pytorch.attention")
    assert library_of(kind("megatron.core.extensions.transformer_engine", theirs)) == "transformer-engine 2.11.0"
    for ours in (PackedAttention, SwiGLU, torch.optim.AdamW, kind("megatron.core.optimizer")):
        assert library_of(ours) == TORCH


def test_a_package_that_is_only_on_the_path_has_no_version() -> None:
    assert library_of(kind("apex.optimizers.fused_adam")) == "apex"


def test_one_line_has_every_library_once() -> None:
    kernels = {"attention": "transformer-engine 2.11.0", "SwiGLU": TORCH, "optimizer": "transformer-engine 2.11.0"}
    assert kernels_line(kernels) == f"kernels: transformer-engine 2.11.0 (attention, optimizer), {TORCH} (SwiGLU)"
    assert kernels_line({"attention": TORCH}) == f"kernels: {TORCH} (attention)"
