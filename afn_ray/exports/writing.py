"""Write rows as files of one format: row groups of bounded size, whole files, a stream of files."""

from __future__ import annotations

import contextlib
import io
import itertools
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from afn_ray.errors import ConfigError, Interrupted, QueryError
from afn_ray.exports.request import ExportRequest
from afn_ray.show.query_output import csv_rows
from afn_ray.store import disk, parquet, storage, uris

ROW_GROUP_ROWS = 1 << 19
"""Largest number of rows of a row group."""
ROW_GROUP_BYTES = 64 << 20
"""Largest size of a row group in memory, in bytes."""

Write = Callable[[pa.RecordBatch], None]


@dataclass(frozen=True)
class ExportFile:
    """One file of an export."""

    name: str
    rows: int
    bytes: int


class _RowGroups:
    """Gathers batches into row groups of bounded size."""

    def __init__(self, file: pq.ParquetWriter, schema: pa.Schema, most_bytes: int) -> None:
        self._file = file
        self._schema = schema
        self._most_bytes = most_bytes
        self._held: list[pa.RecordBatch] = []

    def write(self, batch: pa.RecordBatch) -> None:
        columns = []
        for column, field in zip(batch.columns, self._schema, strict=True):
            columns.append(column.cast(field.type))
        self._held.append(pa.RecordBatch.from_arrays(columns, schema=self._schema))
        num_rows = sum(len(held) for held in self._held)
        if num_rows >= ROW_GROUP_ROWS or sum(h.nbytes for h in self._held) >= self._most_bytes:
            self.flush()

    def flush(self) -> None:
        if self._held:
            table = pa.Table.from_batches(self._held)
            self._file.write_table(table, len(table))
            self._held = []


@contextlib.contextmanager
def encoded(request: ExportRequest, schema: pa.Schema, sink: IO[bytes]) -> Iterator[Write]:
    """A function that writes batches to ``sink`` in the format asked for.

    ``formats.CSV_RULES`` says what CSV is.
    """
    if request.format == "csv":
        with csv_rows(schema, sink) as write:
            yield write
        return
    most_bytes = min(ROW_GROUP_BYTES, 2 * request.file_bytes)
    with parquet.writer(sink, schema) as file:
        groups = _RowGroups(file, schema, most_bytes)
        yield groups.write
        groups.flush()


def check_types(request: ExportRequest, schema: pa.Schema) -> None:
    """Raise ``QueryError`` for a type that the format lacks."""
    with _named_types(request), encoded(request, schema, io.BytesIO()):
        pass


@contextlib.contextmanager
def _named_types(request: ExportRequest) -> Iterator[None]:
    """Raise errors of Arrow, which are of types and values, as ``QueryError``."""
    try:
        yield
    except pa.ArrowException as error:
        raise QueryError(
            f"a column does not fit into {request.format}: {error}; cast it in the query, as with "
            "::VARCHAR"
        ) from error


def write_file(
    request: ExportRequest,
    schema: pa.Schema,
    batches: Iterator[pa.RecordBatch],
    uri: str,
    most_bytes: int | None = None,
) -> ExportFile:
    """Write ``batches`` to the file ``uri``, which appears whole or not at all.

    It ends with the batch that makes it ``most_bytes`` long; later ones stay in ``batches``. Raises
    ``QueryError`` for a value that the format lacks, ``Interrupted`` if a disk is full, and what
    ``storage.write_whole`` raises.
    """
    num_rows = 0
    try:
        with storage.write_whole(uri) as sink:
            with _named_types(request), encoded(request, schema, sink) as write:
                for batch in batches:
                    write(batch)
                    num_rows += batch.num_rows
                    if most_bytes is not None and sink.tell() >= most_bytes:
                        break
            num_bytes = sink.tell()
    except ConfigError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in disk.FULL:
            raise Interrupted(f"{error}; make room and run the same command again") from error
        raise
    return ExportFile(uri.rpartition("/")[2], num_rows, num_bytes)


def file_name(request: ExportRequest, part: int) -> str:
    """A name for the file of ``part`` that no other attempt uses.

    So no attempt writes over a file that counts, and files of two attempts, whose rows need not
    come in the same order, are not mixed.
    """
    return f"part-{part:05d}-{uuid.uuid4().hex[:8]}.{request.ending}"


def write_files(
    request: ExportRequest, schema: pa.Schema, reader: pa.RecordBatchReader, folder: str
) -> Iterator[ExportFile]:
    """Write all rows of ``reader`` to files of the size asked for; without rows, to one."""
    batches = iter(reader)
    first = next(batches, None)
    for number in itertools.count():
        rest = batches if first is None else itertools.chain([first], batches)
        uri = uris.join(folder, file_name(request, number))
        yield write_file(request, schema, rest, uri, request.file_bytes)
        if (first := next(batches, None)) is None:
            return
