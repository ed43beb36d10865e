"""Folders that appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_bupo.errors import UsageError
from megatron_bupo.files import new_folder


def test_a_folder_takes_its_name_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "made" / "too" / "out"
    with new_folder(target) as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "file").write_text("one")
        assert not target.exists() and partial == target.with_name(".out.partial")
    assert (target / "inner" / "file").read_text() == "one"
    (target.parent / ".out.partial").mkdir()  # left by a process that was killed
    (target.parent / ".out.partial" / "half").write_text("zero")
    with new_folder(target) as partial:
        (partial / "file").write_text("two")
    assert [path.name for path in target.iterdir()] == ["file"]
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_after_an_error_the_older_folder_is_still_there(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "file").write_text("one")

    def write(error: Exception) -> None:
        with new_folder(target) as partial:
            (partial / "file").write_text("two")
            raise error

    with pytest.raises(RuntimeError, match="half-way"):
        write(RuntimeError("half-way"))
    with pytest.raises(UsageError, match=r"out cannot be written: .* No space left"):
        write(OSError(28, "No space left on device"))
    assert (target / "file").read_text() == "one" and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="out cannot be written"), new_folder(tmp_path / "file" / "out"):
        pass
