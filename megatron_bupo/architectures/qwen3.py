"""The weight table of Qwen3 (dense): Llama's with RMSNorm on queries and keys."""

from __future__ import annotations

from megatron_bupo.architectures.layouts import Mapping, Replicated
from megatron_bupo.architectures.llama import LLAMA_LAYER, in_layer

QWEN3_LAYER: tuple[Mapping, ...] = (
    *LLAMA_LAYER,
    in_layer("self_attention.q_layernorm.weight", ("self_attn.q_norm.weight",), Replicated("head_dim")),
    in_layer("self_attention.k_layernorm.weight", ("self_attn.k_norm.weight",), Replicated("head_dim")),
)
