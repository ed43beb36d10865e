"""Qwen3 (dense): Llama's network with RMSNorm on queries and keys."""

from __future__ import annotations

from megatron_bupo.architectures import llama, qwen2
from megatron_bupo.architectures.family import Family
from megatron_bupo.architectures.layouts import Replicated
from megatron_bupo.architectures.mapping import in_layer

FAMILY = Family(
    model_type="qwen3",
    config_class="Qwen3Config",
    model_class="Qwen3ForCausalLM",
    layer=(
        *llama.FAMILY.layer,
        in_layer("self_attention.q_layernorm.weight", ("self_attn.q_norm.weight",), Replicated("head_dim")),
        in_layer("self_attention.k_layernorm.weight", ("self_attn.k_norm.weight",), Replicated("head_dim")),
    ),
    defaults={**qwen2.FAMILY.defaults, "head_dim": 128},
    has_windows=True,
    qk_norm=True,
)
