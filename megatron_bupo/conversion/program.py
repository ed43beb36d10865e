"""What the three programs in checkpoint_converters/ share beside their flags (config/converters.py)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from megatron_bupo.config.program import run_program
from megatron_bupo.flags import Group

_GroupT = TypeVar("_GroupT", bound=Group)


def run_converter(prog: str, config: type[_GroupT], work: Callable[[_GroupT], int | None]) -> int:
    """`run_program` for a `work` that imports torch itself."""
    # torch's memory in huge pages: a converter takes and gives back large blocks all the time. Read when torch starts.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    return run_program(prog, config, work)


def report(rank: int, text: str, num_bytes: int, started: float) -> None:
    """One line about finished work, on rank 0."""
    if rank == 0:
        seconds = time.monotonic() - started
        print(f"{text}: {num_bytes / 1e9:.2f} GB in {seconds:.2f} s ({num_bytes / 1e9 / seconds:.2f} GB/s)")


def report_tokenizer(rank: int, folder: str) -> None:
    """One line, on rank 0, where transformers would not go by the tokenizer.json of the folder."""
    if rank == 0 and (Path(folder) / "tokenizer.json").is_file():
        from megatron_bupo.data.tokenizer import transformers_note  # transformers, which --help does without

        if note := transformers_note(folder):
            print(note)
