"""What texts, comments and scripts name is there: files of the project and modules of the package."""

from __future__ import annotations

import ast
import importlib
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.parallel.launch import ROOT

FOLDERS = ("megatron_bupo", "checkpoint_converters", "tools", "examples", "benchmarks", "tests", "docs")
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*")) if path.is_file()]
ROOT_FILES = ("README.md", "CHANGELOG.md", "Makefile", "pyproject.toml", "setup.py", ".ci/run")
# These name files that a reader of the page writes, or that a test makes up.
MADE_UP = {
    "docs/extending.md",
    "tests/unit/test_extending.py",
    "tests/unit/test_floors.py",
    "tests/unit/test_references.py",
}
TEXTS = [
    path
    for path in [*FILES, *(ROOT / name for name in ROOT_FILES)]
    if path.suffix in {".py", ".md", ".sh", ".sbatch", ".yaml", ".toml", ""}
    and str(path.relative_to(ROOT)) not in MADE_UP
]
PATH = re.compile(rf"\b(?:{'|'.join(FOLDERS)})/[\w/.-]+\.(?:py|md|sh|sbatch|yaml)\b")
NAME = re.compile(r"`([\w/]+\.(?:py|sh|sbatch))`")
# As comments inside the package name its files.
SHORT_PATH = re.compile(
    r"(?<![\w/.])(?:{})/[\w/]+\.py\b".format(
        "|".join(
            path.name
            for path in sorted((ROOT / "megatron_bupo").iterdir())
            if path.is_dir() and path.name != "__pycache__"
        )
    )
)
MODULE = re.compile(r"\bmegatron_bupo(?:\.[a-z][a-z_0-9]*)+")


def missing(text: str, in_a_page: bool) -> Iterator[str]:
    """Names in a text that are not there; in a page also bare names of files between backticks."""
    for match in PATH.finditer(text):
        if not (ROOT / match[0]).exists():
            yield match[0]
    for match in SHORT_PATH.finditer(text):
        if not (ROOT / "megatron_bupo" / match[0]).exists():
            yield match[0]
    if in_a_page:
        names = (match[1] for match in NAME.finditer(text))
        yield from (
            name for name in names if not any(str(path).endswith(f"/{name}") for path in (*FILES, ROOT / "setup.py"))
        )
    for match in MODULE.finditer(text):
        parts = match[0].split(".")
        # What follows a module or a package is a name in it.
        modules = [ROOT.joinpath(*parts[:end]).with_suffix(".py") for end in range(2, len(parts) + 1)]
        inside = ROOT.joinpath(*parts[:-1], "__init__.py")
        in_package = inside.exists() and re.search(rf"\b{parts[-1]}\b", inside.read_text(encoding="utf-8"))
        if not (any(path.exists() for path in modules) or ROOT.joinpath(*parts).is_dir() or in_package):
            yield match[0]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_named_is_there(path: Path) -> None:
    assert not list(missing(path.read_text(encoding="utf-8"), path.suffix == ".md"))


def test_old_names_are_found() -> None:
    text = "see megatron_bupo/training/no_such.py, model/light.py, megatron_bupo.weights.no_such and `no_such.py`"
    assert list(missing(text, in_a_page=True)) == [
        "megatron_bupo/training/no_such.py",
        "model/light.py",
        "no_such.py",
        "megatron_bupo.weights.no_such",
    ]
    text = "megatron_bupo.files.new_file, megatron_bupo/files.py, `score_worker.py` and `sglang/test_sync.py`"
    assert not list(missing(text, in_a_page=True))


SCRIPTS = sorted(
    path
    for folder in ("benchmarks", "checkpoint_converters", "tools", "examples")
    for path in (ROOT / folder).glob("*.py")
)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_what_a_script_imports_is_there(path: Path) -> None:
    """Also inside its functions: no linter follows imports from these folders."""
    runpy.run_path(str(path), run_name="imported")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("megatron_bupo", "tests")):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                assert hasattr(module, alias.name) or importlib.import_module(f"{node.module}.{alias.name}")
