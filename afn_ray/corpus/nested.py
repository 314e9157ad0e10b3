"""Dotted paths to what columns hold: ``meta.lang`` is a field, ``messages.0.content`` one of an
item.

A column whose own name is the path is taken before what the path leads to.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

INDEX = re.compile("[0-9]{1,9}")
"""Place of an item in a list, from 0."""
SHOWN_NAMES = 10
"""Most names beside a wrong part of a path that are suggested."""
JOINED_BY = "\n"
"""Separator of the strings of a text that is a list of them."""


class _Missing:
    """The type of ``MISSING``."""


MISSING: Final = _Missing()
"""Stands for a value that is not there; None is a null that is."""


# --- JSON


def find(row: Mapping[str, Any], path: str) -> Any:
    """The value at ``path`` in ``row``, or ``MISSING``."""
    if path in row:
        return row[path]
    value, rest = _follow(row, path)
    return MISSING if rest else value


def values(row: Mapping[str, Any], paths: Iterable[str]) -> dict[str, Any]:
    """Those of ``paths`` that lead to a value in ``row``, with the values."""
    found = {path: find(row, path) for path in paths}
    return {path: value for path, value in found.items() if value is not MISSING}


def names(row: Mapping[str, Any], paths: Iterable[str]) -> list[str]:
    """Names of the columns of ``row``, the dotted ``paths`` in it, and
    what is beside wrong ones.
    """
    found = list(row)
    for path in paths:
        if "." in path and path not in row:
            value, rest = _follow(row, path)
            found += _beside(path, rest, value) if rest else [path]
    return found


def _follow(row: Mapping[str, Any], path: str) -> tuple[Any, list[str]]:
    """The last value on ``path`` that ``row`` has, and the parts of the path that are left."""
    parts = path.split(".")
    value: Any = row
    for at, part in enumerate(parts):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and INDEX.fullmatch(part) and int(part) < len(value):
            value = value[int(part)]
        else:
            return value, parts[at:]
    return value, []


def _beside(path: str, rest: Sequence[str], value: Any) -> list[str]:
    """Paths like ``path`` that lead on from ``value``, where the parts ``rest`` do not."""
    begin = path.split(".")[: -len(rest)]
    if isinstance(value, dict) and begin:
        return [".".join([*begin, str(name)]) for name in list(value)[:SHOWN_NAMES]]
    if isinstance(value, list) and value:
        return [".".join([*begin, "0"])]
    return []


def joined(items: Iterable[object], column: str, max_bytes: int) -> str:
    """The strings ``items`` of ``column``, with ``JOINED_BY`` between.

    Raises ``ValueError`` for an item that is no string, and for more than ``max_bytes``.
    """
    texts: list[str] = []
    num_chars = -len(JOINED_BY)
    for i, item in enumerate(items):
        if not isinstance(item, str):
            kind = "null" if item is None else type(item).__name__
            raise ValueError(f"{column} is a list whose item {i} is {kind}, expected a string")
        texts.append(item)
        num_chars += len(JOINED_BY) + len(item)
        if num_chars > max_bytes:
            raise ValueError(
                f"document of at least {num_chars} bytes is over max_document_bytes = {max_bytes}"
            )
    return JOINED_BY.join(texts)


# --- Arrow


def names_in(schema: pa.Schema, paths: Iterable[str]) -> list[str]:
    """``names`` of an Arrow schema."""
    found = list(schema.names)
    for path in paths:
        parts = path.split(".")
        if path in schema.names or len(parts) == 1:
            continue
        if type_at(schema, path) is not None:
            found.append(path)
            continue
        for end in range(len(parts) - 1, 0, -1):
            kind = type_at(schema, ".".join(parts[:end]))
            if kind is not None:
                value: Any = [None] if is_list(kind) else None
                if pa.types.is_struct(kind):
                    value = {field.name: None for field in kind}
                found += _beside(path, parts[end:], value)
                break
    return found


def type_at(schema: pa.Schema, path: str) -> pa.DataType | None:
    """The Arrow type at ``path``; None if it leads nowhere."""
    found = _place(schema, path)
    return None if found is None else found[0]


def leaves(schema: pa.Schema, leaf_paths: Sequence[str], path: str) -> list[str]:
    """Those of ``leaf_paths``, of all leaf columns of a Parquet file, that ``path`` leads to.

    Raises ``ValueError`` if the file has others than ``schema``.
    """
    if sum(_num_leaves(field.type) for field in schema) != len(leaf_paths):
        raise ValueError("its leaf columns are not those of its schema")
    found = _place(schema, path)
    if found is None:
        return []
    kind, first = found
    return list(leaf_paths[first : first + _num_leaves(kind)])


def values_at(batch: Any, path: str) -> Any:
    """The Arrow array at ``path`` in ``batch``; null where a row has no such value."""
    columns = batch.schema.names
    if path in columns:
        return batch.column(columns.index(path))
    name, *parts = path.split(".")
    column = batch.column(columns.index(name))
    for part in parts:
        if pa.types.is_struct(column.type):
            column = pc.struct_field(column, [column.type.get_field_index(part)])
        else:
            column = _items(column, int(part))
    return column


def is_list(kind: pa.DataType | None) -> bool:
    """True if an Arrow type is one of lists."""
    tests = ("list", "large_list", "fixed_size_list", "list_view", "large_list_view")
    return kind is not None and any(getattr(pa.types, f"is_{name}")(kind) for name in tests)


def _items(column: Any, at: int) -> Any:
    """Item ``at`` of each list in ``column``; null for shorter lists."""
    cut = pc.list_slice(column, at, at + 1)
    lengths = pc.if_else(cut.is_valid(), pc.list_value_length(cut), 0)
    ends = pc.cumulative_sum(lengths)
    places = pc.if_else(pc.equal(lengths, 1), pc.subtract(ends, 1), None)
    return cut.flatten().take(places)


def _place(schema: pa.Schema, path: str) -> tuple[pa.DataType, int] | None:
    """The type at ``path`` and the number of leaf columns before its own; None if there is none."""
    parts = [path] if path in schema.names else path.split(".")
    kind: pa.DataType = pa.struct(list(schema))
    first = 0
    for part in parts:
        if pa.types.is_struct(kind):
            fields = list(kind)
            children = [field.name for field in fields]
            if part not in children:
                return None
            at = children.index(part)
            first += sum(_num_leaves(field.type) for field in fields[:at])
            kind = fields[at].type
        elif is_list(kind) and INDEX.fullmatch(part):
            kind = kind.value_type
        else:
            return None
    return kind, first


def _num_leaves(kind: pa.DataType) -> int:
    """Leaf columns of Parquet that a column of type ``kind`` takes."""
    return sum(1 for _ in _leaf_types(kind))


def _leaf_types(kind: pa.DataType) -> Iterator[pa.DataType]:
    if isinstance(kind, pa.BaseExtensionType):
        yield from _leaf_types(kind.storage_type)
    elif pa.types.is_struct(kind):
        for field in kind:
            yield from _leaf_types(field.type)
    elif pa.types.is_map(kind):
        yield from _leaf_types(kind.key_type)
        yield from _leaf_types(kind.item_type)
    elif is_list(kind):
        yield from _leaf_types(kind.value_type)
    else:
        yield kind
