"""Parquet in, documents out: row groups, the columns to read, and the types of texts and ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from afn_ray import kept
from afn_ray.corpus import arrow_cells, footer, nested
from afn_ray.corpus.documents import (
    Origin,
    columns,
    columns_of,
    document,
    labelled_document,
    missing_column,
    problem,
    with_kept,
)
from afn_ray.corpus.sources import BLOCK_BYTES, DamagedStream, Source
from afn_ray.corpus.streams import EXPANSION, EXPANSION_FROM_BYTES
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
VALUE_BYTES = 4
"""Least memory of a value in a list, in bytes. Runs of one value take none in the file."""
UNREADABLE = (OSError, ValueError, IndexError, pa.ArrowException)
"""Errors raised for a file that is damaged or not Parquet."""
UNREADABLE_FILE = "not a readable Parquet file"
"""Beginning of the reason for the quarantine of such a file, or of its row groups."""

TextRows = list[Any]
KeptRows = list[dict[str, object]]


# --- files


def chunk_paths(file: Any, columns: Sequence[str]) -> list[str]:
    """``columns`` of a ``ParquetFile``, with the leaf columns in place of dotted paths.

    Raises ``ValueError`` if the leaf columns are not those of the schema.
    """
    schema, paths = file.schema_arrow, []
    for column in columns:
        is_nested = column not in schema.names and nested.type_at(schema, column) is not None
        paths += (
            nested.leaves(schema, _leaf_paths(file.metadata), column) if is_nested else [column]
        )
    return paths


def _leaf_paths(metadata: Any) -> list[str]:
    return [metadata.schema.column(i).path for i in range(metadata.num_columns)]


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
    source: Source, names: Sequence[str], groups: Iterable[list[tuple[int, int]]]
) -> str:
    """SHA-256, in hex, of the ``hashed_names`` of columns and the bytes of their chunks in
    ``groups``.
    """
    sha256 = hashlib.sha256(json.dumps(names).encode())
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


def hashed_names(schema: Any, options: ReadOptions) -> list[str]:
    """Names of the columns that are read. A text that is joined has another than earlier versions'.

    They quarantined its rows.
    """
    names = columns_of(options)
    if options.labels is None and nested.is_list(nested.type_at(schema, options.text_column)):
        names[names.index(options.text_column)] += "[]"
    return names


def check_id_type(file: Any, uri: str, options: ReadOptions) -> None:
    """Raise ``CorpusError`` if the id column of a ``ParquetFile`` has an unsuitable type."""
    kind = options.id_column and nested.type_at(file.schema_arrow, options.id_column)
    if kind is not None and not arrow_cells.is_id(kind):
        raise CorpusError(
            f"id column {options.id_column!r} of {uri} is {kind}, which cannot be an id; expected "
            "strings, whole numbers, decimals, dates, times, booleans, UUIDs or bytes. Cast it to "
            "one of them, name another column, or leave id_column out: then ids are content hashes"
        )


def check_kept_types(file: Any, uri: str, options: ReadOptions) -> None:
    """Raise ``CorpusError`` if a kept column of a ``ParquetFile`` has no single values."""
    for path, _ in kept.parse(options.keep):
        kind = nested.type_at(file.schema_arrow, path)
        if not (
            kind is None
            or arrow_cells.is_id(kind)
            or arrow_cells.is_any(arrow_cells.storage_type(kind), "floating", "null")
        ):
            raise CorpusError(
                f"column {path!r} of {uri} is {kind}, which cannot be kept; expected strings, "
                "numbers, dates, times, booleans, UUIDs or bytes that are text: leave it out of "
                "keep_columns, or write what you need of it into a column of its own"
            )


def _is_of(path: str, columns: Sequence[str]) -> bool:
    """True if the leaf column at ``path`` belongs to one of ``columns``."""
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
        paths = [leaf.path for leaf in leaves]
        self._open: dict[tuple[str, ...], Any] = {}
        self.schema = self._with(()).schema_arrow
        self._columns = chunk_paths(self._with(()), columns_of(options))
        self._indices = [i for i, path in enumerate(paths) if _is_of(path, self._columns)]
        texts = [] if options.labels else nested.leaves(self.schema, paths, options.text_column)
        single = {*self._columns, *texts}
        self._strings = [i for i in self._indices if _is_plain_string(leaves[i], single)]
        self._repeated = {leaf.path for leaf in leaves if leaf.max_repetition_level}
        for chunks in self._chunks:
            if [chunk.path for chunk in chunks] != paths:
                raise ValueError("the columns of its row groups are not those of the file")
        self.num_rows: list[int] = []
        for group in range(self.metadata.num_row_groups):
            self.num_rows.append(self.metadata.row_group(group).num_rows)
        uuids = {leaf.path for leaf in leaves if _is_uuid(leaf)}
        self._uuids: set[str] = set()
        for name in columns_of(options):
            if not uuids.isdisjoint(nested.leaves(self.schema, paths, name)):
                self._uuids.add(name)
        self._kept: list[kept.KeptColumn] = []
        for column in kept.parse(options.keep):
            if self.type_of(column.path) is not None:
                self._kept.append(column)

    def type_of(self, column: str) -> Any:
        return nested.type_at(self.schema, column)

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
            given = chunk.given
            if chunk.path in self._repeated:  # a row of a list may have any number of values
                given = max(given, VALUE_BYTES * chunk.num_values)
            if given > most:
                raise ValueError(
                    f"{chunk.taken} bytes of {chunk.path} give {given}, over {EXPANSION} "
                    "times as many"
                )

    def batches(
        self, group: int
    ) -> Iterator[tuple[TextRows, arrow_cells.Ids, list[Any], KeptRows]]:
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
            columns=self._columns,
            use_threads=False,
        )
        for batch in batches:
            column = nested.values_at(batch, options.text_column)
            if not nested.is_list(column.type):
                texts: TextRows = arrow_cells.strings(column)
            elif options.labels is None:
                texts = arrow_cells.joined_lists(column, options)
            else:
                texts = arrow_cells.lists(column)
            ids: arrow_cells.Ids = [None] * len(texts)
            if options.id_column is not None:
                is_uuid = options.id_column in self._uuids
                ids = arrow_cells.ids(nested.values_at(batch, options.id_column), is_uuid)
            labels: list[Any] = ids
            if options.labels is not None:
                labels = arrow_cells.lists(nested.values_at(batch, options.labels))
            yield texts, ids, labels, self._kept_rows(batch, len(texts))

    def _kept_rows(self, batch: Any, num_rows: int) -> KeptRows:
        """Values of the kept columns in each row of ``batch``; the file may lack some columns."""
        rows: KeptRows = [{} for _ in range(num_rows)]
        for path, kind in self._kept:
            cells = arrow_cells.kept_cells(nested.values_at(batch, path), kind, path in self._uuids)
            for row, value in zip(rows, cells, strict=True):
                row[path] = value
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


def _is_plain_string(leaf: Any, columns: Container[str]) -> bool:
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
        if slice.num_documents < 0:
            source.check_whole()
        file = _OpenFile(source, options)
    except (*UNREADABLE, DamagedStream) as error:
        yield problem(whole, f"{UNREADABLE_FILE}: {error}")
        return
    names = nested.names_in(file.schema, columns_of(options))
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
    row = first_row
    end = first_row + file.num_rows[group]
    taken, given = file.stored(group)
    row_bytes = taken / max(file.num_rows[group], 1)  # on average

    def origin_of(row: int, num_rows: int = 1) -> Origin:
        return Origin(uri, row, max(1, round(num_rows * row_bytes)))

    kind = file.type_of(options.text_column)
    is_words = nested.is_list(kind) and (options.labels or arrow_cells.is_text(kind.value_type))
    if not (arrow_cells.is_text(kind) or is_words):
        for row in range(first_row, end):
            yield problem(origin_of(row), f"{options.text_column} is {kind}, expected a string")
        return
    try:
        file.check_expansion(group)
        for batch in file.batches(group):
            for text, doc_id, labels, kept_row in zip(*batch, strict=True):
                origin = origin_of(row)
                if isinstance(text, str) and given:
                    text_bytes = round(len(text) * taken / given)
                    origin = origin._replace(lost_bytes=max(1, text_bytes))
                if text is None:
                    found = problem(origin, f"{options.text_column} is null", doc_id)
                elif isinstance(text, ValueError) and options.labels is None:
                    found = problem(origin, str(text), doc_id)
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
