"""The Python blocks of a documentation page, so that tests run what the page shows."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def code_blocks(page: str) -> dict[str, str]:
    """File name in the block's first line (`# name.py`) -> source, for every Python block of docs/PAGE."""
    blocks = re.findall(r"^```python\n# (\S+\.py)\n(.*?)^```$", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)
    return dict(blocks)


def write_block(page: str, name: str, folder: Path) -> Path:
    """One block as a file of its name in a folder."""
    file = folder / Path(name).name
    file.write_text(code_blocks(page)[name])
    return file
