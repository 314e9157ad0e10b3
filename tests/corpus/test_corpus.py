"""Every document of a file comes out once, in order, whatever the cut; bad content comes out as a
reason.
"""

from __future__ import annotations

import base64
import bz2
import csv
import dataclasses
import gzip
import hashlib
import io
import json
import lzma
import os
import random
import re
import sys
import tracemalloc
import unicodedata
import uuid
from collections.abc import Callable, Sequence
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from afn_ray.cli import commands
from afn_ray.corpus import csv_rows, footer, listing, reading, row_groups, sources, streams
from afn_ray.corpus_values import Document, FileInfo, ReadOptions, Shard
from afn_ray.errors import CorpusChanged, CorpusError, ShardError, Unavailable
from afn_ray.store import corpus_files, readers, storage, uris

OPTIONS = ReadOptions("auto", "text", None, "line", 1 << 20)
IDS = dataclasses.replace(OPTIONS, id_column="id")
WHOLE = dataclasses.replace(OPTIONS, txt_documents="file")
BOM = b"\xef\xbb\xbf"


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    packed: bytes = sink.getvalue().to_pybytes()
    return packed


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstd,
}


PIECE = 1 << 10
"""The exactness of a place in a compressed stream, in bytes."""
SKIPPABLE = bytes.fromhex("502a4d18") + (300).to_bytes(4, "little") + b"x" * 300
"""A frame of zstd that readers skip."""


def write(folder: Path, name: str, data: bytes) -> FileInfo:
    (folder / name).write_bytes(data)
    return corpus_files.stat(str(folder / name))


def remember(data: bytes, ending: str) -> FileInfo:
    """A file in memory, for what hypothesis tries."""
    uri = f"memory://corpus/{uuid.uuid4().hex}.{ending}"
    storage.write_once(uri, data)
    return corpus_files.stat(uri)


def read_all(
    file: FileInfo, options: ReadOptions = OPTIONS, shard_bytes: int = 1 << 30
) -> list[Document]:
    """Documents over all slices; the counts that slices state must be true."""
    documents: list[Document] = []
    for slice in listing.cut(file, options, shard_bytes):
        found = list(reading.read(slice, options))
        assert slice.num_documents in (-1, len(found))
        documents += found
    assert all(d.source == file.uri for d in documents)
    assert all(d.text == "" for d in documents if d.problem is not None)
    return documents


def texts(documents: Sequence[Document]) -> list[str | None]:
    """Texts, with None for the quarantined."""
    return [d.text if d.problem is None else None for d in documents]


def is_garbled(text: str, num_replaced: int) -> bool:
    """True if four characters, and more than one of twenty, are replaced or control characters."""
    num_bad = num_replaced + sum(
        unicodedata.category(c) == "Cc" and c not in "\t\n\f\r\x7f" for c in text
    )
    return num_bad >= 4 and num_bad * 20 > len(text)


def one(data: bytes, ending: str, options: ReadOptions = OPTIONS) -> Document:
    (document,) = read_all(remember(data, ending), options)
    return document


def jsonl(*rows: object) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def parquet(path: Path, columns: dict[str, Any], **how: Any) -> FileInfo:
    pq.write_table(pa.table(columns), path, **how)
    return corpus_files.stat(str(path))


# --- listing
# ---------------------------------------------------------------------------------------------


def test_list_files_takes_known_endings_once_and_sorted(tmp_path: Path) -> None:
    known = [
        "a.txt",
        "b.JSONL",
        "c.ndjson.gz",
        "d.csv.zst",
        "e.parquet",
        "f.txt.bz2",
        "g.csv.xz",
        "part.gz.parquet",
    ]
    unknown = ["h.pdf", "i.parquet.gz", "noending", "j.tar.gz"]
    for name in known + unknown:
        write(tmp_path, name, b"x")
    files, skipped = listing.list_files([str(tmp_path / "*.txt"), str(tmp_path)], OPTIONS)
    assert [f.uri for f in files] == sorted(str(tmp_path / n) for n in known)
    assert [file.uri for file in skipped] == sorted(str(tmp_path / n) for n in unknown)
    assert [file.size for file in skipped] == [Path(file.uri).stat().st_size for file in skipped]


def test_list_files_without_a_known_ending_says_what_to_do(tmp_path: Path) -> None:
    write(tmp_path, "h.pdf", b"x")
    with pytest.raises(CorpusError, match=r"\.jsonl.*h\.pdf.*--format"):
        listing.list_files([str(tmp_path)], OPTIONS)
    with pytest.raises(CorpusError, match="no such file"):
        listing.list_files([str(tmp_path / "absent")], OPTIONS)


def test_explicit_format_applies_to_all_and_compression_goes_by_ending(tmp_path: Path) -> None:
    write(tmp_path, "log", jsonl({"text": "a"}))
    write(tmp_path, "log.1.gz", gzip.compress(jsonl({"text": "b"})))
    options = dataclasses.replace(OPTIONS, format="jsonl")
    files, skipped = listing.list_files([str(tmp_path)], options)
    assert skipped == []
    assert [texts(read_all(f, options)) for f in files] == [["a"], ["b"]]


@pytest.mark.parametrize("name", ["a b.jsonl", "ünï 文.jsonl", "a*[b]?.jsonl", "a#b%20c&d.jsonl"])
def test_a_file_with_an_odd_name_is_found_by_it_alone(tmp_path: Path, name: str) -> None:
    write(tmp_path, name, jsonl({"text": "x"}))
    write(tmp_path, "axb.jsonl", jsonl({"text": "not asked for"}))
    storage.write_once(f"memory://{tmp_path.name}/{name}", jsonl({"text": "x"}))
    for pattern in (str(tmp_path / name), f"memory://{tmp_path.name}/{name}"):
        (file,), _ = listing.list_files([pattern], OPTIONS)
        assert texts(read_all(file)) == ["x"]


# --- tables
# ----------------------------------------------------------------------------------------------

TABLES = {
    "Delta Lake": ("_delta_log/00000000000000000000.json", "delta_scan('{0}')"),
    "Iceberg": ("metadata/v1.metadata.json", "iceberg_scan('{0}')"),
    "Hudi": (".hoodie/hoodie.properties", 'format("hudi").load("{0}")'),
    "Spark stream": ("_spark_metadata/0", 'spark.read.parquet("{0}")'),
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("remote", [False, True])
def test_a_table_is_refused_however_it_is_given(tmp_path: Path, name: str, remote: bool) -> None:
    mark, export = TABLES[name]
    place = f"memory://lake{tmp_path.name}" if remote else str(tmp_path)
    table = f"{place}/lake/events"
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": ["a"]}), sink)
    data = [f"{table}/part-0.parquet", f"{table}/data/year=2026/part-1.parquet"]
    for uri in [*data, f"{place}/lake/plain/metadata/a.parquet"]:
        storage.write_once(uri, sink.getvalue())
    patterns = [
        table,
        table + "/",
        f"{place}/lake",
        place,
        f"{table}/*.parquet",
        f"{table}/data/*/*",
        data[1],
        f"{place}/lake/ev*/**/*.parquet",
    ]
    for pattern in patterns:
        assert listing.list_files([pattern], OPTIONS)
    storage.write_once(f"{table}/{mark}", b"{}")
    for pattern in patterns:
        with pytest.raises(
            CorpusError, match=f"events is an? .*{mark.split('/')[0]}|what a Spark stream"
        ) as error:
            listing.list_files([pattern], OPTIONS)
        assert export.format(uris.absolute(table)) in str(error.value)
    files, _ = listing.list_files([f"{place}/lake/plain"], OPTIONS)
    assert [f.uri.rpartition("/")[2] for f in files] == ["a.parquet"]


@pytest.mark.parametrize("pattern", ["lake", "lake/*/*.jsonl", "lake/**/*.jsonl"])
def test_the_look_for_tables_takes_as_long_for_many_folders_as_for_two(
    memory: str, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[str] = []
    exists = storage.exists

    def look(uri: str) -> bool:
        looks.append(uri)
        return exists(uri)

    monkeypatch.setattr(storage, "exists", look)
    num_looks = []
    for num_folders in (2, 40):
        place = f"{memory}/{num_folders}"
        for i in range(num_folders):
            storage.write_once(f"{place}/lake/folder-{i}/a.jsonl", b'{"text": "a"}')
        looks.clear()
        assert len(listing.list_files([f"{place}/{pattern}"], OPTIONS)[0]) == num_folders
        num_looks.append(len(looks))
    assert 0 < num_looks[0] == num_looks[1]
    storage.write_once(f"{place}/lake/folder-7/_delta_log/0.json", b"{}")
    with pytest.raises(CorpusError, match="folder-7 is a Delta Lake table"):
        listing.list_files([f"{place}/{pattern}"], OPTIONS)


def test_the_command_refuses_a_table_before_it_loads_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "events" / "_delta_log").mkdir(parents=True)
    parquet(tmp_path / "events" / "a.parquet", {"text": ["a"]})
    monkeypatch.setitem(sys.modules, "afn_ray.runs.job", None)  # who imports it, fails
    monkeypatch.setitem(sys.modules, "afn_ray.runs.estimate", None)
    for pattern in (tmp_path / "events", tmp_path / "events" / "*.parquet"):
        with pytest.raises(SystemExit) as stopped:
            commands.main(
                ["run", str(pattern), "--model", "none", "--store", str(tmp_path / "store")]
            )
        assert stopped.value.code == 2
        assert "is a Delta Lake table" in capsys.readouterr().err


# --- cutting
# ---------------------------------------------------------------------------------------------

PIECES = st.sampled_from(
    [
        b"a",
        b" ",
        b"    ",
        b"\t",
        b"\r",
        b"\x00",
        "é".encode(),
        b"\xc3",
        b"\xff",
        BOM,
        "\ufffd".encode(),
    ]
)
LINES = st.lists(st.lists(PIECES, max_size=6).map(b"".join), max_size=30)


@settings(max_examples=150, deadline=None)
@given(LINES, st.booleans(), st.booleans(), st.integers(1, 60), st.integers(1, 20))
def test_cuts_conserve_documents_and_offsets(
    lines: list[bytes], bom: bool, ended: bool, shard_bytes: int, block: int
) -> None:
    data = BOM * bom + b"\n".join(lines) + b"\n" * ended
    file = remember(data, "txt")
    whole = read_all(file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "BLOCK_BYTES", max(block, 3))
        slices = listing.cut(file, OPTIONS, shard_bytes)
        assert read_all(file, OPTIONS, shard_bytes) == whole
    bounds = [0] + [s.end for s in slices]
    assert [s.start for s in slices] == bounds[:-1] and bounds[-1] == len(data)
    assert all(s.num_bytes > shard_bytes and data[s.end - 1] == 10 for s in slices[:-1])
    assert len(slices) == 1 or len(data) > shard_bytes
    expected = [
        line for line in data.removeprefix(BOM).split(b"\n") if line.strip()
    ]  # a second BOM is text
    assert len(whole) == len(expected)
    for document, line in zip(whole, expected, strict=True):
        assert data[document.offset : document.offset + len(line)] == line
        text = line.removesuffix(b"\r").decode(errors="replace")
        assert document.num_replaced == text.count("\ufffd") - line.count("\ufffd".encode())
        assert texts([document]) == [None if is_garbled(text, document.num_replaced) else text]


@settings(max_examples=60, deadline=None)
@given(LINES, LINES, st.integers(1, 40))
def test_appending_leaves_full_slices_as_they_were(
    old: list[bytes], new: list[bytes], shard_bytes: int
) -> None:
    data = b"".join(line + b"\n" for line in old)
    before = listing.cut(remember(data, "jsonl"), OPTIONS, shard_bytes)
    after = listing.cut(remember(data + b"\n".join(new), "jsonl"), OPTIONS, shard_bytes)
    full = [s for s in before if s.num_bytes > shard_bytes]
    assert [s.identity[1:] for s in after[: len(full)]] == [s.identity[1:] for s in full]
    assert len(full) >= len(before) - 1


def test_a_slice_hash_is_that_of_its_bytes() -> None:
    data = jsonl(*({"text": str(i)} for i in range(100)))
    slices = listing.cut(remember(data, "jsonl"), OPTIONS, 300)
    assert len(slices) > 3
    for s in slices:
        assert s.sha256 == hashlib.sha256(data[s.start : s.end]).hexdigest()


@pytest.mark.parametrize(
    ("ending", "options", "num_documents"),
    [("csv", OPTIONS, -1), ("jsonl.gz", OPTIONS, -1), ("txt", WHOLE, 1), ("txt.gz", WHOLE, -1)],
)
def test_what_cannot_be_cut_is_one_slice(
    ending: str, options: ReadOptions, num_documents: int
) -> None:
    data = b"text\n" + b"a\n" * 500
    if ending.endswith("gz"):
        data = gzip.compress(data)
    file = remember(data, ending)
    (slice,) = listing.cut(file, options, 10)
    assert (slice.start, slice.end, slice.num_bytes, slice.num_documents) == (
        0,
        len(data),
        len(data),
        num_documents,
    )
    assert slice.sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("ending", ["jsonl", "csv", "txt", "conllu"])
def test_an_empty_file_has_no_documents(ending: str) -> None:
    (slice,) = listing.cut(remember(b"", ending), OPTIONS, 100)
    assert (slice.start, slice.end, slice.num_documents) == (0, 0, 0)
    assert list(reading.read(slice, OPTIONS)) == []


@pytest.mark.parametrize("ending", ["jsonl.gz", "txt.bz2", "csv.xz", "jsonl.zst", "conllu.gz"])
@pytest.mark.parametrize("options", [OPTIONS, WHOLE], ids=["lines", "whole"])
def test_a_compressed_file_without_a_byte_is_cut_short(ending: str, options: ReadOptions) -> None:
    (slice,) = listing.cut(remember(b"", ending), options, 100)
    (document,) = reading.read(slice, options)
    is_one = ending == "txt.bz2" and options is WHOLE  # a file is a document
    assert slice.num_documents == -1
    assert (document.lost_bytes, document.lost_documents) == (1, 1 if is_one else None)
    assert document.problem is not None and "the file has 0 bytes" in document.problem
    (nothing,) = listing.cut(
        remember(COMPRESS[ending.rpartition(".")[2]](b""), ending), OPTIONS, 100
    )
    assert list(reading.read(nothing, OPTIONS)) == []


def test_an_empty_text_file_is_an_empty_document() -> None:
    document = one(b"", "txt", WHOLE)
    assert (document.text, document.problem) == ("", None)


# --- JSONL and text
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"{", "not JSON: "),
        (b"nonsense", "not JSON: "),
        (b"\x00", "not JSON: "),
        (b"[" * 100_000, "not JSON: nested too deeply"),
        (b'{"text": ' + b"1" * 5000 + b"}", "not JSON: Exceeds the limit"),
        (b"[1]", "line is list, expected an object"),
        (b"null", "line is NoneType, expected an object"),
        (b'{"body": "x", "b": 1}', "no column 'text'; it has: body, b"),
        (b'{"text": null}', "text is null"),
        (b'{"text": NaN}', "text is float, expected a string"),
        (b'{"text": 3}', "text is int, expected a string"),
        (b'{"text": {"a": "b"}}', "text is dict, expected a string"),
        (b'{"text": ["a", 1]}', "text is a list whose item 1 is int, expected a string"),
    ],
    ids=lambda value: None,
)
def test_bad_lines_are_quarantined_and_the_next_is_read(line: bytes, problem: str) -> None:
    bad, good = read_all(remember(line + b"\n" + jsonl({"text": "good"}), "jsonl"))
    assert bad.problem is not None and bad.problem.startswith(problem)
    assert (good.text, good.problem, good.offset) == ("good", None, len(line) + 1)


def test_missing_keys_are_listed_in_bounds_and_printable() -> None:
    row = {"\ud800\n" + "k" * 1000: 1} | {f"k{i}": 1 for i in range(1000)}
    problem = one(jsonl(row), "jsonl").problem
    assert (
        problem is not None and len(problem) < 200 and "k9 and 990 more, and 1 not shown" in problem
    )
    problem.encode()
    assert problem.isprintable()


@pytest.mark.parametrize(
    ("found", "doc_id"),
    [("x", "x"), (7, "7"), ("", ""), (None, None), (2**70 + 1, "1180591620717411303425")],
)
def test_ids_of_json_become_text(found: object, doc_id: str | None) -> None:
    document = one(jsonl({"text": "a", "id": found}), "jsonl", IDS)
    assert (document.doc_id, document.text, document.problem) == (doc_id, "a", None)


@pytest.mark.parametrize("found", [1.5, 1e300, [1], {"a": 1}, True, "\ud800"])
def test_json_ids_that_are_none_quarantine_their_row(found: object) -> None:
    row = jsonl({"text": "a", "id": found})
    bad, good = read_all(remember(row + jsonl({"text": "b", "id": 1}), "jsonl"), IDS)
    expected = (
        "id is not valid UTF-8"
        if found == "\ud800"
        else f"id is {type(found).__name__}, expected a string or"
    )
    assert bad.problem is not None and expected in bad.problem
    assert (bad.lost_bytes, bad.lost_documents, good.doc_id) == (len(row) - 1, 1, "1")


def test_a_missing_id_is_none_and_a_problem_keeps_its_id() -> None:
    rows = read_all(
        remember(jsonl({"text": "a"}, {"id": 9, "text": None}, {"id": 8}), "jsonl"), IDS
    )
    assert [(d.doc_id, d.problem is None) for d in rows] == [
        (None, True),
        ("9", False),
        ("8", False),
    ]


def test_blank_lines_crlf_and_bom() -> None:
    data = BOM + b'{"text": "a"}\r\n\r\n \t\n{"text": "b"}\r\n{"text": "c"}'
    documents = read_all(remember(data, "jsonl"))
    assert texts(documents) == ["a", "b", "c"]
    assert all(data[d.offset :].startswith(b'{"text": "%s"' % d.text.encode()) for d in documents)
    assert texts(read_all(remember(BOM + b"a\r\nb \r\n", "txt"))) == ["a", "b "]
    assert read_all(remember(BOM, "txt")) == []
    assert one(BOM + b"a\r\nb\n", "txt", WHOLE).text == "a\r\nb\n"


def test_only_what_was_replaced_in_the_text_counts() -> None:
    row = (
        b'{"other": "\xff\xff", "text": "a\xff\xe2\x82b\xef\xbf\xbd\\ufffd\\ud800\\ud83d\\ude00", '
        b'"id": "\xc3\xa9"}'
    )
    document = one(row, "jsonl", IDS)
    assert document.text == "a\ufffd\ufffdb\ufffd\ufffd\ufffd\U0001f600"
    assert (document.num_replaced, document.doc_id) == (3, "\xe9")
    document = one(b"a\xffb\xef\xbf\xbd", "txt", WHOLE)
    assert (document.text, document.num_replaced) == ("a\ufffdb\ufffd", 1)


def test_documents_over_the_limit() -> None:
    options = dataclasses.replace(OPTIONS, max_document_bytes=10)
    for size, ok in ((5, True), (6, False)):  # two bytes each
        data = jsonl({"text": "é" * size})
        document = one(data, "jsonl", options)
        assert (document.problem is None) == ok
    assert document.problem == "document of 12 bytes is over max_document_bytes = 10"
    whole = dataclasses.replace(options, txt_documents="file")
    assert one(BOM + b"x" * 10, "txt", whole).text == "x" * 10
    for size in (11, 14, 5000):
        assert (
            one(b"x" * size, "txt", whole).problem
            == f"document of {size} bytes is over max_document_bytes = 10"
        )
    for ending, compress in COMPRESS.items():
        problem = one(compress(b"x" * 5000), f"txt.{ending}", whole).problem
        assert problem is not None and "bytes is over max_document_bytes = 10" in problem


def test_a_long_line_is_skipped_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "LINE_BYTES", 4 << 20)
    options = dataclasses.replace(OPTIONS, max_document_bytes=1000)
    with (tmp_path / "a.jsonl").open("wb") as sink:
        sink.write(jsonl({"text": "before"}))
        for _ in range(40):
            sink.write(b"x" * (1 << 20))
        sink.write(b"\n" + b" " * (6 << 20) + b"\n" + jsonl({"text": "after"}))
    tracemalloc.start()
    documents = read_all(corpus_files.stat(str(tmp_path / "a.jsonl")), options)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20
    assert texts(documents) == ["before", None, "after"]
    assert documents[1].problem == f"line of {40 << 20} bytes is over the limit of {4 << 20}"


@pytest.mark.parametrize("ending", ["jsonl.gz", "txt.gz", "csv.gz"])
def test_a_bomb_is_read_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    monkeypatch.setattr(streams, "LINE_BYTES", 4 << 20)
    with gzip.open(tmp_path / f"bomb.{ending}", "wb", compresslevel=1) as sink:
        sink.write(b"text\n")
        for _ in range(200):
            sink.write(bytes(1 << 20))
    file = corpus_files.stat(str(tmp_path / f"bomb.{ending}"))
    options = dataclasses.replace(WHOLE, max_document_bytes=1000)
    tracemalloc.start()
    documents = read_all(file, options)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 48 << 20
    assert file.size < 1 << 20
    assert all(d.problem is not None for d in documents) and documents


# --- encodings
# -------------------------------------------------------------------------------------------

RUSSIAN = ["Старая собака лаяла на луну.", "Реки текут в море, а море не полно.", "Да"]
UTF = ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"]


def marked(text: str, encoding: str) -> bytes:
    return ("\ufeff" + text).encode(encoding)


@pytest.mark.parametrize("encoding", UTF)
@pytest.mark.parametrize("compression", ["", "gz", "zst"])
def test_a_byte_order_mark_decides(encoding: str, compression: str) -> None:
    conllu = "".join(f"1\t{t.split()[0]}\t_\tNOUN\t_\t_\t_\t_\t_\t_\n\n" for t in RUSSIAN)
    for ending, text, expected in (
        ("txt", "\r\n".join(RUSSIAN) + "\n", RUSSIAN),
        (
            "jsonl",
            "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in RUSSIAN),
            RUSSIAN,
        ),
        ("csv", "text\n" + "".join(f'"{t}"\r\n' for t in RUSSIAN), RUSSIAN),
        ("conllu", conllu, [t.split()[0] for t in RUSSIAN]),
    ):
        data = marked(text, encoding)
        if compression:
            data, ending = COMPRESS[compression](data), f"{ending}.{compression}"
        documents = read_all(remember(data, ending), OPTIONS, 20)
        assert texts(documents) == expected
        assert [d.num_replaced for d in documents] == [0] * 3
        whole = one(data, ending, WHOLE) if ending.startswith("txt") else None
        assert whole is None or (whole.text, whole.num_replaced) == (text, 0)
    file = remember(marked('{"text": "a"}\n', encoding), "jsonl")
    listing.check_columns([file], OPTIONS)
    with pytest.raises(CorpusError, match=r"no column 'body'.*it has: text"):
        listing.check_columns([file], dataclasses.replace(OPTIONS, text_column="body"))


@pytest.mark.parametrize("encoding", UTF)
@pytest.mark.parametrize("block", [3, 5, 1 << 20])
def test_what_is_invalid_after_a_byte_order_mark_is_replaced_and_counted(
    encoding: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "BLOCK_BYTES", block)
    lone = b"\x00\xd8" + b"\0\0" * ("32" in encoding)
    lone = lone[::-1] if encoding.endswith("be") else lone
    text = "the old dog " * 20
    data = (
        marked(text, encoding) + lone + text.encode(encoding) + b"x"
    )  # and half a character at the end
    documents = read_all(remember(data + b"" * 2, "txt"))
    assert [(d.text, d.num_replaced) for d in documents] == [(f"{text}\ufffd{text}\ufffd", 2)]


def test_a_mark_in_two_bytes_leaves_the_limit_of_a_document_in_utf8() -> None:
    options = dataclasses.replace(WHOLE, max_document_bytes=1000)
    for size, ok in ((1000, True), (1001, False)):
        found = one(marked("x" * size, "utf-16-le"), "txt", options)
        assert (found.problem is None) is ok and found.lost_bytes == (0 if ok else 2 * size + 2)


GARBLED = {
    "cp1251": ("\n".join(RUSSIAN[:2]).encode("cp1251"), "cp1251"),
    "shift-jis": ("吾輩は猫である。名前はまだ無い。".encode("shift-jis"), "Shift-JIS"),
    "utf-16 without a mark": (
        "In the beginning God created".encode("utf-16-le"),
        "UTF-16 or UTF-32 without a byte",
    ),
    "russian utf-16 without a mark": (
        RUSSIAN[0].encode("utf-16-le"),
        "UTF-16 without a byte order mark",
    ),
    "utf-32 without a mark": (
        "In the beginning".encode("utf-32-be"),
        "UTF-16 or UTF-32 without a byte order mark",
    ),
    "jpeg": (b"\xff\xd8\xff\xe0\x00\x10JFIF" + random.Random(0).randbytes(4000), "binary data"),
    "twice encoded": (
        "\n".join(RUSSIAN).encode().decode("latin-1").encode(),
        "once read as latin-1",
    ),
    "NUL": (b"ab" + b"\0" * 40, "binary data"),
}


@pytest.mark.parametrize("name", GARBLED)
def test_what_is_no_utf8_text_is_quarantined_with_the_likely_cause(name: str) -> None:
    data, cause = GARBLED[name]
    document = one(data, "txt", WHOLE)
    text = data.decode(errors="replace")
    assert document.problem is not None and cause in document.problem
    assert f"of {len(text):,} characters " in document.problem
    assert (document.lost_bytes, document.lost_documents) == (len(data), 1)
    assert document.num_replaced == text.count("\ufffd")


@pytest.mark.parametrize("encoding", ["iso2022_jp", "iso2022_jp_2", "iso2022_kr"])
def test_text_of_seven_bits_that_is_none_is_quarantined(encoding: str) -> None:
    text = (
        "안녕하세요. " * 30 if encoding == "iso2022_kr" else "吾輩は猫である。名前はまだ無い。" * 30
    )
    for data, ending in (
        (text.encode(encoding), "txt"),
        (b'{"text": "%s"}' % text.encode(encoding), "jsonl"),
    ):
        found = one(data, ending, WHOLE)
        assert (
            found.problem is not None
            and "ISO-2022" in found.problem
            and found.lost_bytes == len(data)
        )
    assert one(b"\x1b[31mred\x1b(B and ESC $5", "txt", WHOLE).problem is None


def test_rows_in_another_encoding_are_quarantined_and_the_others_are_read() -> None:
    rows = [
        b'{"text": "%s"}' % RUSSIAN[0].encode("cp1251"),
        b'{"text": "%s"}' % RUSSIAN[0].encode(),
    ]
    nul = json.dumps({"text": "a" + "\0" * 9}).encode()
    bad, good, escaped = read_all(remember(b"\n".join([*rows, nul]), "jsonl"))
    assert bad.problem is not None and "cp1251" in bad.problem
    assert (bad.lost_bytes, bad.lost_documents, bad.num_replaced) == (len(rows[0]), 1, 23)
    assert (
        good.text == RUSSIAN[0]
        and escaped.problem is not None
        and "9 control characters" in escaped.problem
    )
    (line,) = read_all(remember('{"text": "the old dog"}'.encode("utf-16-le"), "jsonl"))
    assert (
        line.problem is not None
        and line.problem.startswith("not JSON: ")
        and "UTF-16" in line.problem
    )
    file = remember("id,text\n1,a\n".encode("utf-16-le"), "csv")
    with pytest.raises(
        CorpusError, match=r"no column 'text'.*UTF-16 or UTF-32 without a byte order mark"
    ):
        listing.check_columns([file], OPTIONS)


def test_a_few_wrong_characters_are_measured_and_counted() -> None:
    french = "Le chat de la voisine a mangé la souris grise du jardin public ce matin. " * 9
    document = one(french.encode("latin-1"), "txt", WHOLE)
    assert (document.problem, document.num_replaced) == (None, 9)
    assert (document.text, document.lost_bytes) == (french.replace("é", "\ufffd"), 0)
    assert texts(read_all(remember("café\nnaïf, été".encode("latin-1"), "txt"))) == [
        "caf\ufffd",
        "na\ufffdf, \ufffdt\ufffd",
    ]
    log = (
        "\x1b[31mred\x1b[0m and a long line of a log, of which the colours are but a small part, "
        "as it should be"
    )
    assert one(log.encode(), "txt").text == log
    assert one(("a\ufffd" * 99).encode(), "txt").num_replaced == 0  # of the source's own


# --- compression
# -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", COMPRESS)
def test_compressed_files_of_several_members(ending: str) -> None:
    rows = [{"text": f"t{i}" * (i % 50), "id": i} for i in range(3000)]
    halves = [jsonl(*rows[:1500]), b"\n" + jsonl(*rows[1500:])]
    documents = read_all(remember(b"".join(map(COMPRESS[ending], halves)), f"jsonl.{ending}"), IDS)
    assert [(d.text, d.doc_id) for d in documents] == [(r["text"], str(r["id"])) for r in rows]
    assert [d.offset for d in documents] == [i + (i >= 1500) for i in range(3000)]  # line numbers
    data = BOM + b"text\r\n" + b"".join(b"r%d\r\n" % i for i in range(100))
    assert texts(read_all(remember(COMPRESS[ending](data), f"csv.{ending}"))) == [
        f"r{i}" for i in range(100)
    ]
    assert (
        one(COMPRESS[ending](b"a\nb") + COMPRESS[ending](b"c"), f"txt.{ending}", WHOLE).text
        == "a\nbc"
    )


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("format", ["jsonl", "csv", "txt"])
def test_truncated_streams_give_what_is_whole_and_a_reason(ending: str, format: str) -> None:
    first = {"jsonl": jsonl(*({"text": str(i)} for i in range(50))) + b'{"text": "half'}
    plain = b"".join(b"%d\n" % i for i in range(50)) + b"hal"
    head = first.get(format, (b"text\n" if format == "csv" else b"") + plain)
    tail = COMPRESS[ending](
        random.Random(0).randbytes(5000).hex().encode()
    )  # one line, hard to compress
    *good, bad = read_all(remember(COMPRESS[ending](head) + tail[:-3000], f"{format}.{ending}"))
    assert texts(good) == [str(i) for i in range(50)]
    assert bad.problem is not None
    assert bad.problem.startswith(f"truncated or corrupt {ending} stream after 50 documents: ")
    assert bad.offset == 50


@pytest.mark.parametrize("ending", COMPRESS)
def test_a_long_truncated_stream_gives_every_line_once(ending: str) -> None:
    rows = [str(i) for i in range(60_000)]  # several reads
    head = COMPRESS[ending]("\n".join([*rows, "half"]).encode())
    tail = COMPRESS[ending](random.Random(0).randbytes(5000).hex().encode())
    *good, bad = read_all(remember(head + tail[:-3000], f"txt.{ending}"))
    assert texts(good) == rows
    assert bad.problem is not None and "after 60000 documents" in bad.problem


@pytest.mark.parametrize("ending", COMPRESS)
def test_corrupt_streams_are_one_problem(ending: str) -> None:
    bad = one(b"this is no compressed stream at all", f"jsonl.{ending}")
    assert bad.problem is not None
    assert bad.problem.startswith(f"truncated or corrupt {ending} stream after 0 documents: ")
    data = COMPRESS[ending](b"text " * 999)[:-9]
    bad = one(data, f"txt.{ending}", WHOLE)
    assert bad.problem is not None and "after 0 documents" in bad.problem
    assert (bad.lost_bytes, bad.lost_documents) == (len(data), 1)  # the file is one document


def several(ending: str) -> tuple[list[bytes], list[str]]:
    """Three streams of one file, and the texts of its documents."""
    words = random.Random(1)
    rows = [
        [
            " ".join(words.choices(["in", "the", "beginning", "god", "created", "heaven"], k=9))
            for _ in range(8)
        ]
        for _ in range(3)
    ]
    return [COMPRESS[ending](jsonl(*({"text": t} for t in part))) for part in rows], [
        t for part in rows for t in part
    ]


@pytest.mark.parametrize("ending", ["gz", "bz2", "xz"])
def test_a_flipped_bit_in_any_stream_is_told_with_what_it_cost(ending: str) -> None:
    streams_, expected = several(ending)
    whole = b"".join(streams_)
    starts = [0, len(streams_[0]), len(streams_[0] + streams_[1])]
    places = [at + i for at in starts for i in range(14)] + [
        *range(0, len(whole), 9),
        *range(len(whole) - 12, len(whole)),
    ]
    num_told = 0
    for place in places:
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        documents = read_all(remember(bytes(data), f"jsonl.{ending}"))
        bad = [d for d in documents if d.problem is not None]
        num_told += bool(bad)
        if not bad:
            assert texts(documents) == expected, place
            continue
        start = max(at for at in starts if at <= place)
        (one_bad,) = bad[-1:]
        assert (
            one_bad.problem is not None
            and f"truncated or corrupt {ending} stream" in one_bad.problem
        )
        assert texts(documents)[: 8 * starts.index(start)] == expected[: 8 * starts.index(start)]
        # The rest of the file from the damage on, and no more than from the start of its stream.
        assert (
            len(whole) - place <= one_bad.lost_bytes + PIECE
            and one_bad.lost_bytes <= len(whole) - start
        ), place
    assert num_told > len(places) * 0.7


ZSTD = base64.b64decode(
    "KLUv/QRo1QAAiDAgdGhlIG9sZCBkb2cKMTIzAwQKQMAVsw4dCartKLUv/QRo1QAAiDQgdGhlIG9sZCBkb2cKNTY3AwQKQMAVsw6ghVwRKLUv/QRo7QAAkDggdGhlIG9sZCBkb2cKOTEwMQMA4BAyZSyOWQey10Tz"
)
"""Three frames with checksums, of 4 lines each."""


def test_a_flipped_bit_in_any_frame_of_zstd_with_checksums_is_told() -> None:
    expected = [f"{i} the old dog" for i in range(12)]
    assert texts(read_all(remember(ZSTD, "txt.zst"))) == expected
    for place in range(len(ZSTD)):
        data = bytearray(ZSTD)
        data[place] ^= 1 << place % 8
        for options in (OPTIONS, WHOLE):
            documents = read_all(remember(bytes(data), "txt.zst"), options)
            if documents[-1].problem is None:
                assert "\n".join(d.text for d in documents).strip() == "\n".join(expected), place
            else:
                assert (
                    documents[-1].lost_bytes >= len(ZSTD) * (2 - place * 3 // len(ZSTD)) // 3 - 9
                ), place


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("options", [OPTIONS, WHOLE], ids=["line", "file"])
def test_what_is_behind_a_stream_and_is_none_is_told(ending: str, options: ReadOptions) -> None:
    first, second = COMPRESS[ending](b"a\nb\n"), COMPRESS[ending](b"c\n" * 40)
    for rest in (b"garbage", first[:1], second[:-3], b"\xff" * 3000, b"\0\0\0\0x", second[::-1]):
        documents = read_all(remember(first + rest, f"txt.{ending}"), options)
        bad = documents[-1]
        assert bad.problem is not None and f"truncated or corrupt {ending} stream" in bad.problem, (
            rest
        )
        if options is WHOLE:
            assert texts(documents) == [None] and bad.lost_bytes == len(first + rest)
        else:
            assert texts(documents)[:2] == ["a", "b"] and bad.lost_bytes >= len(rest.lstrip(b"\0"))


@pytest.mark.parametrize("ending", COMPRESS)
def test_streams_without_content_and_legal_padding_are_no_damage(ending: str) -> None:
    empty, full = COMPRESS[ending](b""), COMPRESS[ending](b"a\n")
    padding = {
        "gz": [b"\0", b"\0" * 2000],
        "xz": [b"\0" * 4, b"\0" * 2000],
        "bz2": [],
        "zst": [SKIPPABLE],
    }[ending]
    for data in (empty * 3, full + empty, empty + full + empty + full):
        for more in (b"", *padding):
            found = read_all(remember(data + more, f"txt.{ending}"))
            assert texts(found) == ["a"] * data.count(full)
            found = read_all(remember(data + more + full, f"txt.{ending}"))
            assert texts(found) == ["a"] * (data.count(full) + 1)
    if ending == "xz":
        (good, bad) = read_all(remember(full + b"\0" * 6, "txt.xz"))
        assert bad.problem is not None and "6 zeros, expected a multiple of 4" in bad.problem
    if ending == "bz2":
        (good, bad) = read_all(remember(full + b"\0" * 4, "txt.bz2"))
        assert good.text == "a" and bad.lost_bytes == 4


def test_what_a_cut_or_a_bomb_loses_is_counted_in_bytes_of_the_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [random.Random(i).randbytes(30).hex() for i in range(3000)]
    for ending, compress in COMPRESS.items():
        whole = compress(jsonl(*({"text": t} for t in rows)))
        half = whole[: len(whole) // 2]
        *good, bad = read_all(remember(half, f"jsonl.{ending}"))
        assert (
            texts(good) == rows[: len(good)]
            and bad.problem is not None
            and bad.lost_documents is None
        )
        assert "uncounted" in bad.problem or ending == "zst"
        kept = len(half) - bad.lost_bytes  # by the share of the documents
        assert abs(kept / len(whole) - len(good) / len(rows)) < 0.02, ending
        if ending == "zst":  # Arrow writes no checksum
            continue
        damaged = bytearray(whole)
        damaged[len(whole) // 2] ^= 1
        *good, bad = read_all(remember(bytes(damaged), f"jsonl.{ending}"))
        assert bad.problem is not None and "truncated or corrupt" in bad.problem
        if ending != "bz2":  # which gives what a block holds, and then its checksum
            assert abs(bad.lost_bytes / len(whole) - (1 - len(good) / len(rows))) < 0.05, ending
    monkeypatch.setattr(streams, "EXPANSION_FROM_BYTES", 1 << 16)
    first = gzip.compress(b"a\n" * 9)
    *good, bad = read_all(remember(first + gzip.compress(bytes(1 << 24)), "txt.gz"))
    assert texts(good) == ["a"] * 9
    assert bad.problem is not None and "over 200 times as many" in bad.problem
    assert (
        len(gzip.compress(bytes(1 << 24))) * 0.9
        < bad.lost_bytes
        <= len(gzip.compress(bytes(1 << 24)))
    )


def test_a_bad_row_of_a_stream_counts_its_share_of_the_file(tmp_path: Path) -> None:
    text = "in the beginning was the word " * 30
    for ending in ("", *COMPRESS):
        data = (jsonl({"text": text}) * 4 + jsonl({"body": text}) + b"{\n") * 50
        file = remember(COMPRESS[ending](data) if ending else data, f"jsonl.{ending}".rstrip("."))
        bad = [d for d in read_all(file) if d.problem is not None]
        assert len(bad) == 100 and all(d.lost_documents == 1 and d.lost_bytes >= 1 for d in bad)
        long, short = bad[0::2], bad[1::2]
        if not ending:
            assert {d.lost_bytes for d in long} == {len(jsonl({"body": text})) - 1}
            assert {d.lost_bytes for d in short} == {1}


@pytest.mark.parametrize("ending", COMPRESS)
def test_rows_of_small_streams_lose_no_more_than_their_file_has(ending: str) -> None:
    """All of them are read ahead with the first row."""
    data = b"".join(COMPRESS[ending](b"{no %d\n" % i) for i in range(9))
    documents = read_all(remember(data, f"jsonl.{ending}"))
    lost = [d.lost_bytes for d in documents]
    assert len(lost) == 9 and sum(lost) <= len(data) + len(lost)
    if ending in ("gz", "bz2", "xz"):  # of which the end of each stream is known
        assert max(lost) <= -(-len(data) // 9)


# --- CSV
# -------------------------------------------------------------------------------------------------

CELL = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(CELL, CELL), max_size=12), st.booleans())
@example([(csv_rows.NULL, "a"), ("b", csv_rows.NULL), ("\\\\N", csv_rows.NULL * 2)], False)
def test_csv_gives_back_what_was_written(rows: list[tuple[str, str]], bom: bool) -> None:
    """Only the null of MySQL and Hive is no text and no id."""
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, quoting=csv.QUOTE_ALL)
    writer.writerows([("id", "text"), *rows])
    options = dataclasses.replace(IDS, csv_escape="doubled")
    documents = read_all(remember(BOM * bom + buffer.getvalue().encode(), "csv"), options)
    assert [(d.offset, d.doc_id) for d in documents] == [
        (i, None if a in ("", csv_rows.NULL) else a) for i, (a, _) in enumerate(rows)
    ]
    assert texts(documents) == [
        None if b == csv_rows.NULL or is_garbled(b, 0) else b for _, b in rows
    ]
    assert all(d.num_replaced == 0 for d in documents)


def test_csv_rows_that_are_not_right() -> None:
    data = (
        b'id,text\n1,a\n2\n3,c,d\n\n4,\n5,x\x00\xff\n\xff,e\n6,"line\r\n\r\nline '
        b'""q"""\n7,a\rb\n8,last\n'
    )
    documents = read_all(remember(data, "csv"), IDS)
    problems = ["row has 1 fields, the header has 2", "row has 3 fields, the header has 2"]
    assert texts(documents) == [
        "a",
        None,
        None,
        "",
        "x\x00\ufffd",
        None,
        'line\r\n\r\nline "q"',
        None,
        "last",
    ]
    assert [d.problem for d in documents[1:3]] == problems
    assert documents[5].problem is not None and documents[5].problem.startswith(
        "the id is not valid UTF-8"
    )
    assert documents[7].problem is not None and documents[7].problem.startswith("not CSV: ")
    assert [d.num_replaced for d in documents] == [0, 0, 0, 0, 1, 0, 0, 0, 0]
    assert [d.offset for d in documents] == list(range(9))
    lost = [len(b"2"), len(b"3,c,d"), len(b"\xff,e"), len(b"7,a\rb")]
    bad = [d for d in documents if d.problem is not None]
    assert [(d.lost_bytes, d.lost_documents) for d in bad] == [(n + 1, 1) for n in lost]


def test_csv_quote_that_is_not_closed() -> None:
    *good, bad = read_all(remember(b'text\na\n"b\nc\n\nd\n', "csv"))
    assert texts(good) == ["a"]
    assert bad.problem == (
        "quoted field is not closed before the end of the file, and took all of it from line 3 on"
    )
    assert (bad.lost_bytes, bad.lost_documents) == (len(b'"b\nc\n\nd\n'), 3)


def test_csv_row_over_the_limit_ends_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "LINE_BYTES", 1000)
    options = dataclasses.replace(OPTIONS, max_document_bytes=100)
    assert (
        len(read_all(remember(b"text\n" + b"a\n" * 2000, "csv"), options)) == 2000
    )  # of a row, not of the file
    for row in (b'"' + b"b\n" * 1000 + b'"', b"b" * 2000):
        documents = read_all(remember(b"text\na\n" + row + b"\nc\n", "csv"), options)
        assert texts(documents) == ["a", None]
        assert (
            documents[1].problem is not None
            and "over the limit of 1000 bytes" in documents[1].problem
        )


def test_csv_fields_longer_than_the_module_likes() -> None:
    assert one(b"text\n" + b"a" * 500_000 + b"\n", "csv").text == "a" * 500_000
    assert csv.field_size_limit() >= 64 << 20  # raised, never lowered
    small = dataclasses.replace(OPTIONS, max_document_bytes=10)
    assert one(b"text\n" + b"a" * 500_000 + b"\n", "csv", small).problem == (
        "document of 500000 bytes is over max_document_bytes = 10"
    )


SPARK = [r'"a","He said \"hi\" and left, then"', r'"b","ends with a backslash \\"', r'c,C:\temp',
         r'"d","say \"\""',
         r'"e","C:\temp, or so"', '"f","two\\\nlines"', '"g",""']  # fmt: skip
SPARK_TEXTS = ['He said "hi" and left, then', "ends with a backslash \\", r"C:\temp", 'say ""',
               r"C:\temp, or so",
               "two\nlines", ""]  # fmt: skip


def csv_of(*rows: str, header: str = "id,text") -> bytes:
    return "".join(row + "\n" for row in (header, *rows)).encode()


def test_csv_with_backslashes_before_its_quotes_is_read_when_it_is_said() -> None:
    options = dataclasses.replace(IDS, csv_escape="backslash")
    documents = read_all(remember(csv_of(*SPARK), "csv"), options)
    assert [(d.doc_id, d.text, d.problem) for d in documents] == [
        (i, t, None) for i, t in zip("abcdefg", SPARK_TEXTS, strict=True)
    ]
    shards = [
        Shard.of(listing.cut(remember(csv_of(*SPARK), "csv"), o, 1000), o).options.identity("csv")
        for o in (IDS, options)
    ]
    assert shards[0] != shards[1]  # what one dialect measured is not taken for the other's
    assert IDS.identity("jsonl") == options.identity("jsonl")


@pytest.mark.parametrize("row", [row for row in SPARK if "\n" not in row])
@pytest.mark.parametrize("last", [True, False])
def test_csv_with_backslashes_before_its_quotes_never_gives_another_text(
    row: str, last: bool
) -> None:
    right = SPARK_TEXTS[SPARK.index(row)]
    header = "id,text" if last else "text,id"
    if not last:
        row = ",".join(reversed(row.split(",", 1)))
    documents = read_all(remember(csv_of(row, *["x,yes"] * 3, header=header), "csv"), IDS)
    found = [d for d in documents if d.problem is None]
    assert all(d.text in (right, "yes", "x") for d in found)
    assert len(documents) > len(found) or right in [d.text for d in found]
    problems = " ".join(d.problem or "" for d in documents)
    if '\\"' in row and len(documents) > len(found):
        assert "--csv-escape backslash" in problems


def test_csv_that_other_programs_read_otherwise_is_not_guessed_at() -> None:
    rows = [
        'a,"ok ""quoted"" text"',
        'b,5" pipe of the dog',
        'c,"abc" def',
        'd, "spaced"',
        'e," spaced"',
        "f,\\N",
        r'g,"C:\dir\"',
        '"h","{""a"": ""say \\""hi\\"" to""}"',
        "\\N,i",
        "j,'a'",
    ]
    documents = read_all(remember(csv_of(*rows), "csv"), IDS)
    assert texts(documents) == [
        'ok "quoted" text',
        '5" pipe of the dog',
        None,
        None,
        " spaced",
        None,
        None,
        r'{"a": "say \"hi\" to"}',
        "i",
        "'a'",
    ]
    assert documents[8].doc_id is None
    for at, why in (
        (2, "not CSV: ',' expected after"),
        (3, "space before its opening quote"),
        (5, "text is \\N, which MySQL"),
        (6, "it can be read in two ways"),
    ):
        assert why in (documents[at].problem or "")
        assert (documents[at].lost_bytes, documents[at].lost_documents) == (len(rows[at]) + 1, 1)
    doubled = dataclasses.replace(IDS, csv_escape="doubled")
    assert texts(read_all(remember(csv_of(rows[6]), "csv"), doubled)) == ["C:\\dir\\"]


def test_an_unclosed_quote_that_another_closes_counts_the_lines_it_took() -> None:
    data = csv_of('1,"abc', "2,def", "", '3,"ghi"', "4,jkl")
    bad, good = read_all(remember(data, "csv"), IDS)
    assert (good.doc_id, good.text) == ("4", "jkl")
    assert bad.lost_documents == 3 and bad.lost_bytes == len('1,"abc\n2,def\n\n3,"ghi"\n')
    assert bad.problem is not None and bad.problem.startswith("not CSV: ")
    for ending, compress in COMPRESS.items():
        packed = compress(
            csv_of(
                *(f"{i},{random.Random(i).random()}" for i in range(500)), '9,"abc', *["9,x"] * 200
            )
        )
        *good_rows, last = read_all(remember(packed, f"csv.{ending}"), IDS)
        assert len(good_rows) == 500 and last.lost_documents == 201
        assert 0 < last.lost_bytes < len(packed) / 2


@pytest.mark.parametrize(("separator", "name"), [(";", "';'"), ("\t", "tabs"), ("|", "'|'")])
def test_csv_with_another_separator_is_refused_by_its_name(separator: str, name: str) -> None:
    data = f'id{separator}"text"\n1{separator}a\n'.encode()
    others = f"\ufeffKunde Nr{separator}Text{separator}Betrag\n1{separator}a{separator}2\n".encode()
    for file in (
        remember(data, "csv"),
        remember(marked(data.decode(), "utf-16-le"), "csv"),
        remember(others, "csv"),
    ):
        with pytest.raises(
            CorpusError, match=rf"no column 'text'.*separated by {re.escape(name)}, expected commas"
        ):
            listing.check_columns([file], OPTIONS)


@pytest.mark.parametrize(
    ("header", "why"),
    [
        ("id, text", "spaces"),
        ("\ufefftext,id", "byte order mark"),
        ("sep=;\nid;text", "sep="),
        ("a,b", "it has: a, b$"),
    ],
)
def test_a_header_without_the_column_is_told_by_what_is_wrong_with_it(
    header: str, why: str
) -> None:
    file = remember(f"\ufeff{header}\n1,2\n".encode(), "csv")
    with pytest.raises(CorpusError, match=why) as caught:
        listing.check_columns([file], OPTIONS)
    assert "separated by" not in str(caught.value)


# --- Parquet
# ---------------------------------------------------------------------------------------------

TYPES = [
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.binary(),
    pa.large_binary(),
    pa.dictionary(pa.int32(), pa.string()),
    pa.dictionary(pa.int8(), pa.large_string()),
]


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_every_text_type_of_parquet_reads_equal(tmp_path: Path, kind: pa.DataType) -> None:
    column = pa.array(["a", None, "", "é"])
    column = (
        column.dictionary_encode().cast(kind) if pa.types.is_dictionary(kind) else column.cast(kind)
    )
    documents = read_all(parquet(tmp_path / "a.parquet", {"text": column, "id": [1, 2, 3, 4]}), IDS)
    assert texts(documents) == ["a", None, "", "é"]
    assert documents[1].problem == "text is null"
    assert [(d.offset, d.doc_id) for d in documents] == [(i, str(i + 1)) for i in range(4)]


def test_parquet_invalid_utf8_is_replaced(tmp_path: Path) -> None:
    raw = pa.array([b"a\xffb", b"\xef\xbf\xbd"])
    claimed = pa.Array.from_buffers(pa.string(), 2, raw.buffers())  # pyarrow checks nothing
    for i, column in enumerate((raw, claimed)):
        documents = read_all(
            parquet(tmp_path / f"{i}.parquet", {"text": column, "id": column}), IDS
        )
        assert [(d.text, d.num_replaced, d.doc_id) for d in documents] == [
            ("a\ufffdb", 1, r"\x61ff62"),
            ("\ufffd", 0, "\ufffd"),
        ]


@pytest.mark.parametrize(
    "values", [[1, None], [1.5, 2.5], [[1], None], [{"a\n": "x"}, None]], ids=str
)
def test_parquet_text_that_is_no_string_is_a_problem_per_row(
    tmp_path: Path, values: list[Any]
) -> None:
    documents = read_all(parquet(tmp_path / "a.parquet", {"text": values}))
    assert [d.offset for d in documents] == [0, 1]
    for problem in (d.problem for d in documents):
        assert (
            problem is not None
            and problem.endswith(", expected a string")
            and problem.isprintable()
        )


UUIDS = [uuid.UUID(int=n) for n in (0x31323334_3536_3738_9000_616263646566, 2**127 + 1, 0)]
IDS_OF_TYPES: dict[str, tuple[Any, list[str | None]]] = {
    "uuid": (pa.array([u.bytes for u in UUIDS], pa.uuid()), [str(u) for u in UUIDS]),
    "bytes": (pa.array([b"ab", b"\xff\x00", None]), ["ab", "\\xff00", None]),
    "16 bytes": (pa.array([u.bytes for u in UUIDS], pa.binary(16)),
                 [UUIDS[0].hex, UUIDS[1].hex, "00" * 16]),
    "int64": (pa.array([-(2**63), 2**63 - 1, None]), [str(-(2**63)), str(2**63 - 1), None]),
    "uint64": (pa.array([2**64 - 1, 2**64 - 2, 0], pa.uint64()),
               [str(2**64 - 1), str(2**64 - 2), "0"]),
    "decimal": (pa.array([Decimal("1.50"), Decimal("12345678901234567890.12"), None]),
                ["1.50", "12345678901234567890.12", None]),
    "date": (pa.array([date(2024, 2, 29), None, date(1, 1, 1)]),
             ["2024-02-29", None, "0001-01-01"]),
    "timestamp": (pa.array([1, 2, None], pa.timestamp("ns", "UTC")),
                  ["1970-01-01 00:00:00.000000001Z", "1970-01-01 00:00:00.000000002Z", None]),
    "time": (pa.array([1, 2, None], pa.time64("us")), ["00:00:00.000001", "00:00:00.000002", None]),
    "bool": (pa.array([True, False, None]), ["true", "false", None]),
    "dictionary": (pa.array(["a", None, "b"]).dictionary_encode(), ["a", None, "b"]),
    "string_view": (pa.array(["a", None, ""], pa.string_view()), ["a", None, ""]),
}  # fmt: skip


@pytest.mark.parametrize("name", IDS_OF_TYPES)
@pytest.mark.parametrize("store_schema", [True, False])
def test_parquet_ids_are_the_text_of_their_values(
    tmp_path: Path, name: str, store_schema: bool
) -> None:
    column, expected = IDS_OF_TYPES[name]
    file = parquet(
        tmp_path / "a.parquet", {"text": list("abc"), "id": column}, store_schema=store_schema
    )
    assert [(d.text, d.doc_id) for d in read_all(file, IDS)] == list(
        zip("abc", expected, strict=True)
    )


@pytest.mark.parametrize(
    "kind", [pa.binary(), pa.large_binary(), pa.string(), pa.binary(2)], ids=str
)
def test_no_two_ids_of_bytes_are_one(tmp_path: Path, kind: pa.DataType) -> None:
    values = [
        b"\xff\x00",
        b"ff00",
        rb"\xff00",
        rb"\x5c78",
        b"\x00",
        b"00",
        b"",
        rb"\x",
        b"ab",
        b"\x01\x02",
    ]
    if pa.types.is_fixed_size_binary(kind):
        values = [v for v in values if len(v) == 2]
    column = (
        pa.array(values, pa.binary()).view(kind) if kind == pa.string() else pa.array(values, kind)
    )
    file = parquet(tmp_path / "a.parquet", {"text": ["x"] * len(values), "id": column})
    ids = [d.doc_id for d in read_all(file, IDS)]
    assert len({*ids}) == len(values) and None not in ids
    assert ids[values.index(b"\xff\x00")] == ("ff00" if kind == pa.binary(2) else r"\xff00")
    assert kind == pa.binary(2) or ids[values.index(b"ff00")] == "ff00"


@pytest.mark.parametrize(
    "column",
    [
        pa.array([1.5, 2.5]),
        pa.array([[1], [2]]),
        pa.array([{"a": 1}, None]),
        pa.nulls(2),
        pa.array([[("a", 1)], []], pa.map_(pa.string(), pa.int64())),
        pa.array([1, 2], pa.float16()),
    ],
    ids=lambda column: str(column.type),
)
def test_parquet_ids_that_are_none_are_refused_before_anything_is_read(
    tmp_path: Path, column: pa.Array
) -> None:
    file = parquet(tmp_path / "a.parquet", {"text": ["a", "b"], "id": column})
    kind = pq.ParquetFile(file.uri).schema_arrow.field("id").type
    with pytest.raises(CorpusError) as error:
        listing.cut(file, IDS, 100)
    assert (
        f"id column 'id' of {file.uri} is {kind}, which cannot be an id; expected strings"
        in str(error.value)
    )


@pytest.mark.parametrize("shard_bytes", [1, 3000, 20_000, 1 << 30])
def test_parquet_is_cut_between_row_groups(tmp_path: Path, shard_bytes: int) -> None:
    rows = [os.urandom(20).hex() for _ in range(1000)]
    columns = {"other": [os.urandom(500) for _ in rows], "text": rows, "id": list(range(1000))}
    file = parquet(tmp_path / "a.parquet", columns, row_group_size=70)
    slices = listing.cut(file, IDS, shard_bytes)
    assert [s.start for s in slices] == [0, *(s.end for s in slices[:-1])] and slices[-1].end == 15
    assert all(s.num_bytes <= shard_bytes or s.end == s.start + 1 for s in slices)
    assert len(slices) == {1: 15, 1 << 30: 1}.get(shard_bytes, len(slices))
    assert sum(s.num_bytes for s in slices) < file.size / 4  # the other column is not read
    documents = read_all(file, IDS, shard_bytes)
    assert [(d.text, d.doc_id, d.offset) for d in documents] == [
        (t, str(i), i) for i, t in enumerate(rows)
    ]


def test_parquet_hash_is_of_the_columns_that_are_read(tmp_path: Path) -> None:
    def hashes(name: str, other: int, last: str, options: ReadOptions = OPTIONS) -> list[str]:
        columns = {"other": [other] * 30, "text": ["a"] * 29 + [last], "id": ["a"] * 29 + [last]}
        file = parquet(tmp_path / name, columns, row_group_size=10)
        return [s.sha256 for s in listing.cut(file, options, 1)]

    first = hashes("a.parquet", 1, "x")
    assert hashes("b.parquet", 2, "x") == first
    assert hashes("c.parquet", 1, "y")[:2] == first[:2]
    assert hashes("c.parquet", 1, "y")[2] != first[2]
    by_id = dataclasses.replace(OPTIONS, text_column="id")
    assert hashes("a.parquet", 1, "x", by_id) != first  # the same bytes under another name


def test_parquet_batches_stay_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [os.urandom(5000).hex() for _ in range(40)]
    file = parquet(tmp_path / "a.parquet", {"text": rows})
    monkeypatch.setattr(row_groups, "BATCH_BYTES", 20_500)
    with sources.Source(file.uri, 0, file.size) as source:
        sizes = [len(t) for t, *_ in row_groups._OpenFile(source, OPTIONS).batches(0)]
    assert sizes == [2] * 20
    assert texts(read_all(file)) == rows


def test_parquet_rows_that_do_not_come_are_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = parquet(tmp_path / "a.parquet", {"text": ["a"] * 5})
    monkeypatch.setattr(
        row_groups._OpenFile,
        "batches",
        lambda *_: iter([(["a"] * 3, [None] * 3, [None] * 3, [{}] * 3)]),
    )
    documents = read_all_inexact(file)
    assert texts(documents) == ["a", "a", "a", None]
    assert documents[3].problem == "not a readable Parquet file: row group 0: 2 rows are missing"


def test_parquet_that_is_none_is_quarantined(tmp_path: Path) -> None:
    good = tmp_path / "good.parquet"
    parquet(good, {"text": ["a"] * 100})
    data = good.read_bytes()
    for i, bad in enumerate((b"no parquet", b"PAR1PAR1", data[:-20], b"")):
        (document,) = read_all(write(tmp_path, f"{i}.parquet", bad))
        assert document.problem is not None and document.problem.startswith(
            "not a readable Parquet file: "
        )


def test_parquet_with_a_damaged_page_keeps_the_other_row_groups(tmp_path: Path) -> None:
    columns = {"text": [os.urandom(8).hex() for _ in range(30)]}
    file = parquet(tmp_path / "a.parquet", columns, row_group_size=10, use_dictionary=False)
    chunk = pq.read_metadata(file.uri).row_group(1).column(0)
    data = bytearray(Path(file.uri).read_bytes())
    data[chunk.data_page_offset : chunk.data_page_offset + 60] = b"\xff" * 60
    documents = read_all_inexact(write(tmp_path, "b.parquet", bytes(data)))
    assert [d.offset for d in documents] == [*range(10), 10, *range(20, 30)]
    problem = documents[10].problem
    assert problem is not None and problem.startswith("not a readable Parquet file: row group 1: ")
    assert all(d.problem is None for i, d in enumerate(documents) if i != 10)


@pytest.mark.parametrize("encoding", ["DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY", "PLAIN"])
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary()], ids=str)
def test_parquet_encodings_of_text(tmp_path: Path, encoding: str, kind: pa.DataType) -> None:
    rows = [f"the old dog {i}" if i % 7 else None for i in range(500)]
    columns = {
        "text": pa.array(rows, pa.string()).cast(kind),
        "id": pa.array(range(500), pa.int64()),
    }
    how = {"text": encoding, "id": "BYTE_STREAM_SPLIT"}
    file = parquet(
        tmp_path / "a.parquet",
        columns,
        use_dictionary=False,
        column_encoding=how,
        row_group_size=100,
        data_page_version="2.0",
    )
    documents = read_all(file, IDS)
    assert texts(documents) == rows
    assert [d.doc_id for d in documents] == [str(i) for i in range(500)]


def test_parquet_text_that_shares_prefixes_is_read_in_small_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_groups, "SHARED_BYTES", 4 << 20)
    columns = {"text": ["x" * (1 << 20)] * 64}
    file = parquet(
        tmp_path / "a.parquet",
        columns,
        use_dictionary=False,
        column_encoding={"text": "DELTA_BYTE_ARRAY"},
        compression="none",
    )
    assert file.size < 3 << 20
    options = dataclasses.replace(OPTIONS, max_document_bytes=1000)
    before, most = pa.total_allocated_bytes(), 0
    for slice in listing.cut(file, options, 1 << 30):
        for document in reading.read(slice, options):
            most = max(most, pa.total_allocated_bytes() - before)
            assert (
                document.problem == f"document of {1 << 20} bytes is over max_document_bytes = 1000"
            )
    assert most < 24 << 20


def test_what_parquet_loses_is_counted_in_bytes_and_rows(tmp_path: Path) -> None:
    rows = [os.urandom(8).hex() for _ in range(30)]
    file = parquet(
        tmp_path / "a.parquet",
        {"text": rows, "other": rows},
        row_group_size=10,
        use_dictionary=False,
    )
    chunks = [pq.read_metadata(file.uri).row_group(i).column(0) for i in range(3)]
    data = bytearray(Path(file.uri).read_bytes())
    data[chunks[1].data_page_offset : chunks[1].data_page_offset + 60] = b"\xff" * 60
    bad = next(
        d
        for d in read_all_inexact(write(tmp_path, "b.parquet", bytes(data)))
        if d.problem is not None
    )
    assert (bad.lost_bytes, bad.lost_documents) == (chunks[1].total_compressed_size, 10)
    for i, cut in enumerate((data[:-20], data[:-5] + b"\xff" * 5, b"no parquet")):
        (bad,) = read_all(write(tmp_path, f"{i}.parquet", bytes(cut)))
        assert (bad.lost_bytes, bad.lost_documents) == (len(cut), None)
    file = parquet(
        tmp_path / "c.parquet",
        {"text": ["a" * 900, None, "x" * 99, "é" * 50]},
        use_dictionary=False,
    )
    options = dataclasses.replace(OPTIONS, max_document_bytes=500)
    size = pq.read_metadata(file.uri).row_group(0).column(0).total_compressed_size
    bad_rows = [d for d in read_all(file, options) if d.problem is not None]
    assert [d.lost_documents for d in bad_rows] == [1, 1] and all(
        1 <= d.lost_bytes <= size for d in bad_rows
    )


def test_a_flipped_bit_of_a_page_with_a_checksum_is_told(tmp_path: Path) -> None:
    rows = [os.urandom(8).hex() for _ in range(30)]
    file = parquet(
        tmp_path / "a.parquet",
        {"text": rows},
        row_group_size=10,
        use_dictionary=False,
        compression="none",
        write_page_checksum=True,
        write_statistics=False,  # a page's header would hold its least and greatest row too
    )
    data = bytearray(Path(file.uri).read_bytes())
    assert data.count(rows[12].encode()) == 1
    data[data.index(rows[12].encode()) + 3] ^= 1
    documents = read_all_inexact(write(tmp_path, "b.parquet", bytes(data)))
    assert texts(documents) == [*rows[:10], None, *rows[20:]]
    assert documents[10].lost_documents == 10


def test_a_flipped_bit_of_a_footer_is_refused_or_told_and_never_ends_the_process(
    tmp_path: Path,
) -> None:
    rows = [os.urandom(8).hex() for _ in range(30)]
    file = parquet(tmp_path / "a.parquet", {"text": rows, "id": range(30)}, row_group_size=10)
    data = Path(file.uri).read_bytes()
    begin = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    expected = [(str(i), row) for i, row in enumerate(rows)]
    num_right = num_told = 0
    counts = [
        at for at in range(begin, len(data)) if data[at] == 20
    ]  # zigzag of 10, as the rows of a group
    for place in [*range(begin, len(data), 11), *counts]:
        damaged = bytearray(data)
        damaged[place] ^= 16 if place in counts else 1 << place % 8
        try:
            documents = [
                d
                for s in listing.cut(remember(bytes(damaged), "parquet"), IDS, 100)
                for d in reading.read(s, IDS)
            ]
        except CorpusError:
            num_told += 1  # another name of a column, or another type
            continue
        bad = [d for d in documents if d.problem is not None]
        num_told += bool(bad)
        num_right += not bad
        assert bad or [(d.doc_id, d.text) for d in documents] == expected, place
        assert all(d.lost_bytes > 0 for d in bad)
    assert num_right > 9 and num_told > 20


@pytest.mark.parametrize(
    "field",
    [
        b"\xf9\xfc" + b"\x80\x80\x20" + bytes(1 << 19),  # a list of 2^19 structs without fields
        b"\xfb" + b"\x80\x80\x20" + b"\x33" + bytes([3]) * (1 << 20),  # a map of 2^19 bytes
        b"\xfc" + b"\x15\x02" * (1 << 20) + b"\0",  # a struct of 2^20 numbers
    ],
    ids=["structs", "map", "fields"],
)
def test_a_footer_of_too_many_values_is_quarantined(
    field: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(footer, "MOST_VALUES", 100_000)
    file = parquet(tmp_path / "a.parquet", {"text": ["In the beginning"] * 30})
    data = Path(file.uri).read_bytes()
    begin = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    metadata = data[begin:-9] + field + b"\0"  # a field that pyarrow does not know, and leaves out
    data = data[:begin] + metadata + len(metadata).to_bytes(4, "little") + b"PAR1"
    (document,) = read_all_inexact(write(tmp_path, "b.parquet", data))
    assert (
        document.problem is not None
        and "its footer has more than 100,000 values" in document.problem
    )
    assert document.lost_bytes == len(data)


def test_a_list_in_a_footer_that_is_longer_than_it_is_refused_before_it_is_read() -> None:
    with pytest.raises(ValueError, match="more than 4,000,000 values"):
        footer._parse(b"\x29\xfc\xff\xff\xff\xff\xff\xff\xff\xff\x7f")


def test_rows_that_share_a_text_lose_no_more_than_their_file_has(tmp_path: Path) -> None:
    options = dataclasses.replace(OPTIONS, max_document_bytes=100)
    file = parquet(
        tmp_path / "a.parquet", {"text": ["x" * 5000] * 300}, compression="none", row_group_size=100
    )
    documents = read_all(file, options, 1)
    assert len(documents) == 300 and all(
        d.problem is not None and d.lost_bytes > 0 for d in documents
    )
    assert sum(d.lost_bytes for d in documents) <= file.size + 300


def test_the_footer_of_a_file_is_parsed_once_for_its_slices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = parquet(
        tmp_path / "a.parquet", {"text": [os.urandom(8).hex() for _ in range(40)]}, row_group_size=2
    )
    parsed: list[int] = []
    real = footer._ThriftReader.struct

    def struct(reader: footer._ThriftReader) -> object:
        parsed.append(reader._at)
        return real(reader)

    monkeypatch.setattr(footer._ThriftReader, "struct", struct)
    assert len(read_all(file, OPTIONS, 1)) == 40
    assert parsed.count(0) == 1  # structs within it begin later


def read_all_inexact(file: FileInfo) -> list[Document]:
    return [d for s in listing.cut(file, OPTIONS, 1 << 30) for d in reading.read(s, OPTIONS)]


def test_parquet_without_rows(tmp_path: Path) -> None:
    for i, how in enumerate(({}, {"row_group_size": 1})):
        file = parquet(tmp_path / f"{i}.parquet", {"text": pa.array([], pa.string())}, **how)
        (slice,) = listing.cut(file, OPTIONS, 100)
        assert slice.num_documents == 0
        assert read_all(file) == []


# --- columns
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["txet", "id"])
def test_cut_and_check_refuse_a_column_that_is_not_there(tmp_path: Path, column: str) -> None:
    options = IDS if column == "id" else dataclasses.replace(OPTIONS, text_column=column)
    files = [
        parquet(tmp_path / "a.parquet", {"text": ["a"], "b": [1]}),
        write(tmp_path, "a.csv", b"text,b\n1,2\n"),
        write(tmp_path, "a.csv.gz", gzip.compress(b"text,b\n1,2\n")),
        write(tmp_path, "a.jsonl", jsonl({"text": "a"}, {"b": 1})),
    ]
    for file in files:
        expected = f"no column '{column}' in .*{Path(file.uri).name}; it has: text, b"
        with pytest.raises(CorpusError, match=expected):
            listing.check_columns([file], options)
        if "jsonl" not in file.uri:
            with pytest.raises(CorpusError, match=expected):
                listing.cut(file, options, 100)


def test_a_hint_of_a_column_can_be_printed() -> None:
    file = remember(b'{"te\xfft": "a"}\n', "jsonl")
    with pytest.raises(CorpusError, match="did you mean te\ufffdt"):
        listing.check_columns([file], OPTIONS)


def test_check_columns_lets_pass(tmp_path: Path) -> None:
    late = [{"b": 1}] * 19
    files = [
        write(tmp_path, "0.jsonl", b""),
        write(tmp_path, "a.jsonl", b"not json\n" + jsonl(*late[:18], {"text": "x"})),
        write(tmp_path, "a.parquet", b"no parquet"),
        write(tmp_path, "a.csv", b""),
        write(tmp_path, "b.csv.gz", b"no gzip"),
        write(tmp_path, "a.txt", b"text"),
    ]
    listing.check_columns(files, OPTIONS)
    with pytest.raises(CorpusError):
        listing.check_columns(
            [write(tmp_path, "c.jsonl", jsonl(*late, {"b": 2}, {"text": "x"}))], OPTIONS
        )


def test_check_columns_sees_long_lines(tmp_path: Path) -> None:
    file = write(tmp_path, "a.jsonl", jsonl({"body": "x" * (3 << 20)}))
    junk = write(tmp_path, "b.jsonl", b"x" * (3 << 20) + b"\n" + jsonl({"body": "x"}))
    for files in ([file], [junk], [write(tmp_path, "0.jsonl", b""), file]):
        with pytest.raises(CorpusError, match="it has: body"):
            listing.check_columns(files, OPTIONS)


def test_a_line_of_text_in_the_place_of_a_header_is_not_repeated(tmp_path: Path) -> None:
    file = write(tmp_path, "a.csv", b"id,Jane Roe was told on Monday,body\n1,2,3\n")
    with pytest.raises(
        CorpusError, match=r"it has: id, body, and 1 not shown, which is no single word$"
    ):
        listing.check_columns([file], OPTIONS)


# --- change under way
# ------------------------------------------------------------------------------------

NAMES = [
    "a.jsonl",
    "a.txt",
    "a.csv",
    "a.jsonl.gz",
    "a.txt.bz2",
    "a.csv.xz",
    "a.jsonl.zst",
    "a.parquet",
    "no.parquet",
]
Write = Callable[[str, bytes], FileInfo]


@pytest.fixture
def rewrite(quiet_place: str) -> Write:
    """Writes a file, or writes it anew: under another version, whatever the clock's ticks."""
    seconds = iter(range(1, 100))

    def rewrite(name: str, data: bytes) -> FileInfo:
        uri = uris.join(quiet_place, name)
        fs, path = uris.open_filesystem(uri)
        fs.makedirs(quiet_place, exist_ok=True)
        fs.pipe_file(path, data)
        if uris.is_local(uri):
            os.utime(uri, (0, next(seconds)))
        return corpus_files.stat(uri)

    return rewrite


def content(name: str, text: str, num_rows: int = 5) -> bytes:
    """A file of ``num_rows`` texts, as its name says."""
    if name == "no.parquet":
        return text.encode() * num_rows
    if name == "a.parquet":
        sink = io.BytesIO()
        pq.write_table(
            pa.table({"text": [text] * num_rows, "id": range(num_rows)}), sink, row_group_size=5
        )
        return sink.getvalue()
    _, format, *compression = name.split(".")
    data = (
        jsonl({"text": text}) * num_rows
        if format == "jsonl"
        else b"text\n" + f"{text}\n".encode() * num_rows
    )
    return COMPRESS[compression[0]](data) if compression else data


@pytest.mark.parametrize("options", [OPTIONS, WHOLE], ids=["line", "file"])
@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_touched_is_read(rewrite: Write, name: str, options: ReadOptions) -> None:
    data = content(name, "a")
    (slice,) = listing.cut(rewrite(name, data), options, 1000)
    expected = list(reading.read(slice, options))
    assert rewrite(name, data).version != slice.version
    assert list(reading.read(slice, options)) == expected != []


@pytest.mark.parametrize("options", [OPTIONS, WHOLE], ids=["line", "file"])
@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_another_content_gives_no_document(
    rewrite: Write, name: str, options: ReadOptions
) -> None:
    planned = rewrite(name, content(name, "a"))
    (slice,) = listing.cut(planned, options, 1000)
    for data in (content(name, "b"), content(name, "b", 7), b"te", b""):
        found = rewrite(name, data)
        with pytest.raises(
            CorpusChanged, match=r"is not the file that was planned.*run the same command again"
        ) as e:
            next(reading.read(slice, options))
        told = str(e.value)
        assert told.startswith(planned.uri)
        assert f"version {found.version}, planned {planned.version}" in told and "touch" not in told
        assert (f"size {found.size}, planned {planned.size}" in told) is (
            found.size != planned.size
        )
        if found.size == planned.size:
            part = "row groups 0 to 1" if name == "a.parquet" else f"bytes 0 to {planned.size}"
            assert f"sha256 of {part} " in told and f", planned {slice.sha256[:12]}" in told
    assert len(content(name, "b")) == planned.size


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_gone_says_so(rewrite: Write, name: str) -> None:
    file = rewrite(name, content(name, "a"))
    (slice,) = listing.cut(file, OPTIONS, 1000)
    storage.delete([file.uri])
    with pytest.raises(
        CorpusChanged, match="is gone since it was planned; run the same command again"
    ):
        next(reading.read(slice, OPTIONS))


@pytest.mark.parametrize("name", NAMES)
def test_another_content_of_the_same_size_and_time_is_found_by_its_hash(
    tmp_path: Path, name: str
) -> None:
    file = write(tmp_path, name, content(name, "a"))
    (slice,) = listing.cut(file, OPTIONS, 1000)
    write(tmp_path, name, content(name, "b"))
    os.utime(file.uri, ns=(0, int(file.version.removeprefix("time:"))))
    assert corpus_files.stat(file.uri) == file
    documents = reading.read(slice, OPTIONS)
    next(documents)
    with pytest.raises(
        CorpusChanged, match=r"planned: sha256 of .*; touch it and run the same command again"
    ):
        list(documents)


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_lines_behind_or_before_a_slice_do_not_concern_it(rewrite: Write, name: str) -> None:
    data = b"".join(content(name, str(i)) for i in range(10))
    slices = listing.cut(rewrite(name, data), OPTIONS, len(data) // 4)
    expected = [list(reading.read(s, OPTIONS)) for s in slices]
    assert len(slices) > 2
    rewrite(name, data + content(name, "new"))
    assert [list(reading.read(s, OPTIONS)) for s in slices] == expected
    for changed in (data[:-10], data[: slices[-1].start] + b"x" * 99):
        rewrite(name, changed)
        assert [list(reading.read(s, OPTIONS)) for s in slices[:-1]] == expected[:-1]
        with pytest.raises(CorpusChanged):
            next(reading.read(slices[-1], OPTIONS))


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("a.jsonl", "a.parquet")])
def test_what_is_one_slice_is_another_file_when_it_grows(
    rewrite: Write, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    data = content(name, "a")
    (slice,) = listing.cut(rewrite(name, data), WHOLE, 1000)
    rewrite(name, data + data)
    monkeypatch.setattr(readers, "open_read", lambda uri: pytest.fail("its size says enough"))
    with pytest.raises(CorpusChanged, match=f"size {2 * len(data)}, planned {len(data)}"):
        next(reading.read(slice, WHOLE))


def test_row_groups_and_columns_beside_a_slice_do_not_concern_it(tmp_path: Path) -> None:
    def rewrite(texts: list[str], other: str) -> FileInfo:
        columns = {"text": texts, "other": [other] * len(texts)}
        return parquet(tmp_path / "a.parquet", columns, row_group_size=5)

    slices = listing.cut(rewrite(["a"] * 5 + ["b"] * 5, "x"), OPTIONS, 1)
    rewrite(["a"] * 5 + ["c"] * 50, "another, of another size")
    first, second = (reading.read(s, OPTIONS) for s in slices)
    assert texts(list(first)) == ["a"] * 5
    with pytest.raises(CorpusChanged, match="sha256 of row groups 1 to 2 "):
        next(second)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
@pytest.mark.parametrize("how", ["in place", "replaced"])
def test_a_file_that_changes_while_it_is_read_ends_with_an_error(
    tmp_path: Path, name: str, how: str
) -> None:
    num_rows = 200_000 if name == "a.jsonl" else 500
    file = write(tmp_path, name, content(name, "a", num_rows))
    (slice,) = listing.cut(file, OPTIONS, 1 << 30)
    assert slice.num_bytes > 2 * sources.BLOCK_BYTES or name == "a.parquet"
    documents = reading.read(slice, OPTIONS)
    next(documents)
    write(tmp_path, name if how == "in place" else "new", content(name, "b", num_rows))
    if how == "replaced":  # who has the old file open reads it to its end
        (tmp_path / "new").replace(file.uri)
    if how == "replaced" and name == "a.jsonl":
        assert [d.text for d in documents] == ["a"] * (num_rows - 1)
    else:
        with pytest.raises(CorpusChanged, match="planned"):
            list(documents)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", ["stat", "open_read", "read", "seek"])
def test_a_filesystem_that_does_not_answer_is_not_a_fault_of_the_file(
    rewrite: Write, monkeypatch: pytest.MonkeyPatch, name: str, where: str
) -> None:
    file = rewrite(name, content(name, "a"))
    (slice,) = listing.cut(file, OPTIONS, 1000)

    def fail(*_: object) -> Any:
        raise Unavailable("the store does not answer")

    class Failing(io.BytesIO):
        read = fail if where == "read" else io.BytesIO.read
        seek = fail if where == "seek" else io.BytesIO.seek

    answer = {
        "stat": corpus_files.stat,
        "open_read": lambda uri: Failing(content(name, "a")),
        where: fail,
    }
    monkeypatch.setattr(corpus_files, "stat", answer["stat"])
    monkeypatch.setattr(readers, "open_read", answer["open_read"])
    with pytest.raises(Unavailable, match="does not answer"):
        list(reading.read(slice, OPTIONS))
    if where != "stat":
        with pytest.raises(Unavailable, match="does not answer"):
            listing.cut(file, OPTIONS, 1000)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_failing_disk_is_no_bad_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    if name == "a.parquet":
        file = parquet(tmp_path / name, {"text": ["a"]})
    else:
        file = write(
            tmp_path, name, COMPRESS.get(name.rpartition(".")[2], bytes)(jsonl({"text": "a"}))
        )
    (slice,) = listing.cut(file, OPTIONS, 1000)

    class Failing(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            raise OSError("the network is down")

    monkeypatch.setattr(readers, "open_read", lambda uri: Failing(b""))
    with pytest.raises(ShardError, match="the network is down"):
        list(reading.read(slice, OPTIONS))
    with pytest.raises(CorpusError, match="the network is down"):
        listing.cut(file, OPTIONS, 1000)


# --- samples
# ---------------------------------------------------------------------------------------------


def test_sample_is_spread_over_files(tmp_path: Path) -> None:
    data = jsonl({"text": "x"}) * 9 + b"not json\n"
    files = [write(tmp_path, f"{i:02}.jsonl", data) for i in range(20)]
    found = listing.sample(files, OPTIONS, 16)
    assert len(found) == 16 and all(d.problem is None for d in found)
    sources = sorted({Path(d.source).name for d in found})
    assert len(sources) == 8 and sources[0] == "00.jsonl" and sources[-1] == "19.jsonl"
    assert len(listing.sample(files[:1], OPTIONS, 16)) == 9
    assert len(listing.sample(files[:2], OPTIONS, 3)) == 3
    assert listing.sample([], OPTIONS, 5) == []


def test_sample_gives_what_one_file_lacks_to_the_next(tmp_path: Path) -> None:
    files = [write(tmp_path, "a.jsonl", b""), write(tmp_path, "b.jsonl", jsonl({"text": "x"}) * 50)]
    assert len(listing.sample(files, OPTIONS, 10)) == 10


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.txt", "a.csv", "a.jsonl.gz", "a.txt.zst", "a.parquet"]
)
@pytest.mark.parametrize("options", [OPTIONS, WHOLE], ids=["line", "file"])
def test_sample_reads_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, options: ReadOptions
) -> None:
    options = dataclasses.replace(options, max_document_bytes=64 << 20)
    rows = [os.urandom(500).hex() for _ in range(5000)]
    if name == "a.parquet":
        file = parquet(tmp_path / name, {"text": rows, "other": rows[::-1]})
    else:
        plain = (
            jsonl(*({"text": r} for r in rows))
            if "jsonl" in name
            else ("\n".join(["text", *rows])).encode()
        )
        file = write(tmp_path, name, COMPRESS.get(name.rpartition(".")[2], bytes)(plain))
    assert file.size > 2 << 20
    read = 0
    original = sources.Source.read

    def counting(self: sources.Source, size: int = -1, /) -> bytes:
        nonlocal read
        data = original(self, size)
        read += len(data)
        return data

    monkeypatch.setattr(sources.Source, "read", counting)
    monkeypatch.setattr(sources.Source, "read1", counting)
    found = listing.sample([file], options, 100_000)
    assert 0 < read < 3 << 19 if name != "a.parquet" else 0 < read < 3 << 20
    if "txt" in name and options is not OPTIONS and options.txt_documents == "file":
        assert [len(d.text) for d in found] == [1 << 20]
    else:
        whole = set(rows) | {"text"}
        assert len(found) > 500 and all(d.text in whole for d in found)


# --- anything at all
# -------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    st.binary(max_size=200),
    st.sampled_from(["jsonl", "csv", "txt", "parquet", *(f"jsonl.{c}" for c in COMPRESS)]),
)
def test_no_bytes_make_reading_raise(data: bytes, ending: str) -> None:
    data = b"text\n" * (ending == "csv") + data
    for document in read_all(remember(data, ending)):
        document.text.encode()
        assert document.problem is None or 0 < len(document.problem) <= 600
