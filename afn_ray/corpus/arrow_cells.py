"""Arrow arrays as cells of rows: texts, ids, tags and kept values, and which types can be such."""

from __future__ import annotations

import contextlib
import re
import uuid
from collections.abc import Callable, Iterable
from typing import Any

import pyarrow as pa

from afn_ray.corpus import nested
from afn_ray.corpus.documents import decode
from afn_ray.corpus_values import ReadOptions

MARKED_HEX = re.compile(r"\\x([0-9a-f]{2})*")
"""An id of bytes that are not text: hex after ``\\x``."""

Ids = list[str | None]


def is_any(kind: Any, *names: str) -> bool:
    return any(getattr(pa.types, f"is_{name}")(kind) for name in names)


def _is_string(kind: Any) -> bool:
    return is_any(kind, "string", "large_string", "string_view")


def _is_binary(kind: Any) -> bool:
    return is_any(kind, "binary", "large_binary", "binary_view", "fixed_size_binary")


def is_text(kind: Any) -> bool:
    """True if an Arrow type holds strings, or bytes that may be UTF-8."""
    kind = storage_type(kind)
    return _is_string(kind) or _is_binary(kind) or is_any(kind, "null")


def is_id(kind: Any) -> bool:
    """True if an Arrow type is suitable for ids.

    Floats are not: two large whole numbers can become the same float.
    """
    kind = storage_type(kind)
    return (
        _is_string(kind)
        or _is_binary(kind)
        or is_any(kind, "integer", "decimal", "date", "time", "timestamp", "boolean")
    )


def is_kept(kind: Any) -> bool:
    """True if an Arrow type holds single values, which can be kept."""
    return is_id(kind) or is_any(storage_type(kind), "floating", "null")


def storage_type(kind: Any) -> Any:
    """The value type of an Arrow type, without extension type and dictionary."""
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    return kind.value_type if is_any(kind, "dictionary") else kind


def _plain(column: Any) -> Any:
    return column.storage if isinstance(column.type, pa.BaseExtensionType) else column


def lists(column: Any) -> list[Any]:
    """Values of an Arrow array, with nested lists.

    A value that is not UTF-8 becomes the error object, whose type is rejected later as not a list.
    """

    def value(scalar: Any) -> Any:
        try:
            return scalar.as_py()
        except (ValueError, OverflowError) as error:  # not UTF-8, or a date of the year 20,000
            return error

    return [value(scalar) for scalar in column]


def joined_lists(column: Any, options: ReadOptions) -> list[str | ValueError | None]:
    """Texts of an Arrow array of lists of strings, or why one cannot be; None for a null."""

    def text(row: Any) -> str | ValueError | None:
        if row.values is None:
            return None
        try:
            return nested.joined(
                strings(row.values), options.text_column, options.max_document_bytes
            )
        except ValueError as error:
            return error

    return [text(row) for row in column]


def _of_values(column: Any, convert: Callable[[Any], list[Any]]) -> list[Any]:
    """``convert`` applied to an Arrow array; in a dictionary array, once per distinct value."""
    if not is_any(column.type, "dictionary"):
        return convert(column)
    used = column.indices.unique().drop_null()
    converted = convert(column.dictionary.take(used))
    values = dict(zip(used.to_pylist(), converted, strict=True))
    return [values.get(index) for index in column.indices.to_pylist()]


def _convert_each(convert: Callable[[Any], str], values: Iterable[Any | None]) -> list[str | None]:
    """Each of ``values`` converted; None stays None."""
    return [None if value is None else convert(value) for value in values]


def _bytes(column: Any) -> list[bytes | None]:
    """Values of an Arrow array of strings or bytes, as bytes.

    pyarrow does not check that strings are UTF-8.
    """
    values: list[bytes | None] = column.cast(pa.large_binary()).to_pylist()
    return values


def strings(column: Any) -> list[str | None]:
    """Values of an Arrow array of text as strings, which may contain lone surrogates."""

    def convert(values: Any) -> list[str | None]:
        return _convert_each(decode, _bytes(values))

    return _of_values(_plain(column), convert)


def ids(column: Any, is_uuid: bool) -> Ids:
    """Values of an Arrow array as ids. Two ids are equal if, and only if, the values are."""
    is_uuid = is_uuid or getattr(column.type, "extension_name", "") == "arrow.uuid"
    column = _plain(column)

    def convert(values: Any) -> list[str | None]:
        kind = values.type
        if is_uuid:
            return _convert_each(lambda value: str(uuid.UUID(bytes=value)), _bytes(values))
        if _is_string(kind) or _is_binary(kind):
            return _convert_each(lambda value: _id_of_bytes(value, kind), _bytes(values))
        if is_any(kind, "decimal"):
            return _convert_each(lambda value: f"{value:f}", values.to_pylist())
        texts: list[str | None] = values.cast(pa.string()).to_pylist()
        return texts

    return _of_values(column, convert)


def kept_cells(column: Any, kind: str, is_uuid: bool) -> list[Any]:
    """Values of an Arrow array for a kept column of ``kind``, as ``kept.values_of`` takes them.

    A value that Python cannot hold becomes the error object, which is no value of any kind. A value
    kept as a string has the text that it has as an id; a float has its own.
    """
    found = storage_type(column.type)
    try:
        if _is_string(found) or (_is_binary(found) and kind != "string"):
            return strings(column)
        if kind == "string" and not is_any(found, "floating", "null"):
            return [*ids(column, is_uuid)]
        if is_any(found, "timestamp"):
            plain = _plain(column)
            plain = plain.dictionary_decode() if is_any(plain.type, "dictionary") else plain
            column = plain.cast(pa.timestamp("us"), safe=False)  # of nanoseconds, the last go
        return lists(column)
    except pa.ArrowException as error:
        return [error] * len(column)


def _id_of_bytes(value: bytes, kind: Any) -> str:
    """``value`` as text if it is printable text, else in hex.

    Hex has the prefix ``\\x``. Text that looks like prefixed hex is also encoded, so that no two
    values have the same id. Values of a fixed length need no prefix, because their hex is longer
    than any of their texts.
    """
    with contextlib.suppress(UnicodeDecodeError):
        text = value.decode()
        is_text = _is_string(kind) or text.isprintable()
        if is_text and not MARKED_HEX.fullmatch(text):
            return text
    if is_any(kind, "fixed_size_binary"):
        return value.hex()
    return f"\\x{value.hex()}"
