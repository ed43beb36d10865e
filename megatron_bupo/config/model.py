"""The flags of the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron_bupo.errors import UsageError
from megatron_bupo.flags import Group, flag

if TYPE_CHECKING:
    import torch


def check_hf_model(path: str) -> None:
    """Raise UsageError unless --hf-model is a folder with a config.json."""
    if not Path(path).is_dir():
        raise UsageError(f"--hf-model {path}: no such folder; give a HuggingFace folder on this machine")
    if not (Path(path) / "config.json").is_file():
        raise UsageError(f"--hf-model {path}: has no config.json; give a HuggingFace folder")


@dataclass(frozen=True)
class ModelConfig(Group):
    """model"""

    hf_model: str = flag("HuggingFace folder: config, tokenizer, safetensors", metavar="DIR")
    bf16: bool = flag("weights and activations in bfloat16 (fp32 otherwise)", False)

    def check(self) -> None:
        super().check()
        check_hf_model(self.hf_model)

    @property
    def dtype(self) -> torch.dtype:
        """Of parameters and activations. (torch takes a second to import: flags are checked without it.)"""
        import torch

        return torch.bfloat16 if self.bf16 else torch.float32

    @property
    def dtype_name(self) -> Literal["fp32", "bf16"]:
        """As run states and servers have it."""
        return "bf16" if self.bf16 else "fp32"
