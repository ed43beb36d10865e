"""Tiny random HuggingFace models for the tests of reading and writing: odd sizes, every parameter random."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

from megatron_bupo.architectures.architecture import Architecture
from megatron_bupo.architectures.families import families, read_architecture
from megatron_bupo.architectures.table import table_for

FAMILIES = tuple(families())


def tiny_model(family: str, tied: bool, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Two layers, hidden 16, 8 query heads on 4 kv heads of width 6 (not 16 / 8), vocabulary 101."""
    names = families()[family]
    config = getattr(transformers, names.config_class)(
        vocab_size=101,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=6,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        dtype=dtype,
    )
    model = getattr(transformers, names.model_class)(config).to(dtype)
    generator = torch.Generator().manual_seed(len(family) + tied)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def hf_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What transformers would save: without the tied copy."""
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def save_tiny(
    folder: Path, family: str, tied: bool, max_shard_size: str = "5GB"
) -> tuple[PreTrainedModel, Architecture]:
    model = tiny_model(family, tied)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model, read_architecture(folder)


def tensors_in_order(family: str, tied: bool, folder: Path) -> dict[str, torch.Tensor]:
    """Those of `save_tiny`, in the order in which a trainer sends them."""
    model, arch = save_tiny(folder, family, tied)
    state = hf_state(model)
    return {name: state[name] for name in table_for(arch).hf_names()}
