"""The weight table: which HuggingFace tensors are which Megatron parameters, and in what layout.

Declarative and invertible: loading, the converters and the weight sync to a rollout engine all read this one table and
have no mapping of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_bupo.architectures.architecture import Architecture
from megatron_bupo.architectures.families import families
from megatron_bupo.architectures.mapping import Mapping, Shape, split_layer


@dataclass(frozen=True)
class WeightTable:
    """All mappings of one model, in the order of the network: embedding, layers, final norm, unembedding."""

    arch: Architecture
    mappings: tuple[Mapping, ...]

    def lookup(self, megatron_name: str) -> tuple[Mapping, int | None]:
        """The mapping of a parameter and its global layer index from 0 (None outside the layers).

        `megatron_name` has the global layer index, in the local or transformer-engine's spelling. A name that the
        table does not have is an error of the program.
        """
        template, layer = split_layer(megatron_name)
        for mapping in self.mappings:
            if template in (mapping.megatron, mapping.te):
                assert layer is None or layer < self.arch.num_layers, f"{megatron_name}: no such layer"
                return mapping, layer
        raise AssertionError(f"{megatron_name} is not in the weight table of {self.arch.family}")

    def local_name(self, megatron_name: str) -> str:
        """The local spec's spelling of a parameter's name, which all layouts and both specs share."""
        mapping, layer = self.lookup(megatron_name)
        return mapping.megatron_name(layer)

    def __iter__(self) -> Iterator[tuple[Mapping, int | None]]:
        """Every parameter of the whole model once, as (mapping, layer), in the order of the network."""
        layered = [mapping for mapping in self.mappings if mapping.per_layer]
        first, last = self.mappings.index(layered[0]), self.mappings.index(layered[-1])
        yield from ((mapping, None) for mapping in self.mappings[:first])
        yield from ((mapping, layer) for layer in range(self.arch.num_layers) for mapping in layered)
        yield from ((mapping, None) for mapping in self.mappings[last + 1 :])

    def hf_shapes(self) -> dict[str, Shape]:
        """Name and shape of every tensor of the whole checkpoint, in the order of the network."""
        return {
            name: shape
            for mapping, layer in self
            for name, shape in zip(mapping.hf_names(layer), mapping.layout.hf_shapes(self.arch), strict=True)
        }

    def hf_names(self) -> list[str]:
        """The names of `hf_shapes`; a tied model has no lm_head."""
        return list(self.hf_shapes())


def table_for(arch: Architecture) -> WeightTable:
    """The weight table of an architecture."""
    return WeightTable(arch, families()[arch.family].mappings(arch.tied))
