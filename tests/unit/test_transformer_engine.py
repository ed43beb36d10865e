"""When transformer-engine's layers are used. None of this needs the package."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from megatron_bupo.ops import transformer_engine
from tests.parallel.launch import child_environment

CHECK = """
import sys, torch
from megatron_bupo.config.train import ParallelConfig
from megatron_bupo.parallel.setup import parallel_state
with parallel_state(ParallelConfig(), seed=0):
    import megatron.core.optimizer as optimizer
    assert optimizer.Adam is torch.optim.AdamW
assert "transformer_engine" not in sys.modules and "apex" not in sys.modules
"""


def test_without_a_gpu_it_is_not_there(tmp_path: Path) -> None:
    """Its optimizer and apex's are imported wherever they can be, and need a GPU."""
    for name in ("transformer_engine", "apex"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise RuntimeError('{name} is imported')\n")
    environment = child_environment() | {"PYTHONPATH": f"{tmp_path}:{child_environment()['PYTHONPATH']}"}
    done = subprocess.run([sys.executable, "-c", CHECK], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_fp32_does_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformer_engine, "is_available", lambda: True)
    assert transformer_engine.is_used(torch.bfloat16)
    assert not transformer_engine.is_used(torch.float32)


@pytest.mark.parametrize(
    ("theirs", "ours", "said"), [((9, 19, 0), 91900, None), ((9, 14, 0), 91900, "9.14.0 and torch 9.19.0")]
)
def test_two_versions_of_cudnn_are_named(
    theirs: tuple[int, int, int], ours: int, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    utils = types.ModuleType("transformer_engine.pytorch.utils")
    utils.get_cudnn_version = lambda: theirs  # type: ignore[attr-defined]
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, utils.__name__, utils)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: ours)
    line = transformer_engine.other_cudnn()
    assert (line is None) if said is None else (line is not None and said in line and "\n" not in line)
