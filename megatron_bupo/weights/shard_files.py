"""safetensors files written tensor by tensor: a file's header is known before its first number is.

safetensors' own save_file wants a whole file in memory. The header here is what it writes, to the byte, where the
tensors are in its order (dtype, then name), so that an exact export has the very files that went in.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from megatron_bupo.weights.disk import SteadyFile
from megatron_bupo.weights.hf_files import DTYPES, INDEX_FILE
from megatron_bupo.weights.tensor_map import TensorMap

_ALIGNMENT = 8  # of a header's length


class ShardFiles:
    """The files of a TensorMap in one folder, all open; tensors come in any order, from several threads or ranks."""

    def __init__(self, folder: Path, tensor_map: TensorMap, create: bool) -> None:
        """Open the files; `create` on one rank, which makes them in their full size, before the others open them."""
        self._files: list[SteadyFile] = []
        self._places: dict[str, tuple[SteadyFile, int, torch.dtype, torch.Size]] = {}
        for file, metadata in tensor_map.file_metadata.items():
            entries = [entry for entry in tensor_map.tensors if entry.file == file]
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

    def write(self, name: str, tensor: Tensor) -> int:
        """Put a tensor in its place, cast to its dtype; the number of bytes."""
        file, start, dtype, shape = self._places[name]
        assert tensor.shape == shape, f"{name} is {list(tensor.shape)} instead of {list(shape)}"
        return file.write_at(tensor.detach().to(dtype).contiguous().flatten().view(torch.uint8).numpy().data, start)

    def close(self) -> None:
        """Everything reaches the disk before the folder takes its name."""
        for file in self._files:
            file.close()
        self._files.clear()


def write_index(folder: Path, tensor_map: TensorMap) -> None:
    """The index that belongs to several files, in transformers' spelling."""
    if tensor_map.index is not None:
        text = json.dumps(tensor_map.index, indent=2, ensure_ascii=False)
        (folder / INDEX_FILE).write_text(text + "\n", encoding="utf-8")
