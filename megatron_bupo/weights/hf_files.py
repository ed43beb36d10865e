"""HuggingFace folders on disk: safetensors read by slices, and written as a stream of shards.

Reading maps the files into memory: a rank touches only the pages of the slices that it asks for. pytorch_model.bin is
a pickle and is refused. Writing never holds more than one shard, and nothing has the output's name before it is whole.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_bupo.architectures.mapping import Shape, SliceLike
from megatron_bupo.architectures.table import WeightTable
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
    """A slice of a tensor in a file that refuses to hand out NaN and infinities."""

    name: str
    path: Path
    raw: Any

    def __getitem__(self, index: Any, /) -> Tensor:
        part: Tensor = self.raw[index]
        check_finite(part, f"{self.name} in {self.path}")
        return part


def check_finite(tensor: Tensor, name: str) -> None:
    """Raise UsageError, naming the tensor as `name`, where it has NaN or infinite values."""
    # NaN goes through both: forty times as fast as isfinite, and without a copy of the tensor.
    if tensor.numel() and not all(torch.isfinite(extreme) for extreme in torch.aminmax(tensor)):
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
        """What a file says about itself (`__metadata__`), usually {"format": "pt"}."""
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
            if name == "lm_head.weight" and table.arch.tied:
                self._check_tied(table.arch.vocab_size)
                continue
            raise UsageError(f"{name} in {self.path(name)} is no part of a {table.arch.family} model; it would be lost")

    def _check_tied(self, vocab_size: int) -> None:
        head, embedding = "lm_head.weight", "model.embed_tokens.weight"
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


def check_output(output: str | Path, force: bool = False) -> None:
    """Raise UsageError where `output` may not be written: it exists, and `force` is not set or it is no HF folder."""
    output = Path(output)
    if not output.exists() and not output.is_symlink():
        return
    if not force:
        raise UsageError(f"{output} exists; give another output, or --force to replace it")
    if output.is_symlink() or not (output / "config.json").is_file():
        raise UsageError(f"{output} exists and is no HuggingFace folder; only such a folder is replaced")


def write_hf_folder(
    tensors: Iterable[tuple[str, Tensor]],
    source: str | Path,
    output: str | Path,
    dtype: torch.dtype,
    max_shard_bytes: int = 5_000_000_000,
    force: bool = False,
) -> None:
    """Write a HuggingFace folder: the tensors in `dtype`, and config, generation config, tokenizer from `source`.

    One process writes. Draws nothing from `tensors` where the output is refused. Everything is written in a folder
    beside the output, which takes its name at the end; after a kill only that folder (.NAME.partial) is left, without
    config and index, and the next write removes it.

    Raises:
        UsageError: the output exists (see `check_output`) or cannot be written, or the source has no config.json.
    """
    source, output = Path(source), Path(output).absolute()
    check_output(output, force)
    if not (source / "config.json").is_file():
        raise UsageError(f"{source / 'config.json'} is missing; a HuggingFace folder has one")
    partial = output.with_name(f".{output.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_shards(tensors, partial, dtype, max_shard_bytes)
        copy_companions(source, partial)
        write_config(source, partial, dtype)
        _take_name(partial, output)
    except OSError as error:
        raise UsageError(f"{output} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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


def _write_shards(tensors: Iterable[tuple[str, Tensor]], folder: Path, dtype: torch.dtype, max_bytes: int) -> None:
    """Write shard by shard, then give them their final names (which hold their number) and write the index."""
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    total = shard_bytes = 0

    def flush() -> None:
        save_file(shard, folder / f"shard-{len(shards)}.part", metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        # A tensor of its own: one that shares storage with another cannot be saved, and a view would keep all of it.
        whole = torch.empty(tensor.shape, dtype=dtype, device="cpu").copy_(tensor.detach())
        if shard and shard_bytes + whole.nbytes > max_bytes:
            flush()
            shard_bytes = 0
        assert name not in shard, f"{name} came twice"
        shard[name] = whole
        shard_bytes += whole.nbytes
        total += whole.nbytes
    assert shard, "no tensor came"
    flush()
    if len(shards) == 1:
        os.replace(folder / "shard-0.part", folder / SINGLE_FILE)
        return
    names = [f"model-{at + 1:05d}-of-{len(shards):05d}.safetensors" for at in range(len(shards))]
    for at, name in enumerate(names):
        os.replace(folder / f"shard-{at}.part", folder / name)
    weight_map = {tensor: name for name, held in zip(names, shards, strict=True) for tensor in held}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _take_name(partial: Path, output: Path) -> None:
    """Put the finished folder in place; a replaced one is moved away first, as a full folder cannot be renamed over."""
    if not output.exists():
        os.replace(partial, output)
        return
    old = output.with_name(f".{output.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    os.replace(output, old)
    os.replace(partial, output)
    shutil.rmtree(old)
