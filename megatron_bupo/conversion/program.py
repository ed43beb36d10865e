"""What the three programs in checkpoint_converters/ share: their flags, and how they end."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from megatron_bupo.config.train import ParallelConfig
from megatron_bupo.errors import UsageError

USAGE_ERROR, INTERRUPTED = 2, 130
DTYPES = ("float32", "bfloat16", "float16")
_LAYOUT = {
    "tensor_model_parallel_size": "ranks that share each weight matrix",
    "pipeline_model_parallel_size": "ranks that share the layers",
    "num_virtual_stages_per_pipeline_rank": "interleaved stages on each pipeline rank",
}


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, and the flags that the converters share."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False, usage="%(prog)s [flags]")

    def error(self, message: str) -> NoReturn:
        raise UsageError(message.removeprefix("argument "))

    def add_folder(self, name: str, help: str) -> None:
        self.add_argument(name, metavar="DIR", required=True, help=help)

    def add_layout(self, help: str) -> None:
        group = self.add_argument_group("parallel layout", help)
        for name, text in _LAYOUT.items():
            group.add_argument(f"--{name.replace('_', '-')}", type=_size, default=1, metavar="N", help=text)

    def add_force(self) -> None:
        self.add_argument("--force", action="store_true", help="replace the output where it is of the same kind")


def layout_of(arguments: argparse.Namespace) -> ParallelConfig:
    """The checked layout of `add_layout`'s flags."""
    config = ParallelConfig(**{name: getattr(arguments, name) for name in _LAYOUT})
    config.check()
    return config


def check_hf_model(path: str) -> None:
    """Raise UsageError unless `--hf-model` is a folder with a config.json."""
    if not (Path(path) / "config.json").is_file():
        raise UsageError(f"--hf-model {path}: has no config.json; give a HuggingFace folder on this machine")


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


def run_program(prog: str, program: Callable[[Sequence[str]], int]) -> int:
    """The exit code of `program(words)`; 2 for bad input (one line on rank 0's stderr), 130 for Ctrl-C."""
    # torch's memory in huge pages: a converter takes and gives back large blocks all the time. Read when torch starts.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        return program(sys.argv[1:])
    except UsageError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED


def _size(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be an integer from 1")
    return int(text)
