"""How the modules stand to each other: what a module imports, anywhere in it, does not lead back to it."""

from __future__ import annotations

import ast
import re
import sys
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


# What the engines and peers bring that Headway plugs into, and what declared packages are made of.
BROUGHT_ALONG = {
    "jinja2": "torch",
    "llvmlite": "numba",
    "pydantic": "fastapi",
    "starlette": "fastapi",
    "sglang": "an environment with SGLang",
    "vllm": "an environment with vLLM",
}


def test_what_is_imported_is_declared_outside_of_dev() -> None:
    """A package that only tests bring makes the program fail everywhere but here."""
    root = SOURCE.parent
    declared = (root / "pyproject.toml").read_text().split("\ndev = [")[0]
    names = {name.replace("-", "_") for name in re.findall(r'"([\w-]+)(?:\[[\w,]+\])?>=', declared)}
    assert {"torch", "openai", "prometheus_client"} <= names
    found = {*sys.stdlib_module_names, *names, *BROUGHT_ALONG, "headway"}
    for path in [*SOURCE.rglob("*.py"), *(root / "script").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                wanted = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module is not None and not node.level:
                wanted = {node.module.split(".")[0]}
            else:
                continue
            assert wanted <= found, f"{path.relative_to(root)} imports {wanted - found}"
