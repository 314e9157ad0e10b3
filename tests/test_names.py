"""Names: a class of the package has one meaning, wherever it is read."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "afn_ray"


def test_two_public_classes_do_not_share_a_name() -> None:
    places = defaultdict(list)
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(path.relative_to(PACKAGE).as_posix())
    assert len(places) > 100
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_an_alias_that_two_modules_define_is_the_same_type() -> None:
    """``OnMessage = Callable[[str], None]`` may stand in two rooms; it may not differ."""
    types = defaultdict(set)
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text("utf-8")).body:
            if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
                continue
            name = node.targets[0].id
            if name[0].isupper() and not name.isupper():
                types[name].add(ast.unparse(node.value))
    assert len(types) > 20
    assert {name: found for name, found in types.items() if len(found) > 1} == {}
