"""A conversion in one process needs the memory of a shard and a few parameters, whatever the size of the model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_bupo.architectures.families import read_architecture
from megatron_bupo.architectures.table import table_for
from megatron_bupo.weights.hf_folder import HFFolder, write_hf_folder
from megatron_bupo.weights.tensor_map import TensorMap
from tests.parallel.launch import assert_passed, run_python

SHARD_MB, LIMIT_MB, MODEL_MB = 50, 150, 600
CONFIG = {
    "model_type": "llama",
    "vocab_size": 4001,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


def peak_mb(direction: str, source: Path, output: Path) -> float:
    result = run_python("tests/unit/converter_memory.py", direction, source, output)
    assert_passed(result)
    return float(result.stdout)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_peak_is_far_below_the_model(tmp_path: Path) -> None:
    (tmp_path / "template").mkdir()
    (tmp_path / "template" / "config.json").write_text(json.dumps(CONFIG))
    shapes = table_for(read_architecture(tmp_path / "template")).hf_shapes()
    values = torch.randn(4001 * 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    source, stored, back = tmp_path / "source", tmp_path / "stored", tmp_path / "back"

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, shape in shapes.items():
            yield name, values[: torch.Size(shape).numel()].view(shape)

    files = TensorMap.sharded(((name, shape, torch.bfloat16) for name, shape in shapes.items()), SHARD_MB * 10**6)
    write_hf_folder(tensors(), HFFolder(files, tmp_path / "template"), source)
    size = sum(path.stat().st_size for path in source.glob("*.safetensors")) / 2**20
    assert size > MODEL_MB and len(list(source.glob("*.safetensors"))) > 10
    peaks = peak_mb("to-megatron", source, stored), peak_mb("to-hf", stored, back)
    assert max(peaks) < LIMIT_MB, peaks
    for path in source.glob("*.safetensors"):
        assert path.read_bytes() == (back / path.name).read_bytes()
