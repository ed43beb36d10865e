"""Attention over packed sequences, by sequence and in one call, against dense attention in float64.

Flash attention needs a GPU: here its function is replaced by the dense reference, which takes the same arguments, and
the function itself is called with tensors without content.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn.attention import varlen

from megatron_bupo.ops.attention import PackedSequences, attention_by_sequence, flash_attention, has_flash_attention

LENGTHS, HEADS, KV_HEADS, DIM = (5, 1, 9, 3), 6, 2, 8
SCALE = 0.3
TOTAL = sum(LENGTHS)
CPU = torch.device("cpu")


def sequences(device: torch.device = CPU) -> PackedSequences:
    boundaries = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return PackedSequences.of(boundaries, device, read_on_device=False)


def inputs(dtype: torch.dtype, device: torch.device = CPU) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((TOTAL, HEADS, DIM), (TOTAL, KV_HEADS, DIM), (TOTAL, KV_HEADS, DIM))
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


def dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool = False,
) -> Tensor:
    """Flash attention's arguments, worked out in float64 with all scores."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and cu_seq_q.equal(cu_seq_k)
    lengths = cu_seq_q.diff()
    assert max_q == max_k == int(lengths.max())
    segment = torch.arange(len(lengths)).repeat_interleave(lengths)
    place = torch.arange(len(query))
    before, after = window_size
    distance = place[None] - place[:, None]  # from query to key
    allowed = (segment[:, None] == segment[None]) & (distance <= after if after >= 0 else True)
    assert before == -1
    groups = query.shape[1] // key.shape[1]
    keys, values = (tensor.double().repeat_interleave(groups, 1) for tensor in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query.double(), keys) * scale
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values)


def results(attend: Any, dtype: torch.dtype, device: torch.device = CPU) -> list[Tensor]:
    """Output and gradients."""
    tensors = inputs(dtype, device)
    output = attend(*tensors, sequences(device), SCALE)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=device).view(output.shape)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), tensors)]


def reference(query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences, scale: float) -> Tensor:
    boundaries, longest = torch.tensor([0, 5, 6, 15, 18], dtype=torch.int32), 9
    return dense(query, key, value, boundaries, boundaries, longest, longest, scale=scale, window_size=(-1, 0))


def test_by_sequence_equals_dense_attention() -> None:
    for got, expected in zip(
        results(attention_by_sequence, torch.float64), results(reference, torch.float64), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_one_call_is_the_same_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    signature, calls = inspect.signature(varlen.varlen_attn), []

    def recorded(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(signature.bind(*args, **kwargs))
        return dense(*args, **kwargs)

    recorded.__signature__ = signature  # type: ignore[attr-defined]
    monkeypatch.setattr(varlen, "varlen_attn", recorded)
    for got, expected in zip(
        results(flash_attention, torch.float64), results(attention_by_sequence, torch.float64), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert len(calls) == 1, "one call for all sequences"


def test_torch_takes_the_call() -> None:
    """Its own checks of heads and arguments, and the shape that it returns."""
    packed = sequences()
    with FakeTensorMode(allow_non_fake_inputs=True):
        output = flash_attention(*inputs(torch.bfloat16), packed, SCALE)
    assert (output.shape, output.dtype) == ((TOTAL, HEADS, DIM), torch.bfloat16)


def test_it_is_chosen_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        assert not has_flash_attention(torch.bfloat16, 128)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert has_flash_attention(torch.bfloat16, 128)
    for dtype, head_dim in ((torch.float32, 128), (torch.bfloat16, 20), (torch.bfloat16, 512)):
        assert not has_flash_attention(dtype, head_dim)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert not has_flash_attention(torch.bfloat16, 128)


def test_megatron_core_reads_where_it_says() -> None:
    """A meta device stands for the GPU."""
    boundaries = torch.tensor([0, 2, 5], dtype=torch.int32)
    for read_on_device in (True, False):
        packed = PackedSequences.of(boundaries, torch.device("meta"), read_on_device=read_on_device)
        assert (
            packed.cu_seqlens_q.device.type == packed.cu_seqlens_kv.device.type == ("meta" if read_on_device else "cpu")
        )
        assert packed.boundaries is not None and packed.boundaries.device.type == "meta"
        assert (packed.lengths, packed.max_seqlen_q, packed.max_seqlen_kv) == ((2, 3), 3, 3)
