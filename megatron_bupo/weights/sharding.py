"""From HuggingFace files into the parameters of a parallel model, and from there back as a stream of HF tensors.

Both directions follow the weight table alone. Names here are global: `decoder.layers.{i}` with i from 0 over the whole
model, in every pipeline stage and virtual stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_bupo.architectures.architecture import Architecture
from megatron_bupo.architectures.mapping import WHOLE, Mapping, Shard, split_layer
from megatron_bupo.architectures.table import WeightTable, table_for
from megatron_bupo.weights.hf_files import HFWeights


def global_name(local_name: str, layer_offset: int) -> str:
    """`decoder.layers.{i}...` with the stage's local index made global; `layer_offset` layers come before it."""
    template, layer = split_layer(local_name)
    return local_name if layer is None else template.format(layer=layer + layer_offset)


def global_named_parameters(chunks: Iterable[nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of this rank's model chunks (GPTModels, wrapped or not) under their global names."""
    for chunk in chunks:
        while isinstance(inner := getattr(chunk, "module", None), nn.Module):  # DDP and Float16Module hold it there
            chunk = inner
        layers = chunk.decoder.layers  # type: ignore[union-attr]
        # Megatron numbers layers from 1 over the whole model; a stage may have none at all.
        offset = int(layers[0].layer_number) - 1 if len(layers) else 0  # type: ignore[union-attr, index, arg-type]
        for name, parameter in chunk.named_parameters():
            yield global_name(name, offset), parameter


def load_hf(
    named_params: Iterable[tuple[str, nn.Parameter]],
    weights: HFWeights,
    arch: Architecture,
    shard: Shard = WHOLE,
) -> None:
    """Fill this rank's parameters from the files, reading only its slices, cast to each parameter's dtype.

    No communication. The folder has been checked against the table (`HFWeights.check`).

    Raises:
        UsageError: NaN or infinite values in a slice of this rank (other ranks may not see them: agree on the outcome
            before the next collective).
    """
    table = table_for(arch)
    params = dict(named_params)
    _assert_whole_layers(table, params)
    for name, parameter in params.items():
        mapping, layer = table.lookup(name)
        slices = [weights.slice(hf_name) for hf_name in mapping.hf_names(layer)]
        ours = mapping.layout.shard(slices, arch, shard)
        assert ours.shape == parameter.shape, f"{name}: {list(ours.shape)} for {list(parameter.shape)}"
        with torch.no_grad():
            parameter.copy_(ours)


def hf_tensors(
    named_params: Iterable[tuple[str, nn.Parameter]],
    arch: Architecture,
    tp_group: dist.ProcessGroup | None = None,
    pp_group: dist.ProcessGroup | None = None,
    wanted: Callable[[str], bool] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """The whole model as HuggingFace tensors, one after the other, the same on every rank and in every layout.

    `wanted` takes a parameter's name under the local spec, and says the same on every rank: others are left out.

    Order: embedding, layers, final norm, unembedding. Tensors are on the parameters' device, in their dtype; they may
    be the parameters' own memory. A collective: every rank of both groups must draw all of them.
    None for a group means that it has one rank.
    """
    table = table_for(arch)
    params = {table.local_name(name): parameter.detach() for name, parameter in named_params}
    tp_size = 1 if tp_group is None else dist.get_world_size(tp_group)
    owners, dtypes = _owners(params, pp_group)
    pp_rank = 0 if pp_group is None else dist.get_rank(pp_group)
    device = next(iter(params.values())).device if params else torch.device("cpu")
    for mapping, layer in table:
        name = mapping.megatron_name(layer)
        if not mapping.export or (wanted is not None and not wanted(name)):
            continue
        assert name in owners, f"no pipeline stage has {name}"
        if owners[name] == pp_rank:
            shards = _gather(mapping, params[name], tp_size, tp_group)
            whole: Sequence[Tensor] = mapping.layout.merge(shards, arch)
        else:
            shapes = mapping.layout.hf_shapes(arch)
            whole = [torch.empty(shape, dtype=dtypes[name], device=device) for shape in shapes]
        for hf_name, tensor in zip(mapping.hf_names(layer), whole, strict=True):
            if pp_group is not None:
                tensor = tensor.contiguous()
                dist.broadcast(tensor, dist.get_global_rank(pp_group, owners[name]), group=pp_group)
            yield hf_name, tensor


def _owners(
    params: dict[str, Tensor], pp_group: dist.ProcessGroup | None
) -> tuple[dict[str, int], dict[str, torch.dtype]]:
    """Which pipeline rank has a parameter (the first, of several), and its dtype there."""
    mine = {name: parameter.dtype for name, parameter in params.items()}
    stages: list[dict[str, torch.dtype]] = [mine]
    if pp_group is not None:
        stages = [{} for _ in range(dist.get_world_size(pp_group))]
        dist.all_gather_object(stages, mine, group=pp_group)
    owners: dict[str, int] = {}
    dtypes: dict[str, torch.dtype] = {}
    for rank, stage in enumerate(stages):
        for name, dtype in stage.items():
            owners.setdefault(name, rank)
            dtypes.setdefault(name, dtype)
    return owners, dtypes


def _gather(mapping: Mapping, shard: Tensor, tp_size: int, tp_group: dist.ProcessGroup | None) -> list[Tensor]:
    if tp_size == 1 or mapping.layout.split_dim is None:
        return [shard]
    shards = [torch.empty_like(shard) for _ in range(tp_size)]
    dist.all_gather(shards, shard.contiguous(), group=tp_group)
    return shards


def _assert_whole_layers(table: WeightTable, params: dict[str, nn.Parameter]) -> None:
    """Without this check a parameter that the model lacks (say its q and k norms) would be skipped in silence."""
    present = {table.local_name(name) for name in params}
    layers = {table.lookup(name)[1] for name in params} - {None}
    for layer in layers:
        expected = {mapping.megatron_name(layer) for mapping in table.mappings if mapping.per_layer}
        assert expected <= present, f"the model lacks {sorted(expected - present)}"
