"""Names and docstrings: a name has one meaning, and a docstring begins with its subject."""

from __future__ import annotations

import ast
import gc
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
ORPHANS = {"As", "By", "How", "Of", "That", "What", "Where", "Whether", "Which", "Why"}
"""First words of a sentence that has no subject."""


IN_SQL_TOO = {"is_high", "wilson"}
"""Functions that exist twice: on arrays, and as SQL of the same rule."""


@pytest.fixture(autouse=True, scope="module")
def no_collection() -> Iterator[None]:
    """Millions of nodes are no garbage: looking for it takes three times as long as parsing."""
    gc.disable()
    yield
    trees.cache_clear()
    gc.enable()


@cache
def trees(*folders: str) -> dict[str, ast.Module]:
    """Syntax tree of each module in ``folders``, by its path."""
    paths = [path for folder in folders for path in (PROJECT / folder).rglob("*.py")]
    return {p.relative_to(PROJECT).as_posix(): ast.parse(p.read_text("utf-8")) for p in paths}


@cache
def defined() -> set[tuple[str | None, str]]:
    """Module and name of each public function at the top of a module of the package."""
    found: set[tuple[str | None, str]] = set()
    for path, tree in trees("afn_ray").items():
        module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        found |= {(module, n.name) for n in tree.body if isinstance(n, ast.FunctionDef)}
    return found


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """``node`` and the statements in it, without their expressions, which are ten times as many."""
    yield node
    for name in ("body", "orelse", "handlers", "finalbody", "cases"):
        for child in getattr(node, name, ()):
            yield from statements(child)


def docstrings(tree: ast.Module) -> Iterator[str]:
    """Docstrings of modules, classes, functions and constants."""
    for node in statements(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for statement in node.body:
            match statement:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    yield text


def test_two_public_classes_do_not_share_a_name() -> None:
    places = defaultdict(list)
    for path, tree in trees("afn_ray").items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(path)
    assert len(places) > 100
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_an_alias_that_two_modules_define_is_the_same_type() -> None:
    """``OnMessage = Callable[[str], None]`` may stand in two rooms; it may not differ."""
    types = defaultdict(set)
    for tree in trees("afn_ray").values():
        for node in tree.body:
            if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
                continue
            name = node.targets[0].id
            if name[0].isupper() and not name.isupper():
                types[name].add(ast.unparse(node.value))
    assert len(types) > 20
    assert {name: found for name, found in types.items() if len(found) > 1} == {}


def test_a_function_that_is_imported_by_its_name_alone_has_that_name_alone() -> None:
    modules = defaultdict(set)
    for tree in trees("afn_ray").values():
        for node in statements(tree):
            if not isinstance(node, ast.ImportFrom):
                continue
            for alias in node.names:
                if alias.asname is None and (node.module, alias.name) in defined():
                    modules[alias.name].add(node.module)
    shared = {name: found for name, found in modules.items() if len(found) > 1}
    assert len(modules) > 300
    assert set(shared) == IN_SQL_TOO


def test_docstrings_begin_with_their_subject() -> None:
    read = {**trees("afn_ray"), **trees("jobs", "infra", "tests")}
    found = [(path, text) for path, tree in read.items() for text in docstrings(tree)]
    assert len(found) > 3000
    orphaned = [(path, text) for path, text in found if text.split()[0].rstrip(",") in ORPHANS]
    assert orphaned == []
