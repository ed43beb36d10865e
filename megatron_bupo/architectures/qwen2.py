"""Qwen2 and Qwen2.5: Llama's network with a bias on q, k and v."""

from __future__ import annotations

from megatron_bupo.architectures import llama
from megatron_bupo.architectures.family import Family
from megatron_bupo.architectures.layouts import QKV
from megatron_bupo.architectures.mapping import in_layer

FAMILY = Family(
    model_type="qwen2",
    config_class="Qwen2Config",
    model_class="Qwen2ForCausalLM",
    layer=(
        *llama.FAMILY.layer,
        in_layer(
            "self_attention.linear_qkv.bias",
            ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
            QKV(bias=True),
        ),
    ),
    defaults={
        **llama.FAMILY.defaults,
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    # Not attention_bias: transformers' Qwen2 does not read it, q, k and v have a bias whatever it says.
    refused=("mlp_bias",),
    has_windows=True,
    qkv_bias=True,
)
