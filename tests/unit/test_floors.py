"""One-way floors: a module imports from its own floor or lower ones, and nothing in a circle: no modules, no folders.

The floors are those of docs/design.md. Every import counts: inside functions, and under TYPE_CHECKING too.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE, OFFERED = "megatron_bupo", "megatron_bupo.lens"
# What the lowest floors must do without, whoever calls them: the highest floor without it.
FORBIDDEN = {"megatron": 1, "transformers": 1, "datasets": 2}


def read_floors(text: str) -> dict[str, int]:
    """Folder or module of the package -> its floor, from the lines `    FLOOR  NAME NAME ...  | what is there`."""
    lines = re.findall(r"^    (\d)  ([\w ]+?) +\| ", text, re.MULTILINE)
    return {name: int(floor) for floor, names in lines for name in names.split()}


FLOORS = read_floors((ROOT / "docs" / "design.md").read_text())


def floor_of(module: str) -> int:
    """The floor of a module such as 'megatron_bupo.rl.losses'; the package itself is at the bottom."""
    parts = module.split(".")
    if len(parts) == 1:
        return 0
    assert parts[1] in FLOORS, f"{module} has no floor: name its folder in docs/design.md"
    return FLOORS[parts[1]]


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
    """Imports from a higher floor. The package itself may name one module: what `import megatron_bupo` offers."""
    assert graph.get(PACKAGE, set()) <= {OFFERED}
    return sorted(
        f"{module} (floor {floor_of(module)}) imports {other} (floor {floor_of(other)})"
        for module, others in graph.items()
        for other in others
        if module != PACKAGE and floor_of(other) > floor_of(module)
    )


def siblings(graph: dict[str, set[str]]) -> dict[str, dict[str, set[str]]]:
    """For every folder, what lies in it (modules and folders) -> what it imports of the others in it.

    A folder is one node in the graph of the folder around it: between two folders, an import of any module in them
    counts.
    """
    inside: dict[str, dict[str, set[str]]] = {}
    for module, others in graph.items():
        parts = module.split(".")
        for depth in range(1, len(parts)):
            folder, child = ".".join(parts[:depth]), ".".join(parts[: depth + 1])
            imported = {".".join(other.split(".")[: depth + 1]) for other in others if other.startswith(f"{folder}.")}
            inside.setdefault(folder, {}).setdefault(child, set()).update(imported - {child})
    return inside


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


def test_no_circle_of_folders(sources: dict[str, tuple[str, bool]]) -> None:
    inside = siblings(graph_of(sources))
    assert {PACKAGE, f"{PACKAGE}.rollout", f"{PACKAGE}.rollout.sglang"} <= inside.keys()
    assert {folder: found for folder, graph in inside.items() if (found := circle(graph))} == {}


def test_every_folder_has_one_floor(sources: dict[str, tuple[str, bool]]) -> None:
    names = {module.split(".")[1] for module in sources if "." in module}
    assert names == FLOORS.keys()


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
        "megatron_bupo.rl.losses": ("from ..training import tracker\nfrom . import schedule", False),
        "megatron_bupo.rl.schedule": ("def f():\n    from megatron_bupo.rl.losses import loss", False),
        "megatron_bupo.training.tracker": ("import megatron_bupo.errors", False),
        "megatron_bupo.errors": ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .rl import x", False),
    }
    graph = graph_of(package)
    assert graph["megatron_bupo.rl.losses"] == {"megatron_bupo.training.tracker", "megatron_bupo.rl.schedule"}
    assert upward(graph) == [
        "megatron_bupo.errors (floor 0) imports megatron_bupo.rl (floor 1)",
        "megatron_bupo.rl.losses (floor 1) imports megatron_bupo.training.tracker (floor 6)",
    ]
    losses, schedule = "megatron_bupo.rl.losses", "megatron_bupo.rl.schedule"
    assert circle(graph) == [losses, schedule, losses]
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []


def test_a_circle_of_folders_is_seen_where_no_module_is_in_one() -> None:
    graph = {
        "p.a.one": {"p.b.one"},
        "p.a.two": set(),
        "p.b.one": set(),
        "p.b.two": {"p.a.two"},
        "p.b.inner.x": {"p.b.two"},
    }
    assert circle(graph) == []
    inside = siblings(graph)
    assert inside["p"] == {"p.a": {"p.b"}, "p.b": {"p.a"}}
    assert inside["p.b"] == {"p.b.one": set(), "p.b.two": set(), "p.b.inner": {"p.b.two"}}
    assert circle(inside["p"]) == ["p.a", "p.b", "p.a"]


def test_floors_are_read_from_the_page() -> None:
    assert read_floors("    0  errors files   | words\n    7  commands  __main__ | thin\ntext 1  a | b") == {
        "errors": 0,
        "files": 0,
        "commands": 7,
        "__main__": 7,
    }
