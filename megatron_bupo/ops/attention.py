"""Core attention over packed sequences by torch: on the CPU, and where transformer-engine's is not used.

On a GPU all sequences are one call of torch's flash attention, where it can run. Elsewhere each sequence is a call of
scaled_dot_product_attention. megatron-core's own DotProductAttention materialises the [S, S] scores.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class PackedSequences(PackedSeqParams):
    """megatron-core's description of the sequences of a micro-batch, the padding one of them, for any attention.

    Attributes:
        lengths: of the sequences, on the host.
        boundaries: int32 [N + 1], where they begin and end, on the device of the tokens.
    """

    lengths: tuple[int, ...] = ()
    boundaries: Tensor | None = None

    @classmethod
    def of(cls, cu_seqlens: Tensor, device: torch.device, *, read_on_device: bool) -> PackedSequences:
        """From int32 [N + 1] on the host; `read_on_device` where megatron-core's fields are read by kernels."""
        boundaries = cu_seqlens.to(device)
        lengths = tuple(cu_seqlens.diff().tolist())
        theirs = boundaries if read_on_device else cu_seqlens
        return cls(
            qkv_format="thd",
            cu_seqlens_q=theirs,
            cu_seqlens_kv=theirs,
            max_seqlen_q=max(lengths),
            max_seqlen_kv=max(lengths),
            lengths=lengths,
            boundaries=boundaries,
        )


class PackedAttention(nn.Module):
    """Causal self-attention over packed sequences; the constructor is the one that megatron-core's spec calls.

    `is_one_call`: whether all sequences are one call of flash attention.
    """

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
        self.is_one_call = has_flash_attention(config.params_dtype, config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
    ) -> Tensor:
        """Attend within each sequence.

        Args:
            query: [T, heads, head_dim]; key, value: [T, kv heads, head_dim] of this tensor-parallel rank.
            packed_seq_params: where sequences begin and end.

        Returns:
            [T, heads * head_dim] in the dtype of `query`.
        """
        assert packed_seq_params is not None and attention_mask is None and attention_bias is None
        # A view of the fused projection's output would keep all of it for the backward.
        value = value.contiguous()
        attend = flash_attention if self.is_one_call else attention_by_sequence
        return attend(query, key, value, packed_seq_params, self.scale).reshape(query.shape[0], -1)


def has_flash_attention(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether torch's flash attention can run in this process: a GPU from Ampere on, 16 bit, fitting heads."""
    fits = dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0 and head_dim <= 256
    if not (fits and torch.cuda.is_available() and torch.backends.cuda.is_flash_attention_available()):
        return False
    return torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 0)


def flash_attention(query: Tensor, key: Tensor, value: Tensor, sequences: PackedSequences, scale: float) -> Tensor:
    """All sequences in one call; shapes as in `attention_by_sequence`."""
    from torch.nn.attention import varlen

    attend: Any = varlen.varlen_attn
    # The kernels take fewer heads in key and value; torch's function has to be told so from 2.12 on.
    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(attend).parameters else {}
    boundaries, longest = sequences.boundaries, sequences.max_seqlen_q
    output: Tensor = attend(
        query,
        key,
        value,
        boundaries,
        boundaries,
        longest,
        longest,
        scale=scale,
        window_size=(-1, 0),  # causal
        **grouped,
    )
    return output


def attention_by_sequence(
    query: Tensor, key: Tensor, value: Tensor, sequences: PackedSequences, scale: float
) -> Tensor:
    """One call a sequence: query [T, heads, head_dim], key, value [T, kv heads, head_dim] -> as query."""
    lengths = list(sequences.lengths)
    outputs = [
        F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            k.transpose(0, 1)[None],
            v.transpose(0, 1)[None],
            is_causal=True,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )[0].transpose(0, 1)
        for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
    ]
    return torch.cat(outputs)
