"""One-way floors: a module imports from its own floor or lower ones, and never in a circle.

Every import counts: inside functions, and under TYPE_CHECKING too.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "megatron_bupo"

# The longest name that a module begins with decides.
FLOORS = {
    "errors": 0, "files": 0, "policy_spec": 0, "samples": 0,
    "flags": 0, "stop_bounds": 0, "config": 0, "rollout_config": 0, "command_config": 0,
    "rl": 1, "rewards": 1,
    "parallel": 2,
    "model": 3, "weights": 3,
    "data": 4, "rollout": 4, "training": 4, "tracking": 4,
    "training.trainer": 5, "evaluation": 5, "analysis": 5,
    "cli": 6, "commands": 6, "__main__": 6,
}  # fmt: skip
# What the lower floors must do without, whoever calls them.
FORBIDDEN = {"megatron": 1, "transformers": 1, "datasets": 3}


def floor_of(module: str) -> int:
    """The floor of a module such as 'megatron_bupo.rl.losses'; the package itself is at the bottom."""
    name = module.removeprefix(PACKAGE).removeprefix(".")
    if not name:
        return 0
    fitting = [key for key in FLOORS if name == key or name.startswith(f"{key}.")]
    assert fitting, f"{module} has no floor: name one in FLOORS"
    return FLOORS[max(fitting, key=len)]


def imports_of(source: str, module: str, is_package: bool) -> set[str]:
    """Full names of what a module imports; `from a import b` counts as a.b (and a.b may be a name inside a)."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                above = parts[: len(parts) - node.level + is_package]
                base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def resolve(name: str, modules: set[str]) -> str | None:
    """The module of the package that an imported name is or lies in."""
    while name:
        if name in modules:
            return name
        name = name.rpartition(".")[0]
    return None


def graph_of(sources: dict[str, tuple[str, bool]]) -> dict[str, set[str]]:
    """module -> modules of the package that it imports, from module -> (source, is it a package)."""
    names = set(sources)
    graph: dict[str, set[str]] = {}
    for module, (source, is_package) in sources.items():
        inner = {resolve(name, names) for name in imports_of(source, module, is_package)}
        graph[module] = {name for name in inner if name is not None and name != module}
    return graph


def upward(graph: dict[str, set[str]]) -> list[str]:
    return sorted(
        f"{module} (floor {floor_of(module)}) imports {other} (floor {floor_of(other)})"
        for module, others in graph.items()
        for other in others
        if floor_of(other) > floor_of(module)
    )


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one circle, or an empty list: what is left after all that import nothing left are taken away."""
    left = dict(graph)
    while free := [module for module, others in left.items() if not others & left.keys()]:
        for module in free:
            del left[module]
    path: list[str] = []
    while left and (not path or path[-1] not in path[:-1]):
        path.append(min(left[path[-1]] & left.keys()) if path else min(left))
    return path[path.index(path[-1]) :] if path else []


@pytest.fixture(scope="module")
def sources() -> dict[str, tuple[str, bool]]:
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        found[".".join(parts[:-1] if is_package else parts)] = (path.read_text(), is_package)
    return found


def test_every_import_goes_down(sources: dict[str, tuple[str, bool]]) -> None:
    assert len(sources) > 10
    assert upward(graph_of(sources)) == []


def test_no_circle(sources: dict[str, tuple[str, bool]]) -> None:
    assert circle(graph_of(sources)) == []


def test_low_floors_do_without_the_heavy_libraries(sources: dict[str, tuple[str, bool]]) -> None:
    found = [
        f"{module} imports {name}"
        for module, (source, is_package) in sources.items()
        for name in imports_of(source, module, is_package)
        if floor_of(module) <= FORBIDDEN.get(name.partition(".")[0], -1)
    ]
    assert found == []


def test_the_reader_sees_every_way_of_importing() -> None:
    """The checks above on a made-up package that breaks both rules in all the spellings of an import."""
    package = {
        "megatron_bupo": ("", True),
        "megatron_bupo.rl": ("", True),
        "megatron_bupo.rl.losses": ("from .. import tracking\nfrom . import schedule", False),
        "megatron_bupo.rl.schedule": ("def f():\n    from megatron_bupo.rl.losses import loss", False),
        "megatron_bupo.tracking": ("import megatron_bupo.errors", False),
        "megatron_bupo.errors": ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .rl import x", False),
    }
    graph = graph_of(package)
    assert graph["megatron_bupo.rl.losses"] == {"megatron_bupo.tracking", "megatron_bupo.rl.schedule"}
    assert upward(graph) == [
        "megatron_bupo.errors (floor 0) imports megatron_bupo.rl (floor 1)",
        "megatron_bupo.rl.losses (floor 1) imports megatron_bupo.tracking (floor 4)",
    ]
    losses, schedule = "megatron_bupo.rl.losses", "megatron_bupo.rl.schedule"
    assert circle(graph) == [losses, schedule, losses]
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
