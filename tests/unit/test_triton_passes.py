"""The passes over one tile, Triton's (interpreted without a GPU) and torch's, against float64: bf16 and scales too.

Interpreted, Triton cuts to bf16 where a GPU rounds: off by at most 2^-7 of the number instead of 2^-8.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_bupo.ops import tiles, torch_passes
from tests.unit.interpreted import interpreted_triton_passes

ROWS, COLUMNS, FIRST, SCALE = 3, 37, 50, 1.7
TARGETS = torch.tensor([FIRST, FIRST + COLUMNS, FIRST + COLUMNS - 1])  # the second is beyond the tile


@pytest.fixture(params=["torch", "triton"])
def passes(request: pytest.FixtureRequest) -> tiles.Passes:
    return interpreted_triton_passes() if request.param == "triton" else torch_passes


@pytest.fixture
def tile() -> Tensor:
    return 3 * torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))


def scratch() -> Tensor:
    """Larger than the tile, as it is for the last tiles of a matrix."""
    return torch.full((ROWS * COLUMNS + 5,), math.nan)


@pytest.mark.parametrize("block", [16, 64])
def test_running_sums_go_on_from_what_they_are(
    passes: tiles.Passes, tile: Tensor, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "_BLOCK", block, raising=False)
    bits = SCALE * tile.double()
    before = torch.tensor([[-5.0, 40.0, 0.5], [2.0, 1.0, 3.0], [-0.5, 0.0, -1.0], [0.0, 7.0, 0.0]])
    columns = torch.full((4, ROWS + 2), math.nan)  # the rows of a tile are a part of all rows
    columns[:, 1:-1] = before
    passes.reduce(tile.clone(), SCALE, TARGETS, FIRST, columns[:, 1:-1], scratch())
    top = torch.maximum(before[0].double(), bits.amax(1))
    moved = (before[0].double() - top).exp2()
    total = before[1] * moved + (bits - top[:, None]).exp2().sum(1)
    weighted = (before[2] + before[1] * (before[0].double() - top)) * moved
    weighted += ((bits - top[:, None]) * (bits - top[:, None]).exp2()).sum(1)
    target = torch.stack([bits[0, 0], torch.tensor(7.0, dtype=torch.float64), bits[2, -1]])
    expected = torch.stack([top, total, weighted, target])
    torch.testing.assert_close(columns[:, 1:-1].double(), expected, rtol=2e-6, atol=2e-6)
    assert columns[:, [0, -1]].isnan().all()


@pytest.mark.parametrize("has_slope", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient(passes: tiles.Passes, tile: Tensor, has_slope: bool, dtype: torch.dtype) -> None:
    bits = SCALE * tile.double()
    lse_bits = bits.exp2().sum(1).log2() + 1  # the tile has half of the probability
    offset, slope, d_target = torch.randn(3, ROWS, generator=torch.Generator().manual_seed(2))
    columns = torch.stack([lse_bits.float(), offset, slope if has_slope else torch.full((ROWS,), math.nan), d_target])
    found = passes.gradient(tile.clone(), SCALE, TARGETS, FIRST, columns, has_slope, scratch(), dtype)
    log2_p = bits - lse_bits[:, None]
    factor = offset[:, None] + (slope[:, None] * log2_p if has_slope else 0)
    expected = log2_p.exp2() * factor
    expected[0, 0] += d_target[0]
    expected[2, -1] += d_target[2]
    assert found.dtype == dtype
    assert found.shape == tile.shape
    rounding = 2**-7 if dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(found.double(), expected, rtol=rounding, atol=2e-6)


@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probabilities(
    passes: tiles.Passes, tile: Tensor, dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "_BLOCK", block, raising=False)
    tile[0, [5, 20]] = tile[0].max() + 1  # the first of equals
    bits = SCALE * tile.double()
    lse_bits = bits.exp2().sum(1).log2()
    parts, top, column = passes.probabilities(tile.clone(), SCALE, lse_bits.float(), scratch(), dtype)
    assert {part.dtype for part in parts} == {dtype}
    p = torch.stack([part.double() for part in parts]).sum(0)
    # One bf16 number alone would be off by more than 2^-9 of itself.
    torch.testing.assert_close(p, (bits - lse_bits[:, None]).exp2(), rtol=2**-14, atol=1e-9)
    torch.testing.assert_close(top.double(), bits.amax(1), rtol=1e-6, atol=0)
    assert column.tolist() == [5, *bits[1:].argmax(1).tolist()]


def test_the_kernels_compile_for_gpus(tmp_path: Path) -> None:
    """The interpreter takes what the compiler would refuse."""
    pytest.importorskip("triton", reason="triton has no wheel for this platform")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = str(Path(__file__).with_name("compile_kernels.py"))
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 8
