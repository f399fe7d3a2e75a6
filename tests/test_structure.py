"""How the modules stand to each other: what a module imports, anywhere in it, does not lead back to it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import headway

SOURCE = Path(headway.__file__).parents[1]


def modules() -> dict[str, Path]:
    """Every module by name, but for the package itself, which only names what lies in it."""
    paths = {path.relative_to(SOURCE): path for path in (SOURCE / "headway").rglob("*.py")}
    names = {".".join(at.with_suffix("").parts): path for at, path in paths.items()}
    return {name.removesuffix(".__init__"): path for name, path in names.items()}


def imported(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules that one imports: at its head, within functions, and for its types alone."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in known else node.module for name in whole)


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in turn, the first again at the end; empty where none do."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_imports_run_in_one_direction() -> None:
    known = modules()
    graph = {name: {*imported(path, known)} & known.keys() for name, path in known.items()}
    del graph["headway"]
    for name, found in graph.items():
        found -= {name, "headway"}
    assert len(graph) > 150
    assert circle(graph) == []


def test_a_circle_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("def f():\n    from m import b\n")
    (tmp_path / "b.py").write_text("if False:\n    from m.c import d\n")
    (tmp_path / "c.py").write_text("import m.a\n")
    known = {f"m.{name}": tmp_path / f"{name}.py" for name in "abc"}
    graph = {name: set(imported(path, known)) for name, path in known.items()}
    assert graph == {"m.a": {"m.b"}, "m.b": {"m.c"}, "m.c": {"m.a"}}
    assert len(circle(graph)) == 4
