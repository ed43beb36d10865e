"""A conversion's output is whole or not there, and nothing is overwritten by accident."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_bupo.config.train import ParallelConfig
from megatron_bupo.conversion.convert import hf_to_megatron, megatron_to_hf
from megatron_bupo.conversion.workers import Ranks
from megatron_bupo.errors import UsageError
from tests.parallel.launch import HANG_S
from tests.unit.converting import assert_same_files, convert, make_source


def test_nothing_is_overwritten_without_force(tmp_path: Path) -> None:
    make_source(tmp_path / "source")
    stored, back = tmp_path / "stored", tmp_path / "back"
    convert(tmp_path / "source", stored)
    megatron_to_hf(stored, back, Ranks())
    with pytest.raises(UsageError, match="exists; give another output, or --force"):
        hf_to_megatron(tmp_path / "source", stored, ParallelConfig(), Ranks())
    with pytest.raises(UsageError, match="exists; give another output, or --force"):
        megatron_to_hf(stored, back, Ranks())
    hf_to_megatron(tmp_path / "source", stored, ParallelConfig(), Ranks(), force=True)
    megatron_to_hf(stored, back, Ranks(), force=True)
    (stored / "latest_checkpointed_iteration.txt").write_text("30")  # a training run is never replaced
    with pytest.raises(UsageError, match="is no converted checkpoint; only such a folder is replaced"):
        hf_to_megatron(tmp_path / "source", stored, ParallelConfig(), Ranks(), force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "source", "stored"]
    assert_same_files(tmp_path / "source", back)


@dataclass(frozen=True)
class KilledHalfway(Ranks):
    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        seen = 0

        def done(num_bytes: int) -> None:
            nonlocal seen
            seen += num_bytes
            if seen > total / 2:
                os.kill(os.getpid(), signal.SIGKILL)

        yield done


def test_a_killed_conversion_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    make_source(tmp_path / "source")
    source, stored, back = tmp_path / "source", tmp_path / "stored", tmp_path / "back"
    context = multiprocessing.get_context("fork")

    def killed(target: Callable[..., object], *arguments: object) -> None:
        child = context.Process(target=target, args=arguments)
        child.start()
        child.join(HANG_S)
        assert child.exitcode == -signal.SIGKILL

    killed(hf_to_megatron, source, stored, ParallelConfig(), KilledHalfway())
    partial = tmp_path / ".stored.partial"
    assert not stored.exists() and list(partial.glob("release/*.distcp"))
    assert sorted(path.name for path in partial.iterdir()) == ["release"]
    assert not list(partial.glob("release/*metadata*"))
    convert(source, stored)
    killed(megatron_to_hf, stored, back, KilledHalfway())
    assert not back.exists() and not (tmp_path / ".back.partial" / "config.json").exists()
    megatron_to_hf(stored, back, Ranks())
    assert_same_files(source, back)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "source", "stored"]
