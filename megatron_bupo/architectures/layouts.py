"""The layouts of HuggingFace tensors in Megatron's parameters, each an invertible operation.

Plain tensors only: nothing here needs Megatron or a process group. Letters: H hidden, F feed-forward, V vocabulary,
N query heads, G query groups (kv heads), D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_bupo.architectures.architecture import Architecture
from megatron_bupo.architectures.mapping import Layout, Shape, Shard, SliceLike, join


@dataclass(frozen=True)
class Replicated(Layout):
    """A vector that every rank holds whole; `size` names its length in the Architecture."""

    size: str
    split_dim = None

    def hf_shapes(self, arch: Architecture) -> tuple[Shape, ...]:
        return ((getattr(arch, self.size),),)

    def parts(self, slices: Sequence[SliceLike], arch: Architecture, shard: Shard) -> Iterator[Tensor]:
        yield slices[0][:]

    def merge(self, shards: Sequence[Tensor], arch: Architecture) -> tuple[Tensor, ...]:
        return (shards[0],)


@dataclass(frozen=True)
class VocabParallel(Layout):
    """[V, H] split on the vocabulary, padded with zero rows to a multiple of the ranks.

    With V = 101 on two ranks: rank 0 has the rows [0, 51), rank 1 [51, 101) and one row of zeros.
    """

    padded = True

    def hf_shapes(self, arch: Architecture) -> tuple[Shape, ...]:
        return ((arch.vocab_size, arch.hidden_size),)

    def parts(self, slices: Sequence[SliceLike], arch: Architecture, shard: Shard) -> Iterator[Tensor]:
        rows = shard.part(arch.padded_vocab_size(shard.size))
        real = slices[0][min(rows.start, arch.vocab_size) : min(rows.stop, arch.vocab_size)]
        missing = rows.stop - rows.start - len(real)
        yield torch.cat([real, real.new_zeros(missing, *real.shape[1:])]) if missing else real

    def merge(self, shards: Sequence[Tensor], arch: Architecture) -> tuple[Tensor, ...]:
        return (join(shards)[: arch.vocab_size],)


@dataclass(frozen=True)
class RowParallel(Layout):
    """[H, columns] split on the columns, the input of the product; `columns` names their number."""

    columns: str
    split_dim = 1

    def hf_shapes(self, arch: Architecture) -> tuple[Shape, ...]:
        return ((arch.hidden_size, getattr(arch, self.columns)),)

    def parts(self, slices: Sequence[SliceLike], arch: Architecture, shard: Shard) -> Iterator[Tensor]:
        yield slices[0][:, shard.part(getattr(arch, self.columns))]

    def merge(self, shards: Sequence[Tensor], arch: Architecture) -> tuple[Tensor, ...]:
        return (join(shards, dim=1),)


@dataclass(frozen=True)
class QKV(Layout):
    """q [N D, H], k and v [G D, H] as one matrix, or their biases [N D], [G D] as one vector.

    Megatron interleaves them by query group, and a rank has whole groups. With N = 4, G = 2: q0 q1 k0 v0 | q2 q3 k1 v1.
    """

    bias: bool = False

    def hf_shapes(self, arch: Architecture) -> tuple[Shape, ...]:
        tail = () if self.bias else (arch.hidden_size,)
        return ((arch.query_size, *tail), (arch.kv_size, *tail), (arch.kv_size, *tail))

    def parts(self, slices: Sequence[SliceLike], arch: Architecture, shard: Shard) -> Iterator[Tensor]:
        groups = arch.num_query_groups // shard.size
        by_group = [
            whole[shard.part(rows)].reshape(groups, rows // arch.num_query_groups, *tail)
            for whole, (rows, *tail) in zip(slices, self.hf_shapes(arch), strict=True)
        ]
        yield torch.cat(by_group, dim=1).flatten(0, 1)

    def merge(self, shards: Sequence[Tensor], arch: Architecture) -> tuple[Tensor, ...]:
        packed = join(shards)
        rows = [shape[0] // arch.num_query_groups for shape in self.hf_shapes(arch)]
        by_group = packed.view(arch.num_query_groups, sum(rows), *packed.shape[1:])
        return tuple(part.flatten(0, 1) for part in by_group.split(rows, dim=1))


@dataclass(frozen=True)
class GateUp(Layout):
    """gate and up, each [F, H], as one matrix: every rank has its part of the gate, then its part of up."""

    num_joined = 2

    def hf_shapes(self, arch: Architecture) -> tuple[Shape, ...]:
        return ((arch.ffn_hidden_size, arch.hidden_size),) * 2

    def parts(self, slices: Sequence[SliceLike], arch: Architecture, shard: Shard) -> Iterator[Tensor]:
        for whole in slices:
            yield whole[shard.part(arch.ffn_hidden_size)]

    def merge(self, shards: Sequence[Tensor], arch: Architecture) -> tuple[Tensor, ...]:
        gates, ups = zip(*(shard.chunk(2) for shard in shards), strict=True)
        return join(gates), join(ups)
