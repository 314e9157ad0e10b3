"""Values as HTML tables, as notebooks show them: all text escaped, and the rows bounded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from html import escape
from typing import Any

import pyarrow as pa

from afn_ray.cells import cell_text, is_number, listed
from afn_ray.text import count, visible

MAX_ROWS = 20
"""Largest number of rows of a table; a note below it says how many there are."""
MAX_CHARS = 2_000
"""Largest length of a running text, in characters."""
MAX_COLUMNS = 30
"""Largest number of columns of a table; the note says how many there are."""


def table(caption: str, rows: pa.Table, *, more: bool = False) -> str:
    """The first ``MAX_ROWS`` of ``rows`` as an HTML table under ``caption``.

    ``more``: there are rows after these, whose number is not known.
    """
    num_columns = min(rows.num_columns, MAX_COLUMNS)
    heads = [_cell("th", name) for name in rows.column_names[:num_columns]]
    first = rows.slice(0, MAX_ROWS)
    columns = []
    for column in first.columns[:num_columns]:
        is_figure = is_number(column.type)
        columns.append([_cell("td", value, is_figure=is_figure) for value in listed(column)])
    lines = [_line(heads), *map(_line, zip(*columns, strict=True))]
    notes = []
    if more:
        notes.append(f"the first {count(first.num_rows, 'row')}; there are more")
    elif rows.num_rows > first.num_rows:
        notes.append(f"{first.num_rows} of {rows.num_rows:,} rows")
    elif not rows.num_rows:
        notes.append("no rows")
    if num_columns < rows.num_columns:
        notes.append(f"{num_columns} of {rows.num_columns:,} columns")
    return _table(caption, lines, notes)


def table_of(caption: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """``table`` of mappings that all have the keys of the first."""
    return table(caption, pa.Table.from_pylist(list(rows)))


def facts(caption: str, named: Mapping[str, Any]) -> str:
    """``named`` values as an HTML table of two columns; a value of None or "" is left out."""
    lines = []
    for name, value in named.items():
        if value is not None and value != "":
            lines.append(_line([_cell("th", name), _cell("td", value)]))
    return _table(caption, lines, [])


def text(paragraphs: Sequence[str]) -> str:
    """``paragraphs`` as HTML."""
    return "".join(f"<p>{_escaped(paragraph)}</p>\n" for paragraph in paragraphs)


def short(result: Any) -> str:
    """One line for ``repr(result)``, a dataclass: its type, its tables, and its run."""
    names = ["table"] if hasattr(result, "table") else [field.name for field in fields(result)]
    parts = []
    for name in names:
        rows = getattr(result, name)
        if isinstance(rows, pa.Table):
            parts.append(f"{count(rows.num_rows, 'row')} in .{name}")
    run = getattr(result, "run", None) or getattr(result, "uri", None)
    if isinstance(run, str):
        parts.append(visible(run))
    return f"<{type(result).__name__}: {', '.join(parts)}>"


def marked_text(pieces: Iterable[tuple[str, bool]]) -> str:
    """The beginning of a text, at most ``MAX_CHARS`` long, as HTML; pieces with True are marked."""
    shown: list[str] = []
    left = MAX_CHARS
    for piece, is_marked in pieces:
        if left <= 0:
            shown.append("…")
            break
        escaped = _escaped(piece[:left])
        left -= len(piece)
        shown.append(f"<mark>{escaped}</mark>" if is_marked else escaped)
    return f'<p dir="auto">{"".join(shown)}</p>\n'


def _table(caption: str, lines: Sequence[str], notes: Sequence[str]) -> str:
    named = f"<caption>{_escaped(caption)}</caption>\n" if caption else ""
    below = f"<p>{_escaped('; '.join(notes))}</p>\n" if notes else ""
    return f"<table>\n{named}{''.join(lines)}</table>\n{below}"


def _line(cells: Sequence[str]) -> str:
    return f"<tr>{''.join(cells)}</tr>\n"


def _cell(tag: str, value: Any, *, is_figure: bool = False) -> str:
    """A cell with the direction of its own text, so that it cannot reorder its neighbours."""
    side = "right" if is_figure else "left"
    shown = "<i>NULL</i>" if value is None else f"<bdi>{_escaped(cell_text(value))}</bdi>"
    return f'<{tag} style="text-align: {side}">{shown}</{tag}>'


def _escaped(text: str) -> str:
    return escape(visible(text, keep="\n\t"), quote=True)
