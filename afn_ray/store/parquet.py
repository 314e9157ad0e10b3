"""Parquet files with page checksums: every write adds them, every read verifies them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ONE_THREAD_BYTES = 1 << 20
"""Size up to which a file is read in one thread, in bytes: handing it to others takes longer."""


def open_file(source: Any, **options: Any) -> pq.ParquetFile:
    """Open ``source`` (bytes, a path or a file) as a Parquet file.

    Damaged metadata raises ``OSError`` or ``pa.ArrowException``, as does reading a damaged page.
    """
    if isinstance(source, bytes):
        source = pa.BufferReader(source)
    try:
        return pq.ParquetFile(source, page_checksum_verification=True, **options)
    except UnicodeDecodeError as error:  # the name of a column
        raise pa.ArrowInvalid(str(error)) from error


def read(
    data: bytes,
    columns: Sequence[str] | None = None,
    filters: Any = None,
    use_threads: bool = True,
) -> pa.Table:
    """The table in ``data``, or the ``columns`` of it. Damaged data raises ``OSError`` or
    ``pa.ArrowException``, and so does a column that is not there.

    ``filters`` keep some rows, as those of ``pyarrow.parquet.read_table``, which is used only for
    them: it takes twice as long for a small table. A small table is read in one thread.
    """
    names = None if columns is None else list(columns)
    if filters is not None:
        return pq.read_table(
            pa.BufferReader(data),
            columns=names,
            filters=filters,
            use_threads=use_threads,
            page_checksum_verification=True,
        )
    file = open_file(data)
    use_threads = use_threads and len(data) > ONE_THREAD_BYTES
    if names is None:
        return file.read(use_threads=use_threads)
    there = file.schema_arrow.names
    for name in names:
        if there.count(name) != 1:
            raise pa.ArrowInvalid(f"{there.count(name)} columns {name!r}, expected one")
    return file.read(names, use_threads=use_threads).select(names)


def writer(sink: Any, schema: pa.Schema, **options: Any) -> pq.ParquetWriter:
    """A writer of tables of ``schema`` to ``sink``, compressed with zstd."""
    return pq.ParquetWriter(sink, schema, compression="zstd", write_page_checksum=True, **options)


def encode(table: pa.Table, **options: Any) -> bytes:
    """``table`` as a Parquet file, compressed with zstd."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True, **options)
    data: bytes = sink.getvalue().to_pybytes()
    return data
