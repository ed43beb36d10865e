"""HuggingFace folders on disk: safetensors read by slices; config and tokenizer.

Reading maps the files into memory: a rank touches only the pages of the slices that it asks for. pytorch_model.bin is
a pickle and is refused. Folders are written by hf_folder.py.
"""

from __future__ import annotations

import functools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_bupo.architectures.architecture import Architecture, check_layout
from megatron_bupo.architectures.families import read_architecture
from megatron_bupo.architectures.family import HF_EMBEDDING, HF_UNEMBEDDING
from megatron_bupo.architectures.mapping import Shape, SliceLike
from megatron_bupo.architectures.table import WeightTable, table_for
from megatron_bupo.config.train import ParallelConfig
from megatron_bupo.errors import UsageError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_COMPARED_ROWS = 4096
_OPEN_FILES = 1

# What travels with the weights. Never copied: code, pickles, other weights.
COPIED_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass(frozen=True)
class _FiniteSlice:
    """A slice of a tensor in a file; reading NaN or infinities from it is an error."""

    name: str
    path: Path
    raw: Any

    def __getitem__(self, index: Any, /) -> Tensor:
        part: Tensor = self.raw[index]
        check_finite(part, f"{self.name} in {self.path}")
        return part


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor has neither NaN nor infinite values."""
    # NaN goes through both extremes: forty times as fast as isfinite, and without a copy of the tensor.
    return not tensor.numel() or all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor.detach()))


def check_finite(tensor: Tensor, name: str) -> None:
    """Raise UsageError, naming the tensor as `name`, where it has NaN or infinite values."""
    if not is_finite(tensor):
        raise UsageError(f"{name} has NaN or infinite values; give an intact checkpoint")


class HFWeights:
    """The tensors of a HuggingFace folder, read lazily.

    `names` are those of the index, or of the single file (which wins where both are there, as in transformers).
    `index` is the index as it was read, None with a single file. Headers are read once; of the files themselves only
    the one that was read last is mapped, so that a folder of any size stays out of the memory.

    Raises:
        UsageError: no safetensors, a pickle only, an index that is broken or names files or tensors that are not
            there, a truncated file. The line names the file, and the tensor where it is about one.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._headers: dict[Path, _Header] = {}
        self._open = functools.lru_cache(maxsize=_OPEN_FILES)(_open)
        self.index: dict[str, Any] | None = None
        single, index = self.folder / SINGLE_FILE, self.folder / INDEX_FILE
        if single.is_file():
            self._where = dict.fromkeys(self._header(single).tensors, single)
        elif index.is_file():
            self._where = self._read_index(index)
        else:
            pickles = sorted(path.name for path in self.folder.glob("pytorch_model*.bin"))
            if pickles:
                raise UsageError(f"{self.folder} has its weights in {pickles[0]}, a pickle; convert it to safetensors")
            raise UsageError(
                f"{self.folder} has neither {SINGLE_FILE} nor {INDEX_FILE}; give a folder with safetensors"
            )
        self.names = list(self._where)

    def path(self, name: str) -> Path:
        """The file that holds a tensor."""
        if name not in self._where:
            raise UsageError(f"{self.folder} has no tensor {name}")
        return self._where[name]

    def slice(self, name: str) -> SliceLike:
        """A tensor to be read by [a:b] or [:, a:b]; reading raises UsageError where the part is not finite."""
        path = self.path(name)
        return _FiniteSlice(name, path, self._open(path).get_slice(name))

    def shape(self, name: str) -> Shape:
        return self._header(self.path(name)).tensors[name][1]

    def dtype(self, name: str) -> torch.dtype:
        """fp32, bf16 or fp16; UsageError for anything else, as in quantized checkpoints."""
        path = self.path(name)
        kind = self._header(path).tensors[name][0]
        if kind not in DTYPES:
            raise UsageError(f"{name} in {path} is {kind}; only {', '.join(DTYPES)} are supported")
        return DTYPES[kind]

    def in_file_order(self) -> list[str]:
        """All names, file by file and within a file as the tensors lie in it."""
        files = sorted(set(self._where.values()))
        return [name for file in files for name in self._header(file).tensors if self._where.get(name) == file]

    def file_metadata(self, path: Path) -> dict[str, str] | None:
        """The metadata of a file (`__metadata__` in its header), usually {"format": "pt"}."""
        return self._header(path).metadata

    def check(self, table: WeightTable) -> None:
        """Raise UsageError unless the folder holds exactly what the table expects: names, shapes, dtypes.

        Reads headers only, but for a tied model that carries an lm_head.weight too: transformers ties the two only
        where they are equal, so they are compared.
        """
        expected = table.hf_shapes()
        missing = [name for name in expected if name not in self._where]
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise UsageError(f"{self.folder} has no tensor {missing[0]}{more}; its config.json asks for it")
        for name, shape in expected.items():
            if self.shape(name) != shape:
                raise UsageError(
                    f"{name} in {self.path(name)} is {list(self.shape(name))}; config.json asks for {list(shape)}"
                )
            self.dtype(name)
        for name in self.names:
            if name in expected or name.endswith(".rotary_emb.inv_freq"):  # a buffer that old releases saved
                continue
            if name == HF_UNEMBEDDING and table.arch.tied:
                self._check_tied(table.arch.vocab_size)
                continue
            raise UsageError(f"{name} in {self.path(name)} does not belong to a {table.arch.family} model")

    def _check_tied(self, vocab_size: int) -> None:
        head, embedding = HF_UNEMBEDDING, HF_EMBEDDING
        parts = [slice(at, at + _COMPARED_ROWS) for at in range(0, vocab_size, _COMPARED_ROWS)]
        one, other = self.slice(head), self.slice(embedding)
        if self.shape(head) != self.shape(embedding) or not all(torch.equal(one[part], other[part]) for part in parts):
            raise UsageError(
                f"{head} in {self.path(head)} differs from {embedding}, but config.json has tie_word_embeddings true; "
                "set it to false, or remove the tensor"
            )

    def _read_index(self, index: Path) -> dict[str, Path]:
        try:
            self.index = json.loads(index.read_text(encoding="utf-8"))
            weight_map = self.index["weight_map"]  # type: ignore[index]
            where = {str(name): self.folder / file for name, file in weight_map.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"{index} is no index of safetensors: it must map tensors to files in weight_map"
            ) from error
        for name, path in where.items():
            if path.parent != self.folder or path.suffix != ".safetensors":
                raise UsageError(f"{index} names {path} for {name}; it may only name .safetensors files beside it")
            if not path.is_file():
                raise UsageError(f"{path} is missing; {index.name} names it for {name}")
        for path in sorted(set(where.values())):
            held = set(self._header(path).tensors)
            named = {name for name, file in where.items() if file == path}
            for name in sorted(named - held):
                raise UsageError(f"{path} has no tensor {name}, but {index.name} says so")
            for name in sorted(held - named):
                raise UsageError(f"{path} has the tensor {name}, which {index.name} does not name for this file")
        return where

    def _header(self, path: Path) -> _Header:
        if path not in self._headers:
            file = self._open(path)
            raw = {name: file.get_slice(name) for name in file.offset_keys()}
            tensors = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in raw.items()}
            self._headers[path] = _Header(tensors, file.metadata())
        return self._headers[path]


@dataclass(frozen=True)
class _Header:
    """The tensors of one file, dtype and shape by name as they lie in it, and its own `__metadata__`."""

    tensors: dict[str, tuple[str, Shape]]
    metadata: dict[str, str] | None


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} is truncated or no safetensors file: {error}") from error


class OpenModel(NamedTuple):
    """A checked HuggingFace folder: the network's sizes, its weight table, and the tensors, not read yet."""

    arch: Architecture
    table: WeightTable
    weights: HFWeights


def open_model(folder: str | Path, parallel: ParallelConfig | None = None) -> OpenModel:
    """Open a HuggingFace folder whose tensors are those that its config.json asks for.

    Raises:
        UsageError: what `read_architecture`, `HFWeights` and `HFWeights.check` refuse, or (with `parallel`) a layout
            over which the model does not split.
    """
    arch = read_architecture(folder)
    if parallel is not None:
        check_layout(arch, parallel)
    table, weights = table_for(arch), HFWeights(folder)
    weights.check(table)
    return OpenModel(arch, table, weights)


def check_hf_output(output: str | Path, force: bool = False) -> None:
    """Raise UsageError if `output` exists, unless `force` is set and it is a HuggingFace folder."""
    output = Path(output)
    if not output.exists() and not output.is_symlink():
        return
    if not force:
        raise UsageError(f"{output} exists; give another output, or --force to replace it")
    if output.is_symlink() or not (output / "config.json").is_file():
        raise UsageError(f"{output} exists and is no HuggingFace folder; only such a folder is replaced")


def copy_companions(source: Path, output: Path) -> None:
    """Copy generation config, tokenizer and chat template, those of COPIED_FILES that are there."""
    for name in COPIED_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, output / name)


def write_config(source: Path, output: Path, dtype: torch.dtype, **changes: Any) -> None:
    """Write OUTPUT/config.json: the source's, with another dtype and `changes`."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    # transformers 5 writes dtype and reads both, 4 writes and reads torch_dtype.
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    config |= dict.fromkeys(keys, str(dtype).removeprefix("torch.")) | changes
    (output / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
