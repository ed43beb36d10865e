"""One parameter of Megatron's model and the HuggingFace tensors that it is made of."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from megatron_bupo.architectures.architecture import Architecture

Shape = tuple[int, ...]
_LAYER_INDEX = re.compile(r"(?<=\blayers\.)\d+(?=\.)")
_MEGATRON_LAYER, _HF_LAYER = "decoder.layers.{layer}.", "model.layers.{layer}."


@dataclass(frozen=True)
class Shard:
    """Which slice of every split parameter a rank holds: tensor-parallel `rank` of `size`."""

    rank: int = 0
    size: int = 1

    def part(self, length: int) -> slice:
        """This rank's part of an axis that divides evenly; of 8 on rank 1 of 2: [4:8]."""
        assert length % self.size == 0, f"{length} does not split over {self.size} ranks: see check_parallel"
        return slice(self.rank * length // self.size, (self.rank + 1) * length // self.size)


WHOLE = Shard()


class SliceLike(Protocol):
    """A tensor, or what safetensors' get_slice returns: reads the part [a:b] or [:, a:b] and no more."""

    def __getitem__(self, index: Any, /) -> Tensor: ...


class Layout(ABC):
    """How HF tensors lie in a parameter under tensor parallelism; an invertible operation.

    `split_dim`: the axis that ranks share, None where every rank holds the whole parameter. `num_joined`: so many HF
    tensors lie one after the other on axis 0, and each is split over the ranks on its own. `padded`: axis 0 is padded
    to a multiple of the ranks.
    """

    split_dim: ClassVar[int | None] = 0
    num_joined: ClassVar[int] = 1
    padded: ClassVar[bool] = False

    @abstractmethod
    def hf_shapes(self, arch: Architecture) -> tuple[Shape, ...]:
        """The shapes of the whole HF tensors, in the order of `Mapping.hf`."""

    @abstractmethod
    def parts(self, slices: Sequence[SliceLike], arch: Architecture, shard: Shard) -> Iterator[Tensor]:
        """A rank's slice of each joined part; reads only what the rank holds. dtype as in the HF tensors."""

    @abstractmethod
    def merge(self, shards: Sequence[Tensor], arch: Architecture) -> tuple[Tensor, ...]:
        """The whole HF tensors from the shards of all ranks in order; without padding, dtype kept."""

    def shard(self, slices: Sequence[SliceLike], arch: Architecture, shard: Shard) -> Tensor:
        """The parameter of one rank."""
        return join(list(self.parts(slices, arch, shard)))

    def whole_shape(self, arch: Architecture, tp_size: int = 1) -> Shape:
        """The shape of the parameter over all ranks, padding included."""
        shapes = self.hf_shapes(arch)
        rows = sum(shape[0] for shape in shapes)
        return (-(-rows // tp_size) * tp_size if self.padded else rows, *shapes[0][1:])


def join(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """All tensors as one; a single one as it is, without a copy."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim=dim)


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

    @property
    def stored_key(self) -> str:
        """In a distributed checkpoint, as `decoder.layers.mlp.linear_fc1.weight`: all layers under the name of TE."""
        return _without_layer(self.te or self.megatron)

    @property
    def local_key(self) -> str:
        """The same in a checkpoint that was saved under the local layer spec's own names."""
        return _without_layer(self.megatron)

    def megatron_name(self, layer: int | None) -> str:
        return self.megatron.format(layer=layer)

    def hf_names(self, layer: int | None) -> tuple[str, ...]:
        return tuple(name.format(layer=layer) for name in self.hf)


def split_layer(name: str) -> tuple[str, int | None]:
    """A parameter's name without its layer, which `format(layer=...)` puts back, and the layer.

    >>> split_layer("decoder.layers.3.mlp.linear_fc1.weight")
    ('decoder.layers.{layer}.mlp.linear_fc1.weight', 3)
    >>> split_layer("model.norm.weight")
    ('model.norm.weight', None)
    """
    match = _LAYER_INDEX.search(name)
    return _LAYER_INDEX.sub("{layer}", name), int(match[0]) if match else None


def in_layer(megatron: str, hf: tuple[str, ...], layout: Layout, te: str | None = None) -> Mapping:
    """A mapping inside one layer, from names relative to it."""
    te_name = None if te is None else _MEGATRON_LAYER + te
    return Mapping(_MEGATRON_LAYER + megatron, tuple(_HF_LAYER + name for name in hf), layout, te_name)


def _without_layer(name: str) -> str:
    return name.replace("layers.{layer}.", "layers.")
