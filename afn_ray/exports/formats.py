"""The formats of an export, and how each is read."""

from __future__ import annotations

import json

from afn_ray.store import uris

FORMATS = {"parquet": "parquet", "iceberg": "parquet", "hf-dataset": "parquet", "csv": "csv"}
"""Endings of the files, by format."""
READERS = {
    "parquet": (
        "DuckDB: FROM 'data/*.parquet'",
        'Polars: pl.scan_parquet("data/*.parquet")',
        'pandas: pd.read_parquet("data")',
        'Spark:  spark.read.parquet("data")',
    ),
    "hf-dataset": (
        'datasets: load_dataset({dataset}, split="train")',
        "DuckDB:   FROM 'data/*.parquet'",
    ),
    "csv": (
        "DuckDB: FROM read_csv('data/*.csv', allow_quoted_nulls = false)",
        'Polars: pl.scan_csv("data/*.csv")',
    ),
}
"""Lines that read an export in its folder, by format; those of Iceberg are the table's."""
CSV_RULES = (
    "Each file begins with the names of the columns. There is a comma between fields, and "
    "a line feed after a row. Text is in quotes, and a quote inside is doubled; it is UTF-8 and "
    "may have line "
    'breaks. Null is an empty field, and empty text is `""`. Bytes are hex, dates ISO 8601, lists '
    "and structs JSON. Text is as it is: spreadsheet programs take a cell that begins with = as a "
    "formula."
)
"""The form of CSV, in words."""


def readers(format: str, target: str) -> list[str]:
    """Lines that read an export in its folder ``target``; ``datasets`` needs its whole path."""
    dataset = json.dumps(target, ensure_ascii=False)
    if not uris.is_local(target):
        files = uris.join(target, "data", "*.parquet")
        dataset = f'"parquet", data_files={json.dumps(files, ensure_ascii=False)}'
    return [line.replace("{dataset}", dataset) for line in READERS[format]]
