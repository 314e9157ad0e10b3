"""A line of JSON becomes a document."""

from __future__ import annotations

import json
from typing import Any

from afn_ray import kept
from afn_ray.corpus import nested
from afn_ray.corpus.documents import (
    INVALID,
    Origin,
    clean_id,
    columns,
    document,
    garbled,
    labelled_document,
    problem,
    with_kept,
)
from afn_ray.corpus_values import Document, ReadOptions


def json_document(origin: Origin, line: str, options: ReadOptions) -> Document:
    """The document of one line of JSON; quarantined if it is not an object with the columns."""
    value = parse_line(line)
    if isinstance(value, _NotJson):
        num_invalid = line.count(INVALID)
        why = garbled(line, num_invalid)
        return problem(origin, f"not JSON: {value}{why and '; '}{why}", None, num_invalid)
    if not isinstance(value, dict):
        return problem(origin, f"line is {type(value).__name__}, expected an object")
    found = _object_document(origin, value, options)
    if not options.keep:
        return found
    paths = [column.path for column in kept.parse(options.keep)]
    return with_kept(found, nested.values(value, paths), options)


def _object_document(origin: Origin, value: dict[str, Any], options: ReadOptions) -> Document:
    """The document of a line whose object is ``value``."""
    doc_id = None
    if options.id_column is not None:
        found = nested.find(value, options.id_column)
        try:
            doc_id = _json_id(None if found is nested.MISSING else found, options.id_column)
        except ValueError as error:
            return problem(origin, str(error))
    cells = []
    for column in (options.text_column, options.labels):
        cell = None if column is None else nested.find(value, column)
        if cell is nested.MISSING:
            return problem(origin, f"no column {column!r}; it has: {columns(value)}", doc_id)
        cells.append(cell)
    text, labels = cells
    if options.labels is not None:
        return labelled_document(origin, text, labels, doc_id, options)
    if isinstance(text, list):
        try:
            text = nested.joined(text, options.text_column, options.max_document_bytes)
        except ValueError as error:
            return problem(origin, str(error), doc_id)
    if isinstance(text, str):
        return document(origin, text, doc_id, options)
    kind = "null" if text is None else f"{type(text).__name__}, expected a string"
    return problem(origin, f"{options.text_column} is {kind}", doc_id)


def _json_id(value: object, column: str) -> str | None:
    """``value`` as an id; None if it is null.

    Raises ``ValueError`` if it is neither a string nor a whole number.
    """
    if value is None:
        return None
    if isinstance(value, str):
        return clean_id(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise ValueError(
        f"{column} is {type(value).__name__}, expected a string or a whole number as an id"
    )


class _NotJson(str):
    """Reason why a line is not JSON."""


def parse_line(line: str) -> Any:
    """The JSON value in ``line``, or a ``_NotJson`` with the reason."""
    try:
        return json.loads(line)
    except RecursionError:
        return _NotJson("nested too deeply")
    except ValueError as error:  # also a number with too many digits, which is no JSONDecodeError
        return _NotJson(error)
