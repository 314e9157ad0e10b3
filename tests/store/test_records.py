"""Parquet files in the schemas and encodings that were promised."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from afn_ray.errors import Interrupted
from afn_ray.reduce.histogram import round_strengths
from afn_ray.reduce.shard_summary import Summary
from afn_ray.schema import SUMMARY_SCHEMA, Series, documents_schema, tokens_schema
from afn_ray.store import parquet, records
from afn_ray.store.records import ShardFiles, make_table

SERIES = (Series("strength", 0), Series("strength", 8))
ORIGIN = {"measure": "m", "shard": "s", "attempt": "a"}


def _tokens(n: int, offsets: bool) -> pa.Table:
    random = np.random.default_rng(n)
    number = np.arange(n)
    return make_table(
        {
            "doc_in_shard": number // 20,
            "position": number % 20,
            "token_id": random.integers(0, 500, n),
            "flags": np.full(n, 2, np.uint8),
            "surface": ["LORD" if i % 9 == 0 else None for i in range(n)],
            "start_ahead": -(number % 20),
            "length": np.full(n, 3),
            **{s.name: round_strengths(random.normal(9, 1, n).astype(np.float32)) for s in SERIES},
        },
        tokens_schema(SERIES, offsets),
    )


def _documents(n: int) -> pa.Table:
    return make_table(
        {
            "doc_in_shard": range(n),
            "doc_id": [None, *map(str, range(1, n))],
            "source": ["a.txt"] * n,
            "offset": range(n),
            "n_tokens": [20] * n,
            "n_windows": [1] * n,
            "n_chars": [99] * n,
            "n_replaced": [0] * n,
            "lost_bytes": [0] * n,
            "lost_documents": [0] * n,
            "text_sha256": [bytes(32)] * n,
            "status": ["ok"] * n,
            "mean_strength_0": [None, *[1.0] * (n - 1)],
            "mean_strength_8": [2.0] * n,
        },
        documents_schema(SERIES),
    )


def _summary(tokens: pa.Table) -> list[pa.Table]:
    summary = Summary(SERIES)
    docs, token_ids, flags = (tokens[c].to_numpy() for c in ("doc_in_shard", "token_id", "flags"))
    summary.add(docs, token_ids, flags, {s: tokens[s.name].to_numpy() for s in SERIES})
    return list(summary.tables())


def _columns(path: Path) -> dict[str, Any]:
    """Metadata of the first row group's columns, by name."""
    group = pq.ParquetFile(path).metadata.row_group(0)
    return {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}


@pytest.mark.parametrize("offsets", [True, False])
def test_what_is_written_is_read_back_in_the_schema_promised(tmp_path: Path, offsets: bool) -> None:
    tokens, documents = _tokens(5000, offsets), _documents(250)
    with ShardFiles(tmp_path, SERIES, (), offsets, ORIGIN) as files:
        for begin in range(0, 5000, 1000):
            files.tokens.write(tokens.slice(begin, 1000))
        files.documents.write(documents)
        files.summary.write_each(_summary(tokens))
    read = {name: pq.read_table(path) for name, (path, _) in files.tables().items()}
    for name, table in read.items():
        says = (table.schema.metadata or {}).get(b"afn.doc_in_shard", b"").decode()
        assert ("it repeats in every shard" in says) == ("doc_in_shard" in table.column_names), name
    assert read["tokens"].schema == tokens_schema(SERIES, offsets)
    assert read["documents"].schema == documents_schema(SERIES)
    assert read["summary"].schema == SUMMARY_SCHEMA
    for name, table in (("tokens", tokens), ("documents", documents)):
        assert read[name].to_pylist() == table.to_pylist()
    assert read["summary"].to_pylist() == pa.concat_tables(_summary(tokens)).to_pylist()
    assert {name: rows for name, (_, rows) in files.tables().items()} == {
        k: t.num_rows for k, t in read.items()
    }


def test_the_encodings_are_those_that_measured_best(tmp_path: Path) -> None:
    tokens = _tokens(5000, True)
    with ShardFiles(tmp_path, SERIES, (), True, ORIGIN) as files:
        files.tokens.write(tokens)
        files.documents.write(_documents(250))
        files.summary.write_each(_summary(tokens))
    expected = {
        "tokens": {
            "DELTA_BINARY_PACKED": ["doc_in_shard", "position", "start_ahead"],
            "RLE_DICTIONARY": ["token_id", "flags", "surface", "length"],
            "BYTE_STREAM_SPLIT": ["strength_0", "strength_8"],
        },
        "documents": {
            "DELTA_BINARY_PACKED": [
                "doc_in_shard",
                "offset",
                "n_tokens",
                "n_windows",
                "n_chars",
                "n_replaced",
            ],
            "RLE_DICTIONARY": ["source", "status"],
            "BYTE_STREAM_SPLIT": ["mean_strength_0", "mean_strength_8"],
        },
        "summary": {
            "DELTA_BINARY_PACKED": ["bins.list.element"],
            "RLE_DICTIONARY": ["counts.list.element", "token_id"],
        },
    }
    for name, encodings in expected.items():
        columns = _columns(tmp_path / f"{name}.parquet")
        assert {c.compression for c in columns.values()} == {"ZSTD"}
        without_statistics = {n for n, c in columns.items() if not c.is_stats_set}
        assert without_statistics == ({"surface"} if name == "tokens" else set())
        for encoding, names in encodings.items():
            for column in names:
                assert encoding in columns[column].encodings, (
                    name,
                    column,
                    columns[column].encodings,
                )
                assert columns[column].has_dictionary_page == (encoding == "RLE_DICTIONARY")


def test_a_token_takes_about_five_bytes(tmp_path: Path) -> None:
    with ShardFiles(tmp_path, SERIES[1:], (), False, ORIGIN) as files:
        files.tokens.write(_tokens(100_000, False).select(tokens_schema(SERIES[1:], False).names))
    assert (tmp_path / "tokens.parquet").stat().st_size / 100_000 < 5.5


def test_a_table_of_a_summary_is_one_row_group_however_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "ROW_GROUP_ROWS", 5)
    with ShardFiles(tmp_path, SERIES, (), True, ORIGIN) as files:
        tables = [*_summary(_tokens(500, True))]
        assert all(len(table) > 5 for table in tables)
        files.summary.write_each(tables)
    assert pq.ParquetFile(tmp_path / "summary.parquet").num_row_groups == len(tables)


def test_rows_are_gathered_into_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "ROW_GROUP_ROWS", 1000)
    tokens = _tokens(2500, True)
    with ShardFiles(tmp_path, SERIES, (), True, ORIGIN) as files:
        for begin in range(0, 2500, 250):
            files.tokens.write(tokens.slice(begin, 250))
    metadata = pq.ParquetFile(tmp_path / "tokens.parquet").metadata
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [
        1000,
        1000,
        500,
    ]


def test_a_layer_is_a_row_group_of_the_summary(tmp_path: Path) -> None:
    with ShardFiles(tmp_path, SERIES, (), True, ORIGIN) as files:
        files.summary.write_each(_summary(_tokens(500, True)))
    file = pq.ParquetFile(tmp_path / "summary.parquet")
    assert [
        set(file.read_row_group(i)["layer"].to_pylist()) for i in range(file.num_row_groups)
    ] == [{0}, {8}]


def test_a_shard_without_tokens_has_three_empty_tables(tmp_path: Path) -> None:
    with ShardFiles(tmp_path, SERIES, (), True, ORIGIN) as files:
        files.tokens.write(_tokens(0, True))
        files.summary.write_each(Summary(SERIES).tables())
    assert [rows for _, rows in files.tables().values()] == [0, 0, 0]
    assert pq.read_table(tmp_path / "tokens.parquet").schema == tokens_schema(SERIES, True)


@pytest.mark.parametrize("table", ["tokens", "documents", "summary"])
def test_a_full_scratch_can_be_resumed_and_says_how(tmp_path: Path, table: str) -> None:
    (tmp_path / f"{table}.parquet").symlink_to("/dev/full")
    tokens = _tokens(20_000, True)
    with (
        pytest.raises(
            Interrupted, match=r"make room or give another --scratch.*run the same command again"
        ) as caught,
        ShardFiles(tmp_path, SERIES, (), True, ORIGIN) as files,
    ):
        files.tokens.write(tokens)
        files.documents.write(_documents(250))
        files.summary.write_each(_summary(tokens))
    assert f"{table}.parquet" in str(caught.value)


def test_other_errors_of_the_disk_are_not_taken_for_a_full_one(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught:
        ShardFiles(tmp_path / "nowhere", SERIES, (), True, ORIGIN)
    assert caught.value.errno == errno.ENOENT


@pytest.mark.parametrize("table", ["tokens", "documents", "encoded"])
def test_every_page_has_a_checksum_and_a_reader_that_checks_it(tmp_path: Path, table: str) -> None:
    with ShardFiles(tmp_path, SERIES, (), True, ORIGIN) as files:
        files.tokens.write(_tokens(2000, True))
        files.documents.write(_documents(100))
    (tmp_path / "encoded.parquet").write_bytes(parquet.encode(_documents(100)))
    data = (tmp_path / f"{table}.parquet").read_bytes()
    rows = pq.ParquetFile(pa.BufferReader(data)).metadata.row_group(0)
    assert parquet.open_file(data).read().equals(parquet.read(data))
    for at in range(rows.num_columns):
        chunk = rows.column(at)
        damaged = bytearray(data)
        begins = [
            chunk.data_page_offset,
            *([chunk.dictionary_page_offset] if chunk.has_dictionary_page else []),
        ]
        damaged[min(begins) + chunk.total_compressed_size - 1] ^= (
            1  # the last byte of the last page
        )
        for read in (lambda data: parquet.open_file(data).read(), parquet.read):
            with pytest.raises(OSError, match="CRC checksum verification failed"):
                read(bytes(damaged))


def test_a_column_that_a_file_lacks_is_an_error_and_no_hole() -> None:
    table = pa.table({"a": [1, 2], "b": ["x", "y"], "c": [[1.0], []]})
    data = parquet.encode(table)
    assert parquet.read(data) == table
    for filters in (None, pc.field("a") > 0):
        assert parquet.read(data, ["c", "a"], filters) == table.select(["c", "a"])
        with pytest.raises(pa.ArrowInvalid, match="d"):
            parquet.read(data, ["a", "d"], filters)


def test_a_damaged_name_of_a_column_is_an_error_of_arrow() -> None:
    data = bytearray(parquet.encode(pa.table({"name": [1]})))
    at = data.index(b"name")
    while at >= 0:
        data[at] = 0xFF
        at = data.find(b"name", at)
    with pytest.raises((OSError, pa.ArrowException)):
        parquet.read(bytes(data)).to_pylist()
