"""HuggingFace folder -> distributed checkpoint, and back: streams of parameters, in one process or in many.

At no time is more in memory than a few parameters: the source is mapped two files at a time, and both formats are
written in place, piece by piece. Under torchrun the ranks share the work; rank 0 makes the folder beside the output,
and gives it the output's name when all are done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import torch

from megatron_bupo.architectures.families import read_architecture
from megatron_bupo.architectures.table import table_for
from megatron_bupo.config.paths import HF
from megatron_bupo.config.train import ParallelConfig
from megatron_bupo.conversion.stored_model import (
    Parameter,
    StoredModel,
    StoredPiece,
    finish_folder,
    stored_dtypes,
    write_pieces,
)
from megatron_bupo.conversion.workers import Ranks, in_threads
from megatron_bupo.files import new_folder
from megatron_bupo.weights.checkpoint_tree import (
    RELEASE,
    TRACKER,
    Checkpoint,
    check_checkpoint_output,
    find_checkpoint,
)
from megatron_bupo.weights.hf_files import check_hf_output, open_model
from megatron_bupo.weights.hf_folder import HFFolder, ShardFiles
from megatron_bupo.weights.tensor_map import TensorMap, write_hf_side


def hf_to_megatron(
    hf_model: str | Path, output: str | Path, parallel: ParallelConfig, ranks: Ranks, force: bool = False
) -> int:
    """Write CKPT from a HuggingFace folder. The layout only decides which rank writes what; any other loads it.

    Returns:
        The number of bytes of the stored tensors.

    Raises:
        UsageError: on every rank, the folder, its tensors, the layout or the output is refused.
    """
    arch, table, weights = open_model(hf_model, parallel)
    place = ranks.place(parallel)
    ranks.first(lambda: check_checkpoint_output(output, force))
    dtypes = stored_dtypes(weights, table)
    total = sum(
        dtypes[mapping.stored_key].itemsize * torch.Size(shape).numel()
        for mapping, _ in table
        if mapping.export
        for shape in mapping.layout.hf_shapes(arch)
    )

    def write(folder: Path, done: Callable[[int], None]) -> list[StoredPiece]:
        if place is None:
            return []

        def one_file(worker: int, parameters: Iterator[Parameter]) -> list[StoredPiece]:
            path = folder / f"__{ranks.rank}_{worker}.distcp"
            return write_pieces(path, parameters, weights, arch, place, dtypes, done)

        return [piece for pieces in in_threads(place.parameters(table), one_file) for piece in pieces]

    def finish(partial: Path) -> None:
        write_hf_side(hf_model, partial / HF, table, weights)
        finish_folder(partial / RELEASE, table, pieces, dtypes, parallel.tensor_model_parallel_size)
        (partial / TRACKER).write_text(RELEASE)

    with ExitStack() as stack:
        partial = ranks.first(lambda: stack.enter_context(new_folder(output)))
        ranks.first((partial / RELEASE).mkdir)
        with ranks.progress("writing", total) as done:
            pieces = [piece for part in ranks.everywhere(lambda: write(partial / RELEASE, done)) for piece in part]
        ranks.first(lambda: finish(partial))
    return total


def megatron_to_hf(
    checkpoint: str | Path, output: str | Path, ranks: Ranks, dtype: torch.dtype | None = None, force: bool = False
) -> int:
    """Write a HuggingFace folder from CKPT or a training run's SAVE.

    A converted checkpoint is exported in the source's dtypes and files, a trained one in the dtype of its training;
    `dtype` overrides both.

    Returns:
        The number of bytes of the written tensors.

    Raises:
        UsageError: on every rank, the checkpoint, its tensors or the output is refused.
    """
    found = find_checkpoint(checkpoint)
    stored = StoredModel(found.folder, table_for(read_architecture(found.hf)))
    source = TensorMap.read(found.hf, stored.table)
    tensors = _tensors_to_export(source, stored, found, dtype)
    target = HFFolder(tensors, found.hf, exact=tensors is source, tied=stored.table.arch.tied)
    return write_stored(stored, target, output, ranks, force)


def _tensors_to_export(
    source: TensorMap | None, stored: StoredModel, found: Checkpoint, dtype: torch.dtype | None
) -> TensorMap:
    """Names, dtypes and files of an export; `source` itself where it is exact."""
    dtypes = stored.hf_dtypes()
    if source is None:
        shapes = stored.table.hf_shapes()
        return TensorMap.sharded((name, shape, dtype or dtypes[name]) for name, shape in shapes.items())
    if dtype is None and found.converted:
        return source
    return source.with_dtypes({name: dtype or dtypes[name] for name in source.dtypes()})


def write_stored(stored: StoredModel, target: HFFolder, output: str | Path, ranks: Ranks, force: bool = False) -> int:
    """Write a HuggingFace folder with tensors of a stored model. Returns and raises as `megatron_to_hf`."""
    ranks.first(lambda: check_hf_output(output, force))
    names = set(target.tensors.dtypes())
    parameters = [
        (mapping, layer)
        for mapping, layer in stored.table
        if mapping.export and names.intersection(mapping.hf_names(layer))
    ]

    def write(partial: Path, done: Callable[[int], None]) -> None:
        def some(worker: int, mine: Iterator[Parameter]) -> None:
            for mapping, layer in mine:
                for name, tensor in zip(mapping.hf_names(layer), stored.hf_tensors(mapping, layer), strict=True):
                    done(files.write(name, tensor))

        with closing(ShardFiles(partial, target, create=False)) as files:
            in_threads(parameters[ranks.rank :: ranks.world_size], some, both_ends=True)

    with ExitStack() as stack:
        partial = ranks.first(lambda: stack.enter_context(new_folder(output)))
        ranks.first(lambda: ShardFiles(partial, target, create=True).close())
        with ranks.progress("writing", target.tensors.nbytes) as done:
            ranks.everywhere(lambda: write(partial, done))
        ranks.first(lambda: target.finish(partial))
    return target.tensors.nbytes
