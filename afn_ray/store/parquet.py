"""Parquet files with page checksums: every write adds them, every read verifies them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def open_file(source: Any, **options: Any) -> pq.ParquetFile:
    """Open ``source`` (bytes, a path or a file) as a Parquet file.

    Reading a damaged page raises ``OSError``.
    """
    if isinstance(source, bytes):
        source = pa.BufferReader(source)
    return pq.ParquetFile(source, page_checksum_verification=True, **options)


def read(data: bytes, columns: Sequence[str] | None = None, **options: Any) -> pa.Table:
    """The table in ``data``. Damaged data raises ``OSError`` or ``pa.ArrowException``."""
    if columns is not None:
        columns = list(columns)
    source = pa.BufferReader(data)
    return pq.read_table(source, columns=columns, page_checksum_verification=True, **options)


def writer(sink: Any, schema: pa.Schema, **options: Any) -> pq.ParquetWriter:
    """A writer of tables of ``schema`` to ``sink``, compressed with zstd."""
    return pq.ParquetWriter(sink, schema, compression="zstd", write_page_checksum=True, **options)


def encode(table: pa.Table, **options: Any) -> bytes:
    """``table`` as a Parquet file, compressed with zstd."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True, **options)
    data: bytes = sink.getvalue().to_pybytes()
    return data
