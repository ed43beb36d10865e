"""Tiny sources for the converters' tests, and what to do with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_bupo.config.train import ParallelConfig
from megatron_bupo.conversion.convert import hf_to_megatron
from megatron_bupo.conversion.workers import Ranks
from tests.unit.tiny_hf import save_tiny

COMPANIONS = {
    "generation_config.json": '{"temperature": 0.6}',
    "tokenizer_config.json": "{}",
    "chat_template.jinja": "{{ messages }}",
}


def make_source(folder: Path, family: str = "qwen3", tied: bool = False, shards: str = "5GB") -> None:
    save_tiny(folder, family, tied, max_shard_size=shards)
    for name, text in COMPANIONS.items():
        (folder / name).write_text(text)


def save_as(folder: Path, change: Callable[[str, Tensor], Tensor | None]) -> None:
    """Rewrite every file of a folder with changed tensors, in their places."""
    for path in folder.glob("*.safetensors"):
        changed = {name: change(name, tensor) for name, tensor in load_file(path).items()}
        kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
        save_file(kept, path, metadata={"format": "pt"})


def convert(source: Path, output: Path) -> None:
    hf_to_megatron(source, output, ParallelConfig(), Ranks())


def assert_same_files(one: Path, other: Path) -> None:
    """The same file names with the same bytes, but for what no model needs."""
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
