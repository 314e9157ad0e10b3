"""A line of JSON becomes a document."""

from __future__ import annotations

import json
from typing import Any

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
    value = parse(line)
    if isinstance(value, _NotJson):
        num_invalid = line.count(INVALID)
        why = garbled(line, num_invalid)
        return problem(origin, f"not JSON: {value}{why and '; '}{why}", None, num_invalid)
    if not isinstance(value, dict):
        return problem(origin, f"line is {type(value).__name__}, expected an object")
    return with_kept(_object_document(origin, value, options), value, options)


def _object_document(origin: Origin, value: dict[str, Any], options: ReadOptions) -> Document:
    """The document of a line whose object is ``value``."""
    try:
        doc_id = (
            None
            if options.id_column is None
            else _json_id(value.get(options.id_column), options.id_column)
        )
    except ValueError as error:
        return problem(origin, str(error))
    for column in (options.text_column, options.labels):
        if column is not None and column not in value:
            return problem(origin, f"no column {column!r}; it has: {columns(value)}", doc_id)
    text = value[options.text_column]
    if options.labels is not None:
        return labelled_document(origin, text, value[options.labels], doc_id, options)
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
    """Why a line is not JSON."""


def parse(line: str) -> Any:
    """The JSON value in ``line``, or a ``_NotJson`` with the reason."""
    try:
        return json.loads(line)
    except RecursionError:
        return _NotJson("nested too deeply")
    except ValueError as error:  # also a number with too many digits, which is no JSONDecodeError
        return _NotJson(error)
