"""HuggingFace folders written tensor by tensor: `--save-hf`, weight sync by disk and the converters' export.

A file's header is known before its first number is. (safetensors' own save_file wants a whole file in memory.) The
header here is what it writes, to the byte, where the tensors are in its order (dtype, then name), so that an exact
export has the very files that went in.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_bupo.architectures.families import read_architecture
from megatron_bupo.architectures.family import HF_EMBEDDING, HF_UNEMBEDDING
from megatron_bupo.architectures.table import table_for
from megatron_bupo.files import new_folder
from megatron_bupo.weights.disk import SteadyFile
from megatron_bupo.weights.hf_files import (
    DTYPES,
    INDEX_FILE,
    HFWeights,
    check_hf_output,
    copy_companions,
    write_config,
)
from megatron_bupo.weights.tensor_map import TensorMap

_ALIGNMENT = 8  # of a header's length


@dataclass(frozen=True)
class HFFolder:
    """A HuggingFace folder that is to be written.

    Args:
        tensors: names, dtypes, shapes and files.
        source: the folder that has config, generation config, tokenizer and chat template.
        exact: config.json is copied as it is; else it says the widest dtype of the tensors, and `config_changes`.
        texts: further files.
        tied: the unembedding is the embedding, and is written from it if `tensors` has both.
    """

    tensors: TensorMap
    source: Path
    exact: bool = False
    config_changes: dict[str, Any] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    tied: bool = False

    @classmethod
    def like(cls, source: str | Path, dtype: torch.dtype) -> HFFolder:
        """The tensors and files of a model's own folder, all tensors in `dtype`."""
        table = table_for(read_architecture(source))
        given = TensorMap.of(HFWeights(source), table)
        tensors = given.with_dtypes(dict.fromkeys(given.dtypes(), dtype))
        return cls(tensors, Path(source), exact=tensors is given, tied=table.arch.tied)

    def finish(self, folder: Path) -> None:
        """Write everything that lies beside the tensors."""
        if self.tensors.index is not None:
            text = json.dumps(self.tensors.index, indent=2, ensure_ascii=False)
            (folder / INDEX_FILE).write_text(text + "\n", encoding="utf-8")
        copy_companions(self.source, folder)
        for name, text in self.texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        if self.exact:
            (folder / "config.json").write_bytes((self.source / "config.json").read_bytes())
        else:
            widest = max(self.tensors.dtypes().values(), key=lambda dtype: dtype.itemsize)
            write_config(self.source, folder, widest, **self.config_changes)


def write_hf_folder(
    tensors: Iterable[tuple[str, Tensor]], target: HFFolder, output: str | Path, force: bool = False
) -> None:
    """Write a HuggingFace folder from a stream of tensors, in any order and on any device. One process.

    No more than one tensor is held at a time, and none is drawn where the output is refused. The folder has its name
    only when it is whole (see `new_folder`).

    Raises:
        UsageError: the output exists (see `check_hf_output`) or cannot be written.
    """
    check_hf_output(output, force)
    with new_folder(output) as folder:
        with closing(ShardFiles(folder, target, create=True)) as files:
            written = sum(files.write(name, tensor) for name, tensor in tensors)
        assert written == target.tensors.nbytes, f"{written} of {target.tensors.nbytes} bytes came"
        target.finish(folder)


class ShardFiles:
    """The safetensors files of an HFFolder, all open; tensors come in any order, from several threads or ranks."""

    def __init__(self, folder: Path, target: HFFolder, create: bool) -> None:
        """Open the files; `create` on one rank, which makes them in their full size, before the others open them."""
        self._files: list[SteadyFile] = []
        self._places: dict[str, tuple[SteadyFile, int, torch.dtype, torch.Size]] = {}
        for file, metadata in target.tensors.file_metadata.items():
            entries = [entry for entry in target.tensors.tensors if entry.file == file]
            header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
            end = 0
            for entry in entries:
                offsets = [end, end + entry.nbytes]
                header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
                end += entry.nbytes
            text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
            text += b" " * (-len(text) % _ALIGNMENT)
            start = 8 + len(text)
            opened = SteadyFile(folder / file, create)
            self._files.append(opened)
            if create:
                opened.write(len(text).to_bytes(8, "little") + text)
                opened.truncate(start + end)
            for entry in entries:
                shape = torch.Size(entry.shape)
                self._places[entry.name] = (opened, start, DTYPES[entry.dtype], shape)
                start += entry.nbytes
        self._doubled = target.tied and HF_UNEMBEDDING in self._places

    def write(self, name: str, tensor: Tensor) -> int:
        """Put a tensor in its place, cast to its dtype; the number of bytes.

        A tied embedding is written to the unembedding's place too, where the folder has one.
        """
        copied = self.write(HF_UNEMBEDDING, tensor) if self._doubled and name == HF_EMBEDDING else 0
        file, start, dtype, shape = self._places[name]
        assert tensor.shape == shape, f"{name} is {list(tensor.shape)} instead of {list(shape)}"
        numbers = tensor.detach().to("cpu", dtype).contiguous().flatten().view(torch.uint8).numpy()
        return copied + file.write_at(numbers.data, start)

    def close(self) -> None:
        """Everything reaches the disk before the folder is renamed to its final name."""
        for file in self._files:
            file.close()
        self._files.clear()
