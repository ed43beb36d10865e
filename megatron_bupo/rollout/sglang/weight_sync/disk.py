"""Weight sync by files: a whole HuggingFace folder that trainer and servers can read."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from megatron_bupo.rollout.sglang.weight_sync.calls import Attempt, SyncMethod
from megatron_bupo.weights.hf_folder import HFFolder, write_hf_folder


class FolderOnDisk(SyncMethod):
    """POST /update_weights_from_disk. Only the newest version stays in `folder`, until `close`.

    No other run uses the folder: files that a killed run left there are removed before the first version is written.

    Raises (from `send`):
        UsageError: the folder cannot be written.
    """

    name = "disk"
    in_session = False
    in_parts = False  # the server loads a whole folder

    def __init__(self, folder: Path, hf_model: str) -> None:
        self._own, self._hf_model = folder.absolute(), hf_model
        self._newest: Path | None = None

    def send(self, attempt: Attempt, tensors: Iterable[tuple[str, Tensor]]) -> None:
        if self._newest is None and self._own.exists():
            shutil.rmtree(self._own)
        target = self._own / re.sub(r"[^\w.-]", "_", f"version-{attempt.version}")
        stream = iter(tensors)
        first = next(stream)
        written = HFFolder.like(self._hf_model, first[1].dtype)
        write_hf_folder(itertools.chain([first], stream), written, target, force=target.exists())
        if self._newest not in (None, target):
            shutil.rmtree(self._newest)
        self._newest = target
        body = {"model_path": str(target), "weight_version": attempt.version, "flush_cache": True}
        attempt.post(f"all tensors, in {target}", "/update_weights_from_disk", body)

    def close(self) -> None:
        if self._newest is not None:
            shutil.rmtree(self._own)
        self._newest = None


def sync_folder(weight_sync_dir: str | None, save: str | None) -> Path | None:
    """The folder of one run for its weights: below --weight-sync-dir, else below --save; None without both.

    Other runs may use --weight-sync-dir too. With --save the name is the same at each start of a run, so that the run
    removes what it left there when it was killed.
    """
    if weight_sync_dir is None:
        return Path(save) / "sglang" / "weights" if save else None
    name = hashlib.blake2b(os.path.realpath(save).encode(), digest_size=6).hexdigest() if save else uuid.uuid4()
    return Path(weight_sync_dir) / f"weights-{name}"
