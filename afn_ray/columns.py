"""Tables written as lines of text: the columns, their Arrow types and their comments."""

from __future__ import annotations

import pyarrow as pa

COMMENT = "  # "
"""Text between a column and its comment, in such lines and nowhere in a name or type."""


def list_type(kind: str | pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("item", kind, nullable=False))


_ARROW_TYPES = {
    "repeated string": pa.dictionary(pa.int32(), pa.string()),
    "32 bytes": pa.binary(32),
    "list of int32": list_type("int32"),
    "list of int64": list_type("int64"),
    "list of float32": list_type("float32"),
    "list of string": list_type("string"),
}
"""Types that have a name in ``fields_of`` but none in Arrow."""


def fields_of(*lines: str) -> list[pa.Field]:
    """Columns in the order of ``lines``, which read ``q1, q3: float32`` or ``id: string or null``.

    A column without "or null" holds no nulls. A comment may follow, after ``COMMENT``.
    """
    fields = []
    for line in lines:
        names, _, kind = line.partition(COMMENT)[0].partition(": ")
        kind, or_null, _ = kind.partition(" or null")
        for name in names.split(", "):
            fields.append(pa.field(name, _ARROW_TYPES.get(kind, kind), nullable=bool(or_null)))
    return fields


def name_type(name: str, kind: pa.DataType) -> None:
    """Give ``kind`` a name for the lines of ``fields_of``."""
    _ARROW_TYPES[name] = kind


def comments_in(*lines: str) -> dict[str, str]:
    """The comments in ``lines``, by column."""
    found: dict[str, str] = {}
    for line in lines:
        columns, _, comment = line.partition(COMMENT)
        if comment:
            found |= dict.fromkeys(columns.partition(": ")[0].split(", "), comment)
    return found


def schema_of(*lines: str) -> pa.Schema:
    """Schema of a table whose columns are in ``lines``; ``comments_of`` gives the comments."""
    schema = pa.schema(fields_of(*lines))
    _COMMENTS[schema] = comments_in(*lines)
    return schema


_COMMENTS: dict[pa.Schema, dict[str, str]] = {}


def comments_of(schema: pa.Schema) -> dict[str, str]:
    """Comments of the columns of a table of ``schema_of``, by name; plain names have none.

    They are not part of ``schema``, so that a better comment changes no stored file.
    """
    return _COMMENTS.get(schema, {})
