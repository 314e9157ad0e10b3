"""Parquet in, documents out: row groups, the columns to read, and the types of texts and ids."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from afn_ray import kept
from afn_ray.corpus import footer
from afn_ray.corpus.documents import (
    Origin,
    columns,
    columns_of,
    decode,
    document,
    labelled_document,
    missing_column,
    problem,
    with_kept,
)
from afn_ray.corpus.streams import BLOCK_BYTES, EXPANSION, EXPANSION_FROM_BYTES, Source
from afn_ray.corpus_values import Document, FileSlice, ReadOptions
from afn_ray.errors import CorpusError
from afn_ray.store import parquet

BATCH_BYTES = 4 << 20
"""Target size of a batch, in bytes."""
BATCH_ROWS = 64
"""Most rows of a batch.

It is low, because the metadata do not contain the decoded size of dictionary-encoded rows.
"""
SHARED_BYTES = 256 << 20
"""Most bytes of a batch whose rows may share values but cannot be read as dictionaries."""
UNREADABLE = (OSError, ValueError, IndexError, pa.ArrowException)
"""Errors raised for a file that is damaged or not Parquet."""
UNREADABLE_FILE = "not a readable Parquet file"
"""Beginning of the reason for the quarantine of such a file, or of its row groups."""

MARKED_HEX = re.compile(r"\\x([0-9a-f]{2})*")
"""An id of bytes that are not text: hex after ``\\x``."""

TextRows = list[Any]
Ids = list[str | None]
KeptRows = list[dict[str, object]]


# --- files


def column_chunks(source: Source, columns: Sequence[str]) -> list[list[tuple[int, int]]]:
    """The (offset, size in bytes) of each chunk of ``columns``, per row group.

    Raises ``ValueError`` for a chunk outside the file.
    """
    groups: list[list[tuple[int, int]]] = []
    for group, chunks in enumerate(footer.read_chunks(source)):
        groups.append([])
        for chunk in chunks:
            if not _is_of(chunk.path, columns):
                continue
            end = chunk.offset + chunk.taken
            if not 0 <= chunk.offset <= end <= source.size:
                raise ValueError(f"row group {group} lies outside the file")
            groups[-1].append((chunk.offset, chunk.taken))
    return groups


def hash_chunks(
    source: Source, columns: Sequence[str], groups: Iterable[list[tuple[int, int]]]
) -> str:
    """SHA-256, in hex, of the names of ``columns`` and the bytes of their chunks in ``groups``."""
    sha256 = hashlib.sha256(json.dumps(columns).encode())
    for chunks in groups:
        for offset, left in chunks:
            source.seek(offset)
            while left:
                block = source.read(min(left, BLOCK_BYTES))
                if not block:
                    break
                sha256.update(block)
                left -= len(block)
    return sha256.hexdigest()


def check_id_type(file: Any, uri: str, options: ReadOptions) -> None:
    """Raise ``CorpusError`` if the id column of a ``ParquetFile`` has an unsuitable type."""
    schema = file.schema_arrow
    if options.id_column is None or options.id_column not in schema.names:
        return
    kind = schema.field(schema.names.index(options.id_column)).type
    if not _is_id(kind):
        raise CorpusError(
            f"id column {options.id_column!r} of {uri} is {kind}, which cannot be an id; expected "
            "strings, whole numbers, decimals, dates, times, booleans, UUIDs or bytes. Cast it to "
            "one of them, name another column, or leave id_column out: then ids are content hashes"
        )


def check_kept_types(file: Any, uri: str, options: ReadOptions) -> None:
    """Raise ``CorpusError`` if a kept column of a ``ParquetFile`` has no single values."""
    schema = file.schema_arrow
    for name, _ in kept.parse(options.keep):
        kind = schema.field(schema.names.index(name)).type if name in schema.names else pa.null()
        if not (_is_id(kind) or _is_any(_storage(kind), "floating", "null")):
            raise CorpusError(
                f"column {name!r} of {uri} is {kind}, which cannot be kept; expected strings, "
                "numbers, dates, times, booleans, UUIDs or bytes that are text: leave it out of "
                "keep_columns, or write what you need of it into a column of its own"
            )


def _is_of(path: str, columns: Sequence[str]) -> bool:
    """Whether the leaf column at ``path`` belongs to one of ``columns``."""
    return any(path == column or path.startswith(column + ".") for column in columns)


class _OpenFile:
    """An open Parquet file and the columns to read."""

    def __init__(self, source: Source, options: ReadOptions) -> None:
        self._source = source
        self.options = options
        self.metadata = pq.read_metadata(source)
        self._chunks = footer.read_chunks(source)
        schema = self.metadata.schema
        leaves = [schema.column(i) for i in range(self.metadata.num_columns)]
        columns = columns_of(options)
        self._indices = [i for i, leaf in enumerate(leaves) if _is_of(leaf.path, columns)]
        self._strings = [i for i in self._indices if _is_plain_string(leaves[i], columns)]
        self._open: dict[tuple[str, ...], Any] = {}
        self.schema = self._with(()).schema_arrow
        paths = [leaf.path for leaf in leaves]
        for chunks in self._chunks:
            if [chunk.path for chunk in chunks] != paths:
                raise ValueError("the columns of its row groups are not those of the file")
        self.num_rows: list[int] = []
        for group in range(self.metadata.num_row_groups):
            self.num_rows.append(self.metadata.row_group(group).num_rows)
        self._is_uuid = {leaf.path for leaf in leaves if _is_uuid(leaf)}
        self._kept = [c for c in kept.parse(options.keep) if c.name in self.schema.names]

    def type_of(self, column: str) -> Any:
        return self.schema.field(self.schema.names.index(column)).type

    def stored(self, group: int) -> tuple[int, int]:
        """Sizes of the columns of a row group, in bytes: in the file, and decompressed."""
        chunks = [self._chunks[group][i] for i in self._indices]
        taken = sum(chunk.taken for chunk in chunks)
        given = sum(chunk.given for chunk in chunks)
        return taken, given

    def check_expansion(self, group: int) -> None:
        """Raise ``ValueError`` if a column of the row group expands too much, by its metadata."""
        for i in self._indices:
            chunk = self._chunks[group][i]
            most = max(EXPANSION_FROM_BYTES, EXPANSION * chunk.taken)
            if chunk.given > most:
                raise ValueError(
                    f"{chunk.taken} bytes of {chunk.path} give {chunk.given}, over {EXPANSION} "
                    "times as many"
                )

    def batches(self, group: int) -> Iterator[tuple[TextRows, Ids, list[Any], KeptRows]]:
        """Yield texts, ids, tags and kept values of a row group, a few megabytes at a time.

        The size is exact only if the metadata allow it.
        """
        options = self.options
        chunks = [self._chunks[group][i] for i in self._strings]
        # Read strings as dictionaries: 64 rows that share a value of 64 MB would else take 4 GB.
        # Arrow cannot do that with delta encodings.
        dense = [chunk.path for chunk in chunks if chunk.has_deltas]
        shared = tuple(chunk.path for chunk in chunks if not chunk.has_deltas)
        file = self._with(shared)
        batches = file.iter_batches(
            self._batch_rows(group, are_dense=bool(dense)),
            row_groups=[group],
            columns=columns_of(options),
            use_threads=False,
        )
        for batch in batches:
            column = _column(batch, options.text_column)
            texts = _lists(column) if _is_list(column.type) else _strings(column)
            ids: Ids = [None] * len(texts)
            if options.id_column is not None:
                is_uuid = options.id_column in self._is_uuid
                ids = _ids(_column(batch, options.id_column), is_uuid)
            labels: list[Any] = ids
            if options.labels is not None:
                labels = _lists(_column(batch, options.labels))
            yield texts, ids, labels, self._kept_rows(batch, len(texts))

    def _kept_rows(self, batch: Any, num_rows: int) -> KeptRows:
        """Values of the kept columns in each row of ``batch``; the file may lack some columns."""
        rows: KeptRows = [{} for _ in range(num_rows)]
        for name, kind in self._kept:
            cells = _cells(_column(batch, name), kind, name in self._is_uuid)
            for row, value in zip(rows, cells, strict=True):
                row[name] = value
        return rows

    def _batch_rows(self, group: int, *, are_dense: bool) -> int:
        """Number of rows of a batch of a row group; ``are_dense``: strings are not shared."""
        _, given = self.stored(group)
        num_bytes = max(given, 1)
        num_rows = max(1, BATCH_BYTES * self.num_rows[group] // num_bytes)
        if are_dense:
            num_rows = min(num_rows, max(1, SHARED_BYTES // num_bytes))
        return min(BATCH_ROWS, num_rows)

    def _with(self, dictionaries: tuple[str, ...]) -> Any:
        """The file with the columns ``dictionaries`` read as dictionaries."""
        if dictionaries not in self._open:
            self._open[dictionaries] = parquet.open_file(
                self._source,
                metadata=self.metadata,
                read_dictionary=list(dictionaries),
                buffer_size=BLOCK_BYTES,
                pre_buffer=False,
            )
        return self._open[dictionaries]


def _column(batch: Any, name: str) -> Any:
    return batch.column(batch.schema.names.index(name))


def _is_plain_string(leaf: Any, columns: Sequence[str]) -> bool:
    is_string = leaf.physical_type == "BYTE_ARRAY" and leaf.logical_type.type != "DECIMAL"
    return bool(leaf.path in columns and is_string)


def _is_uuid(leaf: Any) -> bool:
    return bool(leaf.physical_type == "FIXED_LEN_BYTE_ARRAY" and leaf.logical_type.type == "UUID")


# --- documents


def parquet_documents(source: Source, slice: FileSlice, options: ReadOptions) -> Iterator[Document]:
    """Yield the documents of the row groups of ``slice``, whose file is ``source``."""
    num_documents = slice.num_documents if slice.num_documents >= 0 else None
    whole = Origin(slice.uri, 0, max(slice.num_bytes, 1), num_documents)
    try:
        file = _OpenFile(source, options)
    except UNREADABLE as error:
        yield problem(whole, f"{UNREADABLE_FILE}: {error}")
        return
    names = file.schema.names
    if (missing := missing_column(names, options)) is not None:
        yield problem(whole, f"no column {missing!r}; it has: {columns(names)}")
        return
    row = sum(file.num_rows[: slice.start])
    end = min(slice.end, len(file.num_rows))
    for group in range(slice.start, end):
        yield from _group_documents(file, group, slice.uri, row)
        row += file.num_rows[group]


def _group_documents(file: _OpenFile, group: int, uri: str, first_row: int) -> Iterator[Document]:
    """Yield the documents of a row group of the file at ``uri``; its first row is ``first_row``."""
    options = file.options
    row, end = first_row, first_row + file.num_rows[group]
    taken, given = file.stored(group)
    row_bytes = taken / max(file.num_rows[group], 1)  # on average

    def origin_of(row: int, num_rows: int = 1) -> Origin:
        return Origin(uri, row, max(1, round(num_rows * row_bytes)))

    kind = file.type_of(options.text_column)
    is_text = _is_text(kind) or (options.labels is not None and _is_list(kind))
    if not is_text:
        for row in range(first_row, end):
            yield problem(origin_of(row), f"{options.text_column} is {kind}, expected a string")
        return
    try:
        file.check_expansion(group)
        for batch in file.batches(group):
            for text, doc_id, labels, kept_row in zip(*batch, strict=True):
                origin = origin_of(row)
                if isinstance(text, str) and given:
                    origin = origin._replace(lost_bytes=max(1, round(len(text) * taken / given)))
                if text is None:
                    found = problem(origin, f"{options.text_column} is null", doc_id)
                elif options.labels is not None:
                    found = labelled_document(origin, text, labels, doc_id, options)
                else:
                    found = document(origin, text, doc_id, options)
                yield with_kept(found, kept_row, options)
                row += 1
        if row != end:
            raise ValueError(f"{end - row} rows are missing")
    except UNREADABLE as error:
        rest = origin_of(row, end - row)._replace(lost_documents=end - row)
        yield problem(rest, f"{UNREADABLE_FILE}: row group {group}: {error}")


# --- types


def _is_any(kind: Any, *names: str) -> bool:
    return any(getattr(pa.types, f"is_{name}")(kind) for name in names)


def _is_string(kind: Any) -> bool:
    return _is_any(kind, "string", "large_string", "string_view")


def _is_binary(kind: Any) -> bool:
    return _is_any(kind, "binary", "large_binary", "binary_view", "fixed_size_binary")


def _is_text(kind: Any) -> bool:
    """Whether an Arrow type holds strings, or bytes that may be UTF-8."""
    kind = _storage(kind)
    return _is_string(kind) or _is_binary(kind) or _is_any(kind, "null")


def _is_id(kind: Any) -> bool:
    """Whether an Arrow type is suitable for ids.

    Floats are not: two large whole numbers can become the same float.
    """
    kind = _storage(kind)
    return (
        _is_string(kind)
        or _is_binary(kind)
        or _is_any(kind, "integer", "decimal", "date", "time", "timestamp", "boolean")
    )


def _is_list(kind: Any) -> bool:
    return _is_any(kind, "list", "large_list", "fixed_size_list", "list_view", "large_list_view")


def _storage(kind: Any) -> Any:
    """The value type of an Arrow type, without extension type and dictionary."""
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    return kind.value_type if _is_any(kind, "dictionary") else kind


def _plain(column: Any) -> Any:
    return column.storage if isinstance(column.type, pa.BaseExtensionType) else column


def _lists(column: Any) -> list[Any]:
    """Values of an Arrow array, with nested lists.

    A value that is not UTF-8 becomes the error object, whose type is rejected later as not a list.
    """

    def value(scalar: Any) -> Any:
        try:
            return scalar.as_py()
        except (ValueError, OverflowError) as error:  # not UTF-8, or a date of the year 20,000
            return error

    return [value(scalar) for scalar in column]


def _of_values(column: Any, convert: Callable[[Any], list[Any]]) -> list[Any]:
    """``convert`` applied to an Arrow array; in a dictionary array, once per distinct value."""
    if not _is_any(column.type, "dictionary"):
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


def _strings(column: Any) -> list[str | None]:
    """Values of an Arrow array of text as strings, which may contain lone surrogates."""

    def convert(values: Any) -> list[str | None]:
        return _convert_each(decode, _bytes(values))

    return _of_values(_plain(column), convert)


def _ids(column: Any, is_uuid: bool) -> Ids:
    """Values of an Arrow array as ids. Two ids are equal if, and only if, the values are."""
    is_uuid = is_uuid or getattr(column.type, "extension_name", "") == "arrow.uuid"
    column = _plain(column)

    def convert(values: Any) -> list[str | None]:
        kind = values.type
        if is_uuid:
            return _convert_each(lambda value: str(uuid.UUID(bytes=value)), _bytes(values))
        if _is_string(kind) or _is_binary(kind):
            return _convert_each(lambda value: _id_of_bytes(value, kind), _bytes(values))
        if _is_any(kind, "decimal"):
            return _convert_each(lambda value: f"{value:f}", values.to_pylist())
        texts: list[str | None] = values.cast(pa.string()).to_pylist()
        return texts

    return _of_values(column, convert)


def _cells(column: Any, kind: str, is_uuid: bool) -> list[Any]:
    """Values of an Arrow array for a kept column of ``kind``, as ``kept.values_of`` takes them.

    A value that Python cannot hold becomes the error object, which is no value of any kind. A value
    kept as a string has the text that it has as an id; a float has its own.
    """
    found = _storage(column.type)
    try:
        if _is_string(found) or (_is_binary(found) and kind != "string"):
            return _strings(column)
        if kind == "string" and not _is_any(found, "floating", "null"):
            return [*_ids(column, is_uuid)]
        if _is_any(found, "timestamp"):
            plain = _plain(column)
            plain = plain.dictionary_decode() if _is_any(plain.type, "dictionary") else plain
            column = plain.cast(pa.timestamp("us"), safe=False)  # of nanoseconds, the last go
        return _lists(column)
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
    if _is_any(kind, "fixed_size_binary"):
        return value.hex()
    return f"\\x{value.hex()}"
