"""The examples of a documentation page as files, so that tests run what the page shows."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "megatron_bupo"


def code_blocks(page: str, language: str = "python") -> dict[str, str]:
    """File name in the block's first line (`# name.py`) -> the other lines, for every such block of docs/PAGE."""
    text = (ROOT / "docs" / page).read_text()
    return dict(re.findall(rf"^```{language}\n# (\S+\.py)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))


def write_block(page: str, name: str, folder: Path) -> Path:
    """One block as a file of its name in a folder."""
    file = folder / Path(name).name
    file.write_text(code_blocks(page)[name])
    return file


def extended_project(page: str, folder: Path) -> Path:
    """A copy of the package in a new folder, with the page's files added to it and its changes made."""
    shutil.copytree(ROOT / PACKAGE, folder / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
    for name in code_blocks(page):
        if name.startswith(f"{PACKAGE}/"):
            assert not (folder / name).exists(), f"{name} is a file of the project already"
            write_block(page, name, (folder / name).parent)
    for name, diff in code_blocks(page, "diff").items():
        before = "".join(line[1:] for line in diff.splitlines(keepends=True) if line[0] != "+")
        after = "".join(line[1:] for line in diff.splitlines(keepends=True) if line[0] != "-")
        text = (folder / name).read_text()
        assert text.count(before) == 1, f"{name}: the lines that the page changes are there {text.count(before)} times"
        (folder / name).write_text(text.replace(before, after))
    return folder
