"""Refuse a column without texts or ids before the run, and suggest the paths that have text."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from afn_ray.corpus import arrow_cells, documents, nested
from afn_ray.corpus_values import ReadOptions

DEPTH = 5
"""Most parts of a path that is suggested."""


def why_no_text(rows: Sequence[Mapping[str, Any]], options: ReadOptions) -> str:
    """Reason why the first ``rows`` of a JSONL file have no text or no id; empty if one has both.

    Nulls, empty lists and missing values prove nothing.
    """
    cells = _cells(rows, options.text_column)
    if cells and not any(map(_is_text, cells)):
        return _no_text(options.text_column, cells[0], rows[0])
    if options.id_column is None:
        return ""
    ids = _cells(rows, options.id_column)
    if ids and not any(map(_can_be_id, ids)):
        return (
            f"id column {options.id_column!r} is {_named(ids[0])}, which cannot be an id; expected "
            "strings or whole numbers. Name another column, or leave id_column out: then ids are "
            "content hashes"
        )
    return ""


def why_no_text_in(schema: pa.Schema, options: ReadOptions) -> str:
    """``why_no_text`` of a Parquet file's ``schema``; its ids are checked as it is cut."""
    kind = nested.type_at(schema, options.text_column)
    if kind is None:
        return ""
    if nested.is_list(kind) and (options.labels or arrow_cells.is_text(kind.value_type)):
        return ""
    if arrow_cells.is_text(kind):
        return ""
    row = {field.name: _example(field.type) for field in schema}
    return _no_text(options.text_column, nested.find(row, options.text_column), row)


def _cells(rows: Sequence[Mapping[str, Any]], path: str) -> list[Any]:
    """The values at ``path`` in ``rows`` that show their type."""
    cells = [nested.find(row, path) for row in rows]
    return [cell for cell in cells if cell not in (nested.MISSING, None, [])]


def _can_be_id(cell: object) -> bool:
    return isinstance(cell, str | int) and not isinstance(cell, bool)


def _is_text(cell: object) -> bool:
    """True if ``cell`` of JSON can be a text."""
    is_list = isinstance(cell, list) and all(isinstance(item, str) for item in cell)
    return isinstance(cell, str) or is_list


def _no_text(column: str, cell: object, row: Mapping[str, Any]) -> str:
    paths = list(itertools.islice(_paths(cell, [column]), nested.SHOWN_NAMES))
    if not paths:
        paths = list(itertools.islice(_paths(row, []), nested.SHOWN_NAMES))
    where = f"; text is in: {documents.columns(paths)}" if paths else ""
    return f"text column {column!r} is {_named(cell)}, expected strings{where}"


def _named(cell: object) -> str:
    """The kind of a value of JSON, in words."""
    if isinstance(cell, list):
        kinds = {_named(item) for item in cell}
        of_one = f" of {kinds.pop().split()[-1]}s" if len(kinds) == 1 else ""
        return f"a list{of_one}"
    names = {dict: "an object", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(cell), "a number")


def _paths(value: object, begin: Sequence[str]) -> Iterator[str]:
    """Paths from ``begin`` on that lead to a string in ``value``, or to a list of them."""
    if begin and _is_text(value) and value != []:
        yield ".".join(begin)
    elif isinstance(value, dict) and len(begin) < DEPTH:
        for name, inner in value.items():
            yield from _paths(inner, [*begin, str(name)])
    elif isinstance(value, list) and value and len(begin) < DEPTH:
        yield from _paths(value[0], [*begin, "0"])


def _example(kind: pa.DataType) -> object:
    """A value of JSON with the form of an Arrow type."""
    if pa.types.is_struct(kind):
        return {field.name: _example(field.type) for field in kind}
    if nested.is_list(kind):
        return [_example(kind.value_type)]
    if pa.types.is_null(kind):
        return None
    if pa.types.is_boolean(kind):
        return False
    return "" if arrow_cells.is_text(kind) else 0
