"""Core attention on torch's scaled_dot_product_attention, one packed sequence at a time.

Used through the layer spec where transformer-engine is not installed, on the CPU and on the GPU. megatron-core's own
DotProductAttention has no packed path and materialises the [S, S] scores.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor, nn
from torch.nn import functional as F


class PackedSdpaAttention(nn.Module):
    """Causal self-attention over packed sequences; the constructor is the one that megatron-core's spec calls."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **unused: Any,
    ) -> None:
        super().__init__()
        assert attn_mask_type == AttnMaskType.causal and attention_type == "self", (attn_mask_type, attention_type)
        assert config.attention_dropout == 0.0, "the policies are trained without dropout"
        self.scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend within each sequence.

        Args:
            query: [T, heads, head_dim]; key, value: [T, kv heads, head_dim] of this tensor-parallel rank.
            packed_seq_params: its cu_seqlens_q says where sequences begin and end.

        Returns:
            [T, heads * head_dim] in the dtype of `query`.
        """
        assert packed_seq_params is not None and attention_mask is None and attention_bias is None
        # A view of the fused projection's output would keep all of it for the backward.
        value = value.contiguous()
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        outputs = [
            F.scaled_dot_product_attention(
                q.transpose(0, 1)[None],
                k.transpose(0, 1)[None],
                v.transpose(0, 1)[None],
                is_causal=True,
                scale=self.scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )[0].transpose(0, 1)
            for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
        ]
        return torch.cat(outputs).reshape(query.shape[0], -1)
