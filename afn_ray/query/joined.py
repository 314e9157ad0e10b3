"""Read a user's own tables from files, for joins with a run; bytes and rows are limited."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from afn_ray.errors import ConfigError

MAX_BYTES = 256 << 20
"""Largest size of a file, and of the table read from it, in bytes."""
MAX_ROWS = 10_000_000
"""Largest number of rows of a table."""
ENDINGS = (".csv", ".jsonl", ".parquet")
"""File name endings of the supported formats."""


def read_tables(given: list[str]) -> dict[str, pa.Table]:
    """Read the tables ``given`` as ``name=file``; return them by name.

    Raises ``ConfigError`` for a name that is not valid or given twice, and what ``read_table``
    raises.
    """
    tables: dict[str, pa.Table] = {}
    for one in given:
        name, _, path = one.partition("=")
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) or not path:
            raise ConfigError(
                f"--with {one}: expected NAME=FILE with a name of letters, digits and _"
            )
        if name in tables:
            raise ConfigError(f"--with {one}: {name} is given twice")
        tables[name] = read_table(Path(path))
    return tables


def read_table(path: Path) -> pa.Table:
    """Read a CSV, JSONL or Parquet file; the types of CSV and JSONL are guessed.

    Raises ``ConfigError`` for an unknown ending, and for a file that is too large, empty or
    unreadable.
    """
    if path.suffix.lower() not in ENDINGS:
        raise ConfigError(f"{path}: expected a file that ends in {', '.join(ENDINGS)}")
    batches, rows, num_bytes = [], 0, 0
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise ConfigError(f"{path} has {size:,} bytes; at most {MAX_BYTES:,} are joined")
        for batch in _batches(path):
            batches.append(batch)
            rows += batch.num_rows
            num_bytes += batch.nbytes
            if rows > MAX_ROWS or num_bytes > MAX_BYTES:
                raise ConfigError(
                    f"{path} becomes over {MAX_ROWS:,} rows or {MAX_BYTES:,} bytes; take what is "
                    "needed"
                )
        if not batches:
            raise ConfigError(f"{path} has no rows")
        return pa.Table.from_batches(batches)
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    if path.suffix.lower() == ".csv":
        yield from pa.csv.open_csv(path)
    elif path.suffix.lower() == ".jsonl":
        yield from pa.json.open_json(path)
    else:
        with pa.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            yield from file.iter_batches()
