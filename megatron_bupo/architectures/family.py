"""What a file of this folder says about one model family; llama.py, qwen2.py and qwen3.py are the examples.

`families.py` finds every file here that has a `FAMILY`: a new dense decoder is one new file. A family whose config or
network is of another kind subclasses `Family` and overrides `architecture` or `mappings`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron_bupo.architectures.architecture import Architecture
from megatron_bupo.architectures.hf_config import HFConfig
from megatron_bupo.architectures.layouts import Replicated, VocabParallel
from megatron_bupo.architectures.mapping import Mapping

# HuggingFace's names. A folder of a tied model may have the unembedding or not.
HF_EMBEDDING, HF_UNEMBEDDING = "model.embed_tokens.weight", "lm_head.weight"
EMBEDDING = Mapping("embedding.word_embeddings.weight", (HF_EMBEDDING,), VocabParallel())
FINAL_NORM = Mapping("decoder.final_layernorm.weight", ("model.norm.weight",), Replicated("hidden_size"))
UNEMBEDDING = Mapping("output_layer.weight", (HF_UNEMBEDDING,), VocabParallel())
# With tied embeddings a last pipeline stage without the embedding has a copy of it, kept equal by Megatron.
TIED_UNEMBEDDING = Mapping("output_layer.weight", (HF_EMBEDDING,), VocabParallel(), export=False)


@dataclass(frozen=True)
class Family:
    """A dense decoder with RMSNorm, rotary embeddings and a gated SiLU feed-forward.

    Args:
        model_type: config.json's.
        config_class, model_class: the names of transformers' classes.
        layer: the parameters of one layer, with their names under both of Megatron's layer specs.
        defaults: what transformers takes for a key that config.json lacks (its config class's values).
        rope_theta: the default of that.
        refused: keys of config.json that must not be true: the table has no place for their tensors.
        has_windows: transformers reads the keys for sliding windows, which are refused.
        qkv_bias: q, k and v have biases.
        qk_norm: queries and keys go through RMSNorm over head_dim.
    """

    model_type: str
    config_class: str
    model_class: str
    layer: tuple[Mapping, ...]
    defaults: dict[str, Any] = field(hash=False)
    rope_theta: float = 10000.0
    refused: tuple[str, ...] = ("attention_bias", "mlp_bias")
    has_windows: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False

    def mappings(self, tied: bool) -> tuple[Mapping, ...]:
        """Every parameter of the network, those of a layer once, in the order of the network."""
        return (EMBEDDING, *self.layer, FINAL_NORM, TIED_UNEMBEDDING if tied else UNEMBEDDING)

    def architecture(self, config: HFConfig) -> Architecture:
        """The sizes in a config.json, where this family's defaults are filled in.

        Raises:
            UsageError: a key is missing or impossible, or says what the weight table and the model do not cover: such
                a model would load and then compute something else.
        """
        given, config = config.data, config.with_defaults(self.defaults)
        if config.data.get("quantization_config") is not None:
            config.fail("quantization_config is set; give an unquantized checkpoint (fp32, bf16 or fp16)")
        if self.has_windows:
            config.refuse_windows()
        config.refuse_true(*self.refused)
        if config.data["hidden_act"] != "silu":
            config.fail(f"hidden_act is {config.data['hidden_act']!r}; only 'silu' is supported")
        hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
        groups = config.integer("num_key_value_heads", null=heads)
        if heads % groups:
            why = "" if "num_key_value_heads" in given else f" ({self.config_class}'s default: the key is missing)"
            config.fail(f"num_attention_heads {heads} is no multiple of num_key_value_heads {groups}{why}")
        if config.data["head_dim"] is None and hidden % heads:
            config.fail(f"hidden_size {hidden} is no multiple of num_attention_heads {heads}, and there is no head_dim")
        # Where the default is null it means this; where it is a number transformers refuses null.
        divided = hidden // heads if self.defaults["head_dim"] is None else None
        head_dim = config.integer("head_dim", null=divided)
        if head_dim % 2:
            config.fail(f"head_dim is {head_dim}; rotary embeddings need an even one")
        theta, scaling = config.rope(self.rope_theta)
        return Architecture(
            family=self.model_type,
            num_layers=config.integer("num_hidden_layers"),
            hidden_size=hidden,
            ffn_hidden_size=config.integer("intermediate_size"),
            num_attention_heads=heads,
            num_query_groups=groups,
            head_dim=head_dim,
            vocab_size=config.integer("vocab_size"),
            max_position_embeddings=config.integer("max_position_embeddings"),
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=config.positive("rms_norm_eps"),
            tied=config.flag("tie_word_embeddings"),
            qkv_bias=self.qkv_bias,
            qk_norm=self.qk_norm,
        )
