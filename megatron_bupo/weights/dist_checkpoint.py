"""megatron-core's distributed checkpoint (torch_dist): a model's sharded state, saved once, loaded in any layout.

Keys are those of transformer-engine's layer spec, whichever spec the model has, with all layers stacked under one key
([layers, ...]). A folder's `.metadata` is a pickle. An unpickler that accepts only torch's
description of tensors reads it first: a foreign or broken folder gives an error of one line, and none of its code runs.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException, Metadata
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_bupo.architectures.table import WeightTable
from megatron_bupo.errors import UsageError
from megatron_bupo.weights.sharding import global_name

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

METADATA_FILE, FORMAT_FILE = ".metadata", "metadata.json"


def model_state(chunks: Sequence[GPTModel]) -> dict[str, Any]:
    """megatron-core's sharded state of this rank's model chunks: global parameter name -> ShardedTensor or factory.

    Keys are unique over virtual stages, since layers are numbered over the whole model. A tied last stage's copy of the
    embedding has the embedding's key. The tensors are the parameters' own memory; `_extra_state` objects of
    transformer-engine, which hold fp8 statistics, are left out.
    """
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    state: dict[str, Any] = {}
    for chunk in chunks:
        layers = chunk.decoder.layers
        offset = int(layers[0].layer_number) - 1 if len(layers) else 0
        for name, value in chunk.sharded_state_dict().items():
            if isinstance(value, ShardedTensor | ShardedTensorFactory):
                assert global_name(name, offset) not in state, f"{name} twice"
                state[global_name(name, offset)] = value
    return state


def save_sharded(state: dict[str, Any], folder: Path) -> None:
    """Save a sharded state (of a model, an optimizer, plain numbers) as a torch_dist checkpoint. A collective.

    `folder` is made where it is not there. It is whole only when this returns: write beside, then rename.

    Raises:
        UsageError: the folder cannot be written; on every rank.
    """
    from megatron.core import dist_checkpointing

    with _one_line(f"{folder} cannot be written"):
        if dist.get_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        dist_checkpointing.save(state, str(folder))


def load_sharded(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Load the entries of `state`, in this run's layout; the folder may have others. A collective.

    Returns:
        The loaded values in `state`'s structure, with the plain values saved beside them. Tensors of plain
        ShardedTensors are `state`'s own memory, filled in place; those of factories are new.

    Raises:
        UsageError: the folder is missing, truncated, of another format, or lacks something; on every rank.
    """
    from megatron.core import dist_checkpointing

    read_metadata(folder)
    with _one_line(f"{folder} cannot be loaded"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch, about how megatron-core calls it
        return dist_checkpointing.load(state, str(folder))


def load_model(chunks: Sequence[GPTModel], folder: Path, table: WeightTable) -> None:
    """Fill the parameters of this rank's model chunks in place, cast to their dtype. A collective.

    Both spellings of the names are read: transformer-engine's, which is written, and the local layer spec's own.

    Raises:
        UsageError: as `load_sharded`; a tensor of the model that is not there, or has another shape.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories

    state = model_state(chunks)
    # A factory's parts are views of the parameter: loaded as they are, nothing has to be merged and no copy is made.
    apply_factories(state)
    stored = {
        key: tuple(entry.size)
        for key, entry in read_metadata(folder).state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    local_keys = {mapping.stored_key: mapping.local_key for mapping in table.mappings}
    for part in nested_values(state):
        if part.key not in stored and local_keys.get(part.key) in stored:
            part.key = local_keys[part.key]
        if part.key not in stored:
            raise UsageError(f"{folder} has no tensor {part.key}; it is a checkpoint of another model")
        shape = stored[part.key]
        if shape != part.global_shape and not (part.allow_shape_mismatch and shape[1:] == part.global_shape[1:]):
            raise UsageError(f"{part.key} in {folder} is {list(shape)}; the model's is {list(part.global_shape)}")
    load_sharded(state, folder)


def read_metadata(folder: Path) -> Metadata:
    """What a torch_dist folder holds: its tensors' names, shapes and dtypes, and where their pieces lie.

    Raises:
        UsageError: no such folder, another format, an incomplete one, or a file that is missing or cut off.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder; give a distributed checkpoint")
    for name in (FORMAT_FILE, METADATA_FILE):
        if not (folder / name).is_file():
            raise UsageError(f"{folder} has no {name}; it is incomplete, or no distributed checkpoint of megatron-core")
    if b'"torch_dist"' not in (folder / FORMAT_FILE).read_bytes():
        raise UsageError(f"{folder / FORMAT_FILE} does not name the format torch_dist; only that one is read")
    try:
        metadata = _MetadataUnpickler(io.BytesIO((folder / METADATA_FILE).read_bytes())).load()
    except (pickle.UnpicklingError, EOFError, OSError, AttributeError, ValueError, IndexError) as error:
        raise UsageError(f"{folder / METADATA_FILE} is broken: {error}") from error
    if not isinstance(metadata, Metadata):
        raise UsageError(f"{folder / METADATA_FILE} is broken: it describes no checkpoint")
    _check_files(folder, metadata)
    return metadata


def _check_files(folder: Path, metadata: Metadata) -> None:
    ends: dict[str, int] = {}
    for place in (metadata.storage_data or {}).values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    for name, end in sorted(ends.items()):
        path = folder / name
        if path.parent != folder or not path.is_file():
            raise UsageError(f"{path} is missing; {folder / METADATA_FILE} names it")
        if path.stat().st_size < end:
            raise UsageError(f"{path} is truncated: {path.stat().st_size} of {end} bytes")


class _MetadataUnpickler(pickle.Unpickler):
    """Accepts only the classes that describe a checkpoint; they run no code of the file."""

    _MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner")
    _NAMES = frozenset(
        {
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
            ("collections", "OrderedDict"),
            ("pathlib", "PosixPath"),
            ("pathlib", "Path"),
        }
    )

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or module in self._MODULES or (module, name) in self._NAMES:
            return super().find_class(module, name)  # type: ignore[no-any-return]
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no description of a checkpoint needs")


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Turn the errors of torch and megatron-core about files and mismatches into a UsageError of one line."""
    from megatron.core.dist_checkpointing.core import CheckpointingException

    try:
        yield
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise UsageError(f"{what}: {_first_line(cause)}") from error
    except (CheckpointingException, OSError, KeyError) as error:
        raise UsageError(f"{what}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
