"""Large files that are synced while they are written; tensors saved without the rest of their storage."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Of one call. For larger ones the kernel looks for larger pieces of free memory: up to ten times as much of its time.
_WRITE_BYTES = 1 << 18
# Sent to the disk every so often, so that one thread's waiting for it is another's time to work.
_SYNC_BYTES = 64_000_000


class SteadyFile(io.RawIOBase):
    """A file that is written in small calls and synced as it grows; `write` goes on where it left off."""

    def __init__(self, path: Path, create: bool = True) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | (os.O_CREAT | os.O_TRUNC if create else 0), 0o644)
        self._position = self._waiting = 0

    def write(self, data: Any, /) -> int:
        written = self.write_at(data, self._position)
        self._position += written
        return written

    def tell(self) -> int:
        return self._position

    def truncate(self, size: int | None = None) -> int:
        size = self._position if size is None else size
        os.truncate(self._descriptor, size)
        return size

    def write_at(self, data: bytes | memoryview, start: int) -> int:
        """Write all of `data` from byte `start` on; from several threads too."""
        raw = memoryview(data).cast("B")
        written = 0
        while written < len(raw):
            written += os.pwrite(self._descriptor, raw[written : written + _WRITE_BYTES], start + written)
        self._waiting += written
        if self._waiting >= _SYNC_BYTES:
            self._waiting = 0
            os.fsync(self._descriptor)
        return written

    def close(self) -> None:
        """Everything has reached the disk when this returns."""
        if not self.closed:
            os.fsync(self._descriptor)
            os.close(self._descriptor)
        super().close()


def own_bytes(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, contiguous, and no view of a larger one: pickle and torch.save write whole storages."""
    held = tensor.detach().to("cpu").contiguous()
    return held if held.untyped_storage().nbytes() == held.nbytes else held.clone(memory_format=torch.contiguous_format)
