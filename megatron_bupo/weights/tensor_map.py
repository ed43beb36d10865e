"""CKPT/hf/: a HuggingFace folder without its tensors' values, from which an export makes the same folder again.

config, generation config, tokenizer and chat template as they are, and `tensors.json`: every tensor's name, dtype,
shape and file, in the order in which they lie there, with each file's own metadata and the index.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_bupo.architectures.family import HF_EMBEDDING, HF_UNEMBEDDING
from megatron_bupo.architectures.mapping import Shape
from megatron_bupo.architectures.table import WeightTable
from megatron_bupo.errors import UsageError
from megatron_bupo.weights.hf_files import DTYPES, SINGLE_FILE, HFWeights, copy_companions

MAP_FILE = "tensors.json"
MAX_SHARD_BYTES = 5_000_000_000
SCHEMA = 1


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a HuggingFace folder; `dtype` as safetensors writes it (F32, BF16, F16)."""

    name: str
    dtype: str
    shape: Shape
    file: str

    @property
    def nbytes(self) -> int:
        return DTYPES[self.dtype].itemsize * torch.Size(self.shape).numel()


@dataclass(frozen=True)
class TensorMap:
    """All tensors of a HuggingFace folder in the order of its files; `index` is None where there is one file."""

    tensors: tuple[TensorEntry, ...]
    file_metadata: dict[str, dict[str, str] | None]
    index: dict[str, Any] | None

    @classmethod
    def of(cls, weights: HFWeights, table: WeightTable) -> TensorMap:
        """The map of a checked folder, with an index of its own where it leaves something out.

        Left out are buffers that old releases saved among the weights (rotary inv_freq). A tied model's lm_head stays,
        if the folder has one.
        """
        kept = {*table.hf_names(), HF_UNEMBEDDING}
        tensors = tuple(
            TensorEntry(name, _name_of(weights.dtype(name)), weights.shape(name), weights.path(name).name)
            for name in weights.in_file_order()
            if name in kept
        )
        files = {weights.path(entry.name) for entry in tensors}
        found = cls(tensors, {path.name: weights.file_metadata(path) for path in sorted(files)}, weights.index)
        return found if len(tensors) == len(weights.names) else found.indexed()

    @classmethod
    def sharded(
        cls, tensors: Iterable[tuple[str, Shape, torch.dtype]], max_shard_bytes: int | None = None
    ) -> TensorMap:
        """A map for tensors that come without one: shards of 5 GB by default, named and indexed as by transformers."""
        shards: list[list[tuple[str, Shape, torch.dtype]]] = [[]]
        held = 0
        for name, shape, dtype in tensors:
            size = dtype.itemsize * torch.Size(shape).numel()
            if shards[-1] and held + size > (max_shard_bytes or MAX_SHARD_BYTES):
                shards.append([])
                held = 0
            shards[-1].append((name, shape, dtype))
            held += size
        count = len(shards)
        files = [f"model-{at:05d}-of-{count:05d}.safetensors" for at in range(1, count + 1)]
        files = files if count > 1 else [SINGLE_FILE]
        entries = tuple(
            TensorEntry(name, _name_of(dtype), shape, file)
            for file, shard in zip(files, shards, strict=True)
            for name, shape, dtype in shard
        )
        return cls(entries, {file: {"format": "pt"} for file in files}, None).indexed()

    def with_dtypes(self, dtypes: dict[str, torch.dtype]) -> TensorMap:
        """The same tensors in the same files, in other dtypes; `self` where nothing changes."""
        names = {name: _name_of(dtype) for name, dtype in dtypes.items()}
        if all(names[entry.name] == entry.dtype for entry in self.tensors):
            return self
        entries = tuple(TensorEntry(one.name, names[one.name], one.shape, one.file) for one in self.tensors)
        return TensorMap(entries, self.file_metadata, self.index).indexed()

    def indexed(self) -> TensorMap:
        """With a new index, as transformers writes it, where there are several files or there was one before."""
        if self.index is None and len(self.file_metadata) == 1:
            return self
        weight_map = {entry.name: entry.file for entry in self.tensors}
        index = {"metadata": {"total_size": self.nbytes}, "weight_map": dict(sorted(weight_map.items()))}
        return TensorMap(self.tensors, self.file_metadata, index)

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.tensors)

    def dtypes(self) -> dict[str, torch.dtype]:
        return {entry.name: DTYPES[entry.dtype] for entry in self.tensors}

    def write(self, folder: Path) -> None:
        text = json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1, ensure_ascii=False)
        (folder / MAP_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path, table: WeightTable) -> TensorMap | None:
        """The map in FOLDER/tensors.json, or None where there is none.

        Raises:
            UsageError: it is broken, of a newer schema, or has other tensors than the model of `table`.
        """
        path = folder / MAP_FILE
        if not path.is_file():
            return None
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["schema"] != SCHEMA:
                raise UsageError(f"{path} has schema {data['schema']}; this version reads {SCHEMA}")
            entries = tuple(
                TensorEntry(str(one["name"]), str(one["dtype"]), tuple(one["shape"]), str(one["file"]))
                for one in data["tensors"]
            )
            found = cls(entries, dict(data["file_metadata"]), data["index"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"{path} is broken: {error!r}") from error
        found._check(path, table)
        return found

    def _check(self, path: Path, table: WeightTable) -> None:
        expected = table.hf_shapes()
        if table.arch.tied and any(entry.name == HF_UNEMBEDDING for entry in self.tensors):
            expected[HF_UNEMBEDDING] = expected[HF_EMBEDDING]
        if len({entry.name for entry in self.tensors}) != len(self.tensors):
            raise UsageError(f"{path} names a tensor twice")
        for entry in self.tensors:
            if expected.get(entry.name) != entry.shape or entry.dtype not in DTYPES:
                raise UsageError(
                    f"{path} has {entry.name} {entry.dtype} {list(entry.shape)}, unlike config.json beside it"
                )
            if Path(entry.file).name != entry.file or entry.file not in self.file_metadata:
                raise UsageError(f"{path} puts {entry.name} into {entry.file!r}, which is no file of it")
        missing = expected.keys() - {entry.name for entry in self.tensors}
        if missing:
            raise UsageError(f"{path} lacks {min(missing)}")


def write_hf_side(hf_model: str | Path, folder: Path, table: WeightTable, weights: HFWeights | None = None) -> None:
    """Fill CKPT/hf/ (or SAVE/hf/): config, generation config, tokenizer, chat template, tensors.json. One process."""
    source = Path(hf_model)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    copy_companions(source, folder)
    TensorMap.of(weights or HFWeights(source), table).write(folder)


def _name_of(dtype: torch.dtype) -> str:
    return next(name for name, held in DTYPES.items() if held == dtype)
