"""A distributed checkpoint written and read parameter by parameter, without building the model.

The weight table alone says what megatron-core's GPTModel would save: the keys of transformer-engine's spec, all layers
stacked under one key, gate and up as two pieces of linear_fc1, the vocabulary padded to a multiple of the
tensor-parallel ranks. The tests compare the result with megatron-core's own checkpoint, and let megatron-core load it.
"""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_bupo.architectures.architecture import Architecture
from megatron_bupo.architectures.family import HF_EMBEDDING, HF_UNEMBEDDING
from megatron_bupo.architectures.mapping import WHOLE, Mapping, Shape, Shard
from megatron_bupo.architectures.table import WeightTable
from megatron_bupo.errors import UsageError
from megatron_bupo.weights.disk import SteadyFile, own_bytes
from megatron_bupo.weights.dist_checkpoint import FORMAT_FILE, METADATA_FILE, read_metadata
from megatron_bupo.weights.hf_files import HFWeights, check_finite

Parameter = tuple[Mapping, "int | None"]
_MODEL_KEYS = ("embedding.", "decoder.", "output_layer.")
_FORMAT = (
    '{"sharded_backend": "torch_dist", "sharded_backend_version": 1, '
    '"common_backend": "torch", "common_backend_version": 1}'
)


def stored_shape(mapping: Mapping, arch: Architecture, tp_size: int = 1) -> Shape:
    """The shape under `Mapping.stored_key`: [layers, ...] for what is in every layer."""
    return (*((arch.num_layers,) if mapping.per_layer else ()), *mapping.layout.whole_shape(arch, tp_size))


@dataclass(frozen=True)
class RankInLayout:
    """A rank's place in a TP x PP x VPP layout: the slices and layers that it reads and writes."""

    shard: Shard = WHOLE
    pp_rank: int = 0
    pp_size: int = 1
    vpp_size: int = 1

    def parameters(self, table: WeightTable) -> list[Parameter]:
        """The parameters that this rank writes, in the order of the network; TP rank 0 writes the replicated ones."""
        return [
            (mapping, layer)
            for mapping, layer in table
            if mapping.export
            and self._stage(table, mapping, layer) == self.pp_rank
            and (mapping.layout.split_dim is not None or self.shard.rank == 0)
        ]

    def _stage(self, table: WeightTable, mapping: Mapping, layer: int | None) -> int:
        if layer is None:
            return 0 if mapping is table.mappings[0] else self.pp_size - 1
        return layer // (table.arch.num_layers // (self.pp_size * self.vpp_size)) % self.pp_size


@dataclass(frozen=True)
class StoredPiece:
    """One written part of a stacked tensor, and where it lies."""

    key: str
    offsets: Shape
    sizes: Shape
    place: _StorageInfo


def stored_dtypes(weights: HFWeights, table: WeightTable) -> dict[str, torch.dtype]:
    """Per key the narrowest dtype that holds all HF tensors under it exactly."""
    dtypes: dict[str, torch.dtype] = {}
    for mapping, layer in table:
        for name in mapping.hf_names(layer):
            dtype = weights.dtype(name)
            key = mapping.stored_key
            dtypes[key] = torch.promote_types(dtypes.get(key, dtype), dtype)
    return dtypes


def write_pieces(
    path: Path,
    parameters: Iterator[Parameter],
    weights: HFWeights,
    arch: Architecture,
    place: RankInLayout,
    dtypes: dict[str, torch.dtype],
    done: Callable[[int], None],
) -> list[StoredPiece]:
    """Write a rank's slices of parameters one after the other into one file; `done(num_bytes)` after every piece."""
    written = []
    with SteadyFile(path) as file:
        for mapping, layer in parameters:
            key = mapping.stored_key
            for offsets, tensor in _pieces(mapping, layer, weights, arch, place.shard):
                start = file.tell()
                torch.save(own_bytes(tensor.to(dtypes[key])), cast(IO[bytes], file))
                lies = _StorageInfo(path.name, start, file.tell() - start)
                written.append(StoredPiece(key, offsets, tuple(tensor.shape), lies))
                done(tensor.nbytes)
    return written


def _pieces(
    mapping: Mapping, layer: int | None, weights: HFWeights, arch: Architecture, shard: Shard
) -> Iterator[tuple[Shape, Tensor]]:
    """(offsets in the stacked tensor, piece) of one parameter's slice."""
    slices = [weights.slice(name) for name in mapping.hf_names(layer)]
    layers: Shape = () if layer is None else (layer,)
    split_dim = mapping.layout.split_dim
    for at, part in enumerate(mapping.layout.parts(slices, arch, shard)):
        offsets = [0] * part.dim()
        if split_dim is not None:
            offsets[split_dim] = (at * shard.size + shard.rank) * part.shape[split_dim]
        yield (*layers, *offsets), part[None] if mapping.per_layer else part


def finish_folder(
    folder: Path, table: WeightTable, pieces: list[StoredPiece], dtypes: dict[str, torch.dtype], tp_size: int
) -> None:
    """Write the metadata of the pieces of all ranks; last the file by which megatron-core recognizes a checkpoint."""
    described: dict[str, Any] = {}
    for mapping, layer in table:
        if not mapping.export or layer:
            continue
        key, shape = mapping.stored_key, stored_shape(mapping, table.arch, tp_size)
        mine = sorted((piece for piece in pieces if piece.key == key), key=lambda piece: piece.offsets)
        chunks = [ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.sizes)) for piece in mine]
        described[key] = TensorStorageMetadata(TensorProperties(dtype=dtypes[key]), torch.Size(shape), chunks)
    places = {MetadataIndex(piece.key, torch.Size(piece.offsets)): piece.place for piece in pieces}
    metadata = Metadata(described, storage_data=places, storage_meta=StorageMeta())
    # Megatron-LM reorders the queries, keys and values of checkpoints older than version 3.
    torch.save({"checkpoint_version": 3.0, "iteration": 0}, folder / "common.pt")
    (folder / METADATA_FILE).write_bytes(pickle.dumps(metadata))
    (folder / FORMAT_FILE).write_text(_FORMAT)


class StoredModel:
    """The model in a distributed checkpoint, read parameter by parameter as HuggingFace tensors.

    Raises:
        UsageError: what `read_metadata` refuses; a tensor of the model that is missing or has another shape; one that
            no model of this architecture has.
    """

    def __init__(self, folder: Path, table: WeightTable) -> None:
        self.folder, self.table = folder, table
        metadata = read_metadata(folder)
        self._described = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._pieces: dict[str, list[tuple[Shape, Shape, _StorageInfo]]] = {}
        sizes = {
            (key, tuple(one.offsets)): tuple(one.sizes)
            for key in self._described
            for one in self._described[key].chunks
        }
        for index, place in (metadata.storage_data or {}).items():
            offsets = tuple(index.offset or ())
            if (index.fqn, offsets) in sizes:
                self._pieces.setdefault(index.fqn, []).append((offsets, sizes[index.fqn, offsets], place))
        self._check()

    def dtype(self, mapping: Mapping) -> torch.dtype:
        return self._described[self._key(mapping)].properties.dtype

    def hf_dtypes(self) -> dict[str, torch.dtype]:
        """The stored dtype of every HuggingFace tensor, lm_head too where it is tied."""
        dtypes = {
            name: self.dtype(mapping)
            for mapping, layer in self.table
            if mapping.export
            for name in mapping.hf_names(layer)
        }
        return {HF_UNEMBEDDING: dtypes[HF_EMBEDDING]} | dtypes

    def _key(self, mapping: Mapping) -> str:
        return mapping.stored_key if mapping.stored_key in self._described else mapping.local_key

    def hf_tensors(self, mapping: Mapping, layer: int | None) -> tuple[Tensor, ...]:
        """The HuggingFace tensors of one parameter, whole, without padding, in the stored dtype."""
        key, arch = self._key(mapping), self.table.arch
        shapes = mapping.layout.hf_shapes(arch)
        start: Shape = () if layer is None else (layer,)
        if mapping.layout.num_joined > 1:  # each lies alone, as a rule: nothing to join and to part again
            ends = itertools.accumulate(shape[0] for shape in shapes)
            return tuple(
                self._region(key, (*start, end - shape[0], *(0 for _ in shape[1:])), shape)
                for end, shape in zip(ends, shapes, strict=True)
            )
        whole = mapping.layout.whole_shape(arch)
        return mapping.layout.merge([self._region(key, (*start, *(0 for _ in whole)), whole)], arch)

    def _region(self, key: str, start: Shape, shape: Shape) -> Tensor:
        """The part of a stacked tensor that begins at `start`; [shape], the leading layer's axis dropped."""
        sizes = (*(1 for _ in start[len(shape) :]), *shape)
        target: Tensor | None = None
        filled = 0
        for offsets, extent, place in self._pieces.get(key, []):
            low = [max(a, b) for a, b in zip(start, offsets, strict=True)]
            high = [min(a + b, c + d) for a, b, c, d in zip(start, sizes, offsets, extent, strict=True)]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            piece = self._read(key, place, extent)
            inside = piece[tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offsets, strict=True))]
            if inside.shape == sizes:
                return inside.reshape(shape)
            if target is None:
                target = torch.empty(sizes, dtype=self._described[key].properties.dtype)
            target[tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))] = inside
            filled += inside.numel()
        if target is None or filled != target.numel():
            raise UsageError(f"{key} in {self.folder} has no piece for {list(start)}; the checkpoint is incomplete")
        return target.reshape(shape)

    def _read(self, key: str, place: _StorageInfo, extent: Shape) -> Tensor:
        path = self.folder / place.relative_path
        try:
            with path.open("rb") as file:
                view: Any = _create_file_view(file, place.offset, place.length)
                piece: Tensor = torch.load(view, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise UsageError(f"{key} in {path} cannot be read: {str(error).splitlines()[0]}") from error
        if not isinstance(piece, Tensor) or piece.shape != extent:
            raise UsageError(f"{key} in {path} is no tensor of shape {list(extent)}, as the checkpoint says")
        check_finite(piece, f"{key} in {path}")
        return piece

    def _check(self) -> None:
        expected = {self._key(mapping): mapping for mapping in self.table.mappings if mapping.export}
        for key, mapping in expected.items():
            if key not in self._described:
                raise UsageError(f"{self.folder} has no tensor {key}; the config.json of the checkpoint asks for it")
            found, wanted = tuple(self._described[key].size), stored_shape(mapping, self.table.arch)
            padded = mapping.layout.padded and found[0] >= wanted[0] and found[1:] == wanted[1:]
            if found != wanted and not padded:
                raise UsageError(f"{key} in {self.folder} is {list(found)}; its config.json asks for {list(wanted)}")
        for key in self._described:
            if key.startswith(_MODEL_KEYS) and key not in expected:
                raise UsageError(f"{key} in {self.folder} does not belong to a {self.table.arch.family} model")
