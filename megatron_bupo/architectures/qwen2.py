"""The weight table of Qwen2 and Qwen2.5: Llama's with a bias on q, k and v."""

from __future__ import annotations

from megatron_bupo.architectures.layouts import QKV, Mapping
from megatron_bupo.architectures.llama import LLAMA_LAYER, in_layer

QWEN2_LAYER: tuple[Mapping, ...] = (
    *LLAMA_LAYER,
    in_layer(
        "self_attention.linear_qkv.bias",
        ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
        QKV(bias=True),
    ),
)
