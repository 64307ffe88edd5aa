"""The house stays easy to live in: no circle of files, no room with two ideas."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "sinkscope").rglob("*.py"))
}


def imports(name, path):
    """Every module of ours that a file names in an import, also inside functions; not those for types alone."""

    def inside(node):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in FILES else node.module
        for child in ast.iter_child_nodes(node):
            yield from inside(child)

    return {found for found in inside(ast.parse(path.read_text(encoding="utf-8"))) if found in FILES} - {name}


def circles(graph):
    """Groups of files that reach each other: Tarjan's components of more than one."""
    index, low, stack, found = {}, {}, [], []

    def visit(name):
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in graph[name]:
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            group = stack[stack.index(name) :]
            del stack[-len(group) :]
            found.append(sorted(group))

    for name in graph:
        if name not in index:
            visit(name)
    return [group for group in found if len(group) > 1]


def test_a_circle_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == [["b", "c"]]


def test_no_circle_of_files():
    assert circles({name: imports(name, path) for name, path in FILES.items()}) == []


def lines(function):
    """Of a function beside its docstring: arguments and body."""
    told = function.body[0] if ast.get_docstring(function) else None
    return function.end_lineno - function.lineno + 1 - (told.end_lineno - told.lineno + 1 if told else 0)


@pytest.mark.parametrize("name", FILES)
def test_a_room_has_one_idea(name):
    source = FILES[name].read_text(encoding="utf-8")
    assert source.count("\n") <= 300
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    assert {f"{name}.{node.name}": n for node in functions if (n := lines(node)) > 60} == {}
