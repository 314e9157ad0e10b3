"""Every layout that the measurement of encodings compares gives back the same offsets."""

from __future__ import annotations

from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pytest

from bench import encodings


@pytest.fixture(scope="module")
def tokens() -> pa.Table:
    """Three texts; the second begins with a space and has an empty token at its end."""
    rows = [(0, 0, 0, 2), (0, 1, 3, 9), (1, 0, 1, 4), (1, 1, 4, 4), (2, 0, 0, 7), (2, 1, 7, 9)]
    doc, position, start, end = np.array(rows, np.int32).T
    columns = {"doc": doc, "position": position, "token_id": position, "start": start, "end": end}
    strength = np.linspace(1, 2, len(rows), dtype=np.float32)
    return pa.table({name: pa.array(v) for name, v in columns.items()} | {"strength_1": strength})


@pytest.mark.parametrize("name", encodings.LAYOUTS)
def test_a_layout_gives_back_the_offsets(name: str, tokens: pa.Table, tmp_path: Path) -> None:
    layout, path = encodings.LAYOUTS[name], tmp_path / "tokens.parquet"
    table = encodings.laid_out(tokens, layout)
    chosen = {**layout.encodings, "token_id": layout.token_id[0]}
    encodings.write(path, table, chosen, layout)
    query = f"{encodings.offsets_sql(path, layout)} ORDER BY doc, position"
    columns = ["doc", "position", "token_id", "start", "end"]
    expected = [tuple(row.values()) for row in tokens.select(columns).to_pylist()]
    with duckdb.connect() as connection:
        assert connection.execute(query).fetchall() == expected


def test_each_encoding_of_a_column_is_measured(tokens: pa.Table, tmp_path: Path) -> None:
    for measure in (encodings.measure_layouts, encodings.measure_columns):
        for figures in measure(tokens, tmp_path, repeat=2).values():
            assert figures.num_bytes > 0 and all(len(t) == 2 for t in figures.times.values())
