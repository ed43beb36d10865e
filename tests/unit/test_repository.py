"""House rules that no linter checks: lengths, swallowed exceptions, patches of other people's libraries."""

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("megatron_bupo", "checkpoint_converters", "tools", "examples", "benchmarks", "tests")
FILES = [ROOT / "setup.py", *sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
MAX_FILE_LINES, MAX_FUNCTION_LINES = 349, 59
FOREIGN = {"torch", "megatron", "transformers"}
# The one file that teaches megatron-core to run without CUDA.
MAY_PATCH = ROOT / "megatron_bupo" / "parallel" / "cpu.py"


def long_functions(tree: ast.Module) -> list[str]:
    return [
        f"{node.name} has {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]


def swallowed(tree: ast.Module) -> list[str]:
    """Handlers without an exception type, or those that do nothing with what they caught."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            idle = all(
                isinstance(line, ast.Pass | ast.Continue)
                or (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))
                for line in node.body
            )
            if node.type is None or (idle and ast.unparse(node.type) in ("Exception", "BaseException")):
                found.append(f"line {node.lineno}: a bare or blanket except")
            elif all(isinstance(line, ast.Pass) for line in node.body):
                found.append(f"line {node.lineno}: except ...: pass (contextlib.suppress says what may fail)")
    return found


def patches(tree: ast.Module) -> list[str]:
    """Assignments to attributes of what was imported from FOREIGN; torch.backends holds settings, not code."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                root = alias.name.partition(".")[0]
                names[alias.asname or root] = alias.name if alias.asname else root
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    found = []
    for target, line in _written_attributes(tree):
        root, _, rest = target.partition(".")
        origin = names.get(root, "")
        full = f"{origin}.{rest}"
        if origin.partition(".")[0] in FOREIGN and not full.startswith("torch.backends."):
            found.append(f"line {line}: {full}")
    return found


def _written_attributes(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """('torch.cuda.synchronize', line) for each assignment, deletion or setattr of an attribute with a dotted name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            yield ast.unparse(node), node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
            yield f"{ast.unparse(node.args[0])}.{ast.unparse(node.args[1])}", node.lineno


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_house_rules(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    problems = long_functions(tree) + swallowed(tree)
    if path != MAY_PATCH and "tests" not in path.relative_to(ROOT).parts:
        problems += patches(tree)
    lines = len(text.splitlines())
    if lines > MAX_FILE_LINES:
        problems.append(f"{lines} lines")
    assert problems == []


def test_the_rules_can_be_broken() -> None:
    """Each rule above on code that breaks it."""
    tree = ast.parse("def long():\n" + "    x = 1\n" * 59)
    assert long_functions(tree) == ["long has 60 lines"]
    handlers = "try:\n    f()\nexcept {}:\n    {}\n"
    assert swallowed(ast.parse(handlers.format("KeyError", "pass"))) != []
    assert swallowed(ast.parse(handlers.format("Exception", "..."))) != []
    assert swallowed(ast.parse("try:\n    f()\nexcept:\n    g()\n")) != []
    assert swallowed(ast.parse(handlers.format("KeyError", "x = None"))) == []
    for patch in (
        "import torch\ntorch.cuda.synchronize = print",
        "import torch.cuda as gpu\ngpu.synchronize: object = print",
        "from torch import cuda\nsetattr(cuda, 'synchronize', print)",
        "from megatron.core.models.gpt import GPTModel as Model\nModel.forward = print",
        "import transformers.models\ndel transformers.models.x",
    ):
        assert len(patches(ast.parse(patch))) == 1, patch
    for fine in (
        "import torch\ntorch.backends.cudnn.benchmark = False",
        "self.torch.x = 1",
        "import torch\ny = torch.x",
    ):
        assert patches(ast.parse(fine)) == [], fine


def test_ci_runs_all_tests() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().rstrip().endswith("make test")
    recipe = re.search(r"^test: lint.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe is not None
    assert recipe[1].splitlines()[-1].startswith("\t$(PY) -m pytest tests ")  # its closing line is the last one


def test_no_foreign_package_named_apex_is_required() -> None:
    calls = ast.walk(ast.parse((ROOT / "setup.py").read_text()))
    texts = [node.value for node in calls if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    assert any(text.startswith("megatron-core") for text in texts)
    assert not any(text.startswith("apex") for text in texts)
