"""Llama 2 and 3.x."""

from __future__ import annotations

from megatron_bupo.architectures.family import Family
from megatron_bupo.architectures.layouts import QKV, GateUp, Replicated, RowParallel
from megatron_bupo.architectures.mapping import in_layer

_FC1_NORM, _QKV_NORM = "mlp.linear_fc1.layer_norm_weight", "self_attention.linear_qkv.layer_norm_weight"

FAMILY = Family(
    model_type="llama",
    config_class="LlamaConfig",
    model_class="LlamaForCausalLM",
    layer=(
        in_layer("input_layernorm.weight", ("input_layernorm.weight",), Replicated("hidden_size"), te=_QKV_NORM),
        in_layer(
            "self_attention.linear_qkv.weight",
            ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
            QKV(),
        ),
        in_layer("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",), RowParallel("query_size")),
        in_layer(
            "pre_mlp_layernorm.weight", ("post_attention_layernorm.weight",), Replicated("hidden_size"), te=_FC1_NORM
        ),
        in_layer("mlp.linear_fc1.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), GateUp()),
        in_layer("mlp.linear_fc2.weight", ("mlp.down_proj.weight",), RowParallel("ffn_hidden_size")),
    ),
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,  # num_attention_heads
        "head_dim": None,  # hidden_size / num_attention_heads
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
)
