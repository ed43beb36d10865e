"""The weight table of Llama 2 and 3.x, which the other families share and add to."""

from __future__ import annotations

from megatron_bupo.architectures.layouts import QKV, GateUp, Layout, Mapping, Replicated, RowParallel, VocabParallel

_MEGATRON, _HF = "decoder.layers.{layer}.", "model.layers.{layer}."
_FC1_NORM, _QKV_NORM = "mlp.linear_fc1.layer_norm_weight", "self_attention.linear_qkv.layer_norm_weight"


def in_layer(megatron: str, hf: tuple[str, ...], layout: Layout, te: str | None = None) -> Mapping:
    """A mapping inside one layer, from names relative to it."""
    te_name = None if te is None else _MEGATRON + te
    return Mapping(_MEGATRON + megatron, tuple(_HF + name for name in hf), layout, te_name)


EMBEDDING = Mapping("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), VocabParallel())
FINAL_NORM = Mapping("decoder.final_layernorm.weight", ("model.norm.weight",), Replicated("hidden_size"))
UNEMBEDDING = Mapping("output_layer.weight", ("lm_head.weight",), VocabParallel())
# With tied embeddings a last pipeline stage without the embedding has a copy of it, kept equal by Megatron.
TIED_UNEMBEDDING = Mapping("output_layer.weight", ("model.embed_tokens.weight",), VocabParallel(), export=False)

LLAMA_LAYER: tuple[Mapping, ...] = (
    in_layer("input_layernorm.weight", ("input_layernorm.weight",), Replicated("hidden_size"), te=_QKV_NORM),
    in_layer(
        "self_attention.linear_qkv.weight",
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        QKV(),
    ),
    in_layer("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",), RowParallel("query_size")),
    in_layer("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight",), Replicated("hidden_size"), te=_FC1_NORM),
    in_layer("mlp.linear_fc1.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), GateUp()),
    in_layer("mlp.linear_fc2.weight", ("mlp.down_proj.weight",), RowParallel("ffn_hidden_size")),
)
