"""The numbers of a network, as the weight table, the model builder and the checks of the command line share them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_bupo.config.train import ParallelConfig
from megatron_bupo.errors import UsageError

LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class Architecture:
    """One dense decoder of the Llama family, in the field's terms.

    `vocab_size` is that of the checkpoint, without padding. `rope_scaling` is None or the four numbers of llama3's
    scaling, LLAMA3_KEYS. `tied`: the unembedding is the embedding. `qkv_bias`: biases on q, k and v alone. `qk_norm`:
    RMSNorm over head_dim on queries and keys.
    """

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rope_theta: float
    rope_scaling: dict[str, float] | None = field(hash=False)
    norm_eps: float
    tied: bool
    qkv_bias: bool
    qk_norm: bool

    @property
    def query_size(self) -> int:
        """Width of all query heads together: rows of q_proj, columns of o_proj."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of k_proj and of v_proj."""
        return self.num_query_groups * self.head_dim

    def padded_vocab_size(self, tp: int) -> int:
        """The vocabulary padded to the next multiple of `tp` and no further: fewer than `tp` rows are padding."""
        return math.ceil(self.vocab_size / tp) * tp

    def check_parallel(self, tp: int, pp: int, vpp: int = 1) -> None:
        """Raise UsageError unless the model splits over `tp` ranks, and over `pp` stages of `vpp` virtual stages."""
        for name, size in (
            ("attention heads", self.num_attention_heads),
            # Megatron would replicate kv heads where tp is larger; the weight table has no such layout.
            ("kv heads (num_key_value_heads)", self.num_query_groups),
            ("feed-forward columns (intermediate_size)", self.ffn_hidden_size),
        ):
            if size % tp:
                raise UsageError(
                    f"--tensor-model-parallel-size {tp} does not divide the model's {size} {name}; "
                    f"give a divisor of {size}"
                )
        if self.num_layers % (pp * vpp):
            raise UsageError(
                f"the model's {self.num_layers} layers do not divide into {pp} pipeline stages x {vpp} virtual stages; "
                f"--pipeline-model-parallel-size x --num-virtual-stages-per-pipeline-rank must divide {self.num_layers}"
            )

    def rope_inv_freq(self) -> Tensor:
        """Inverse frequencies of the rotary embedding, fp32 [head_dim / 2], radians per position.

        With `rope_scaling` those of llama3 (the formula of transformers' ROPE_INIT_FUNCTIONS["llama3"]): long
        wavelengths are divided by the factor, short ones kept, those between interpolated.
        """
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.int64).to(torch.float32) / self.head_dim
        inv_freq = 1.0 / (self.rope_theta**exponents)
        if self.rope_scaling is None:
            return inv_freq
        factor, low, high, original = (self.rope_scaling[key] for key in LLAMA3_KEYS)
        wavelength = 2 * math.pi / inv_freq
        smooth = (original / wavelength - low) / (high - low)
        between = (1 - smooth) * inv_freq / factor + smooth * inv_freq
        scaled = torch.where(wavelength > original / low, inv_freq / factor, between)
        return torch.where(wavelength < original / high, inv_freq, scaled)

    def transformer_config_kwargs(self) -> dict[str, Any]:
        """The arguments of megatron.core's TransformerConfig that follow from the architecture alone."""
        return {
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "ffn_hidden_size": self.ffn_hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "num_query_groups": self.num_query_groups,
            "kv_channels": self.head_dim,
            "normalization": "RMSNorm",
            "layernorm_epsilon": self.norm_eps,
            "gated_linear_unit": True,
            "activation_func": F.silu,
            "add_bias_linear": False,
            "add_qkv_bias": self.qkv_bias,
            "qk_layernorm": self.qk_norm,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
        }


def check_layout(arch: Architecture, parallel: ParallelConfig) -> None:
    """Raise UsageError unless the model splits as the flags say, and recompute divides each stage's layers."""
    stages = parallel.pipeline_model_parallel_size * parallel.num_virtual_stages_per_pipeline_rank
    arch.check_parallel(
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.num_virtual_stages_per_pipeline_rank,
    )
    piece, layers = parallel.recompute_num_layers, arch.num_layers // stages
    if parallel.recompute_method == "uniform" and piece is not None and layers % piece:
        raise UsageError(
            f"--recompute-num-layers {piece} does not divide the {layers} layers of a stage; give a divisor of {layers}"
        )
