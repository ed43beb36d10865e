"""How HuggingFace tensors lie in Megatron's parameters under tensor parallelism: one invertible operation per layout.

`shard` reads from the HF tensors exactly the slices that one tensor-parallel rank holds; `merge` gives back, from the
ranks' shards, the very tensors that went in. Plain tensors only: nothing here needs Megatron or a process group.
Letters: H hidden, F feed-forward, V vocabulary, N query heads, G query groups (kv heads), D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_bupo.architectures.architecture import Architecture

Shape = tuple[int, ...]


class SliceLike(Protocol):
    """A tensor, or what safetensors' get_slice returns: reads the part [a:b] or [:, a:b] and no more."""

    def __getitem__(self, index: Any, /) -> Tensor: ...


class Layout(Protocol):
    """What every operation below can do."""

    def hf_shapes(self, arch: Architecture) -> tuple[Shape, ...]:
        """The shapes of the whole HF tensors, in the order of `Mapping.hf`."""
        ...

    def shard(self, slices: Sequence[SliceLike], arch: Architecture, tp_rank: int, tp_size: int) -> Tensor:
        """The parameter of one tensor-parallel rank, in the dtype of the HF tensors."""
        ...

    def merge(self, shards: Sequence[Tensor], arch: Architecture) -> tuple[Tensor, ...]:
        """The whole HF tensors from the shards of all ranks in order; without padding, dtype kept."""
        ...


@dataclass(frozen=True)
class Replicated:
    """A vector that every rank holds whole; `size` names its length in the Architecture."""

    size: str

    def hf_shapes(self, arch: Architecture) -> tuple[Shape, ...]:
        return ((getattr(arch, self.size),),)

    def shard(self, slices: Sequence[SliceLike], arch: Architecture, tp_rank: int, tp_size: int) -> Tensor:
        (vector,) = slices
        return vector[:]

    def merge(self, shards: Sequence[Tensor], arch: Architecture) -> tuple[Tensor, ...]:
        return (shards[0],)


@dataclass(frozen=True)
class VocabParallel:
    """[V, H] split on the vocabulary, padded with zero rows to a multiple of the ranks.

    With V = 101 on two ranks: rank 0 has the rows [0, 51), rank 1 [51, 101) and one row of zeros.
    """

    def hf_shapes(self, arch: Architecture) -> tuple[Shape, ...]:
        return ((arch.vocab_size, arch.hidden_size),)

    def shard(self, slices: Sequence[SliceLike], arch: Architecture, tp_rank: int, tp_size: int) -> Tensor:
        (table,) = slices
        rows = arch.padded_vocab_size(tp_size) // tp_size
        start, stop = (min(row, arch.vocab_size) for row in (tp_rank * rows, (tp_rank + 1) * rows))
        real = table[start:stop]
        return real if len(real) == rows else torch.cat([real, real.new_zeros(rows - len(real), *real.shape[1:])])

    def merge(self, shards: Sequence[Tensor], arch: Architecture) -> tuple[Tensor, ...]:
        return (_joined(shards)[: arch.vocab_size],)


@dataclass(frozen=True)
class RowParallel:
    """[H, columns] split on the columns, the input of the product; `columns` names their number."""

    columns: str

    def hf_shapes(self, arch: Architecture) -> tuple[Shape, ...]:
        return ((arch.hidden_size, getattr(arch, self.columns)),)

    def shard(self, slices: Sequence[SliceLike], arch: Architecture, tp_rank: int, tp_size: int) -> Tensor:
        (matrix,) = slices
        start, stop = _part(getattr(arch, self.columns), tp_rank, tp_size)
        return matrix[:, start:stop]

    def merge(self, shards: Sequence[Tensor], arch: Architecture) -> tuple[Tensor, ...]:
        return (_joined(shards, dim=1),)


@dataclass(frozen=True)
class QKV:
    """q [N D, H], k and v [G D, H] as one matrix, or their biases [N D], [G D] as one vector.

    Megatron interleaves them by query group, and a rank has whole groups. With N = 4, G = 2: q0 q1 k0 v0 | q2 q3 k1 v1.
    """

    bias: bool = False

    def hf_shapes(self, arch: Architecture) -> tuple[Shape, ...]:
        tail = () if self.bias else (arch.hidden_size,)
        return ((arch.query_size, *tail), (arch.kv_size, *tail), (arch.kv_size, *tail))

    def shard(self, slices: Sequence[SliceLike], arch: Architecture, tp_rank: int, tp_size: int) -> Tensor:
        groups = arch.num_query_groups // tp_size
        parts = []
        for whole, (rows, *tail) in zip(slices, self.hf_shapes(arch), strict=True):
            start, stop = _part(rows, tp_rank, tp_size)
            parts.append(whole[start:stop].reshape(groups, rows // arch.num_query_groups, *tail))
        return torch.cat(parts, dim=1).flatten(0, 1)

    def merge(self, shards: Sequence[Tensor], arch: Architecture) -> tuple[Tensor, ...]:
        packed = _joined(shards)
        rows = [shape[0] // arch.num_query_groups for shape in self.hf_shapes(arch)]
        by_group = packed.view(arch.num_query_groups, sum(rows), *packed.shape[1:])
        return tuple(part.flatten(0, 1) for part in by_group.split(rows, dim=1))


@dataclass(frozen=True)
class GateUp:
    """gate and up, each [F, H], as one matrix: every rank has its part of the gate, then its part of up."""

    def hf_shapes(self, arch: Architecture) -> tuple[Shape, ...]:
        return ((arch.ffn_hidden_size, arch.hidden_size),) * 2

    def shard(self, slices: Sequence[SliceLike], arch: Architecture, tp_rank: int, tp_size: int) -> Tensor:
        gate, up = slices
        start, stop = _part(arch.ffn_hidden_size, tp_rank, tp_size)
        return torch.cat([gate[start:stop], up[start:stop]])

    def merge(self, shards: Sequence[Tensor], arch: Architecture) -> tuple[Tensor, ...]:
        gates, ups = zip(*(shard.chunk(2) for shard in shards), strict=True)
        return _joined(gates), _joined(ups)


def _joined(shards: Sequence[Tensor], dim: int = 0) -> Tensor:
    """All shards as one tensor; a single one as it is, without a copy."""
    return shards[0] if len(shards) == 1 else torch.cat(list(shards), dim=dim)


def _part(size: int, tp_rank: int, tp_size: int) -> tuple[int, int]:
    assert size % tp_size == 0, f"{size} does not split over {tp_size} ranks; Architecture.check_parallel was not asked"
    return tp_rank * size // tp_size, (tp_rank + 1) * size // tp_size


@dataclass(frozen=True)
class Mapping:
    """One parameter of Megatron's GPTModel and the HF tensors that it is made of.

    `megatron` is its name under the local layer spec, `te` under transformer-engine's where that differs (the norms are
    fused into the linear layers there). {layer} is the global layer index from 0. `export` is False for a copy of a
    parameter that another entry exports.
    """

    megatron: str
    hf: tuple[str, ...]
    layout: Layout
    te: str | None = None
    export: bool = True

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.megatron

    def megatron_name(self, layer: int | None) -> str:
        return self.megatron.format(layer=layer)

    def hf_names(self, layer: int | None) -> tuple[str, ...]:
        return tuple(name.format(layer=layer) for name in self.hf)
