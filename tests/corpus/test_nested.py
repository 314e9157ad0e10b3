"""Dotted paths lead to nested values, the same in JSON and Parquet;
lists of strings become a text.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import afn_ray
from afn_ray import kept
from afn_ray.corpus import listing, reading, row_groups
from afn_ray.corpus_values import Document, ReadOptions, Shard
from afn_ray.errors import ConfigError, CorpusError
from conftest import config_of, write_jsonl
from test_corpus import jsonl, one

CHAT = ReadOptions(
    "auto",
    "messages.1.content",
    "meta.id",
    "line",
    1 << 20,
    keep="day:date,meta.lang,messages.0.role",
)
ROWS: list[dict[str, Any]] = [
    {
        "messages": [{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}],
        "meta": {"lang": "de", "id": 1},
    },
    {"messages": [{"role": "user", "content": "alone"}], "meta": {"lang": None, "id": 2}},
    {"messages": [], "meta": None},
    {"messages": None, "meta": {"lang": "fr", "id": 4}},
    {
        "messages": [{"role": "user", "content": "c"}, {"role": None, "content": "é"}],
        "meta": {"lang": "it", "id": None},
    },
]


def read(path: Path, options: ReadOptions, shard_bytes: int = 1 << 20) -> list[Document]:
    files, _ = listing.list_files([str(path)], options)
    listing.check_columns(files, options)
    slices = listing.cut(files[0], options, shard_bytes)
    return [document for one in slices for document in reading.read(one, options)]


def write(path: Path, rows: list[dict[str, Any]], **how: Any) -> Path:
    if path.suffix == ".jsonl":
        write_jsonl(path, rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path, **how)
    return path


# --- paths


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize("shard_bytes", [1, 1 << 20])
def test_paths_lead_to_texts_ids_and_kept_columns(
    ending: str, shard_bytes: int, tmp_path: Path
) -> None:
    path = write(tmp_path / f"c.{ending}", ROWS, row_group_size=2)
    options = replace(CHAT, keep="messages.0.role,meta.lang")
    first, short, empty, null, last = read(path, options, shard_bytes)
    assert (first.text, first.doc_id, first.kept) == ("b", "1", ("user", "de"))
    assert (last.text, last.doc_id, last.kept) == ("é", None, ("user", "it"))
    assert all(document.problem for document in (short, empty, null))
    assert (short.doc_id, short.kept) == ("2", ("user", None))
    assert (empty.doc_id, empty.kept) == (None, (None, None))
    assert (null.doc_id, null.kept) == ("4", (None, "fr"))


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "csv"])
def test_a_column_whose_name_has_dots_is_taken_before_what_the_path_leads_to(
    ending: str, tmp_path: Path
) -> None:
    row = {"meta.text": "of its name", "meta": {"text": "nested"}, "a.b": "kept"}
    path = tmp_path / f"c.{ending}"
    if ending == "csv":
        path.write_text("a.b,meta.text\nkept,of its name\n")
    else:
        write(path, [row])
    options = ReadOptions("auto", "meta.text", None, "line", 1 << 20, keep="a.b")
    (document,) = read(path, options)
    assert (document.text, document.kept) == ("of its name", ("kept",))


def test_only_the_leaf_columns_of_a_path_are_read_and_hashed(tmp_path: Path) -> None:
    options = ReadOptions("auto", "meta.text", None, "line", 1 << 20)
    identities = set()
    for beside in ("x", "y" * 5000):
        rows = [
            {"meta": {"beside": beside, "text": "a", "more": [{"deep": [beside]}]}, "z": beside}
        ]
        path = write(tmp_path / "c.parquet", rows)
        (file,) = listing.list_files([str(path)], options)[0]
        (piece,) = listing.cut(file, options, 1)
        assert [d.text for d in reading.read(piece, options)] == ["a"]
        identities.add((piece.sha256, piece.num_bytes < 200))
    assert len(identities) == 1 and identities.pop()[1]


def test_uuids_dates_and_fixed_lists_are_found_at_paths_of_parquet(tmp_path: Path) -> None:
    key = uuid.uuid4()
    ids = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([key.bytes], pa.binary(16)))
    days = pa.array([date(2026, 1, 2)])
    pairs = pa.array([["x", "y"]], pa.list_(pa.string(), 2))
    meta = pa.StructArray.from_arrays([ids, days, pairs], ["id", "day", "two"])
    pq.write_table(pa.table({"meta": meta}), tmp_path / "c.parquet")
    options = ReadOptions("auto", "meta.two.1", "meta.id", "line", 1 << 20, keep="meta.day:date")
    (document,) = read(tmp_path / "c.parquet", options)
    assert (document.text, document.doc_id, document.kept) == ("y", str(key), (date(2026, 1, 2),))


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("column", "message"),
    [
        (
            "meta.lng",
            r"no column 'meta.lng'.*it has: messages, meta, meta.lang, meta.id; "
            "did you mean meta.lang",
        ),
        ("messages.0.text", r"it has: messages, meta, messages.0.role, messages.0.content"),
        ("messages.content", r"it has: messages, meta, messages.0;"),
        ("messages.-1.content", r"it has: messages, meta, messages.0;"),
        ("mta.lang", r"it has: messages, meta$"),
    ],
)
def test_a_wrong_path_is_refused_with_what_is_beside_it(
    ending: str, column: str, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / f"c.{ending}", ROWS)
    with pytest.raises(CorpusError, match=message):
        read(path, replace(CHAT, text_column=column, id_column=None, keep=""))
    with pytest.raises(CorpusError, match=f"no column '{column}'"):
        read(path, replace(CHAT, text_column="messages.0.content", id_column=None, keep=column))


def test_a_kept_path_that_leads_to_no_value_is_refused_before_the_run(tmp_path: Path) -> None:
    path = write(tmp_path / "c.parquet", ROWS)
    with pytest.raises(CorpusError, match=r"column 'meta' of .* is struct.*cannot be kept"):
        read(path, replace(CHAT, keep="meta"))
    with pytest.raises(CorpusError, match=r"id column 'messages.0' of .* is struct"):
        read(path, replace(CHAT, id_column="messages.0", keep=""))


def test_paths_of_earlier_versions_shards_are_not_reused() -> None:
    for format, count in (("jsonl", 2), ("parquet", 2), ("csv", 1)):
        dotted = ReadOptions("auto", "a.b", None, "line", 1)
        plain = ["a.b", None, 1]
        assert len({json.dumps(i) for i in (dotted.identity(format), plain)}) == count
    assert ReadOptions("auto", "a", None, "line", 1).identity("jsonl") == ["a", None, 1]


# --- lists


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize("how", [{}, {"use_dictionary": False}])
def test_a_list_of_strings_is_a_text_of_lines(
    ending: str, how: dict[str, Any], tmp_path: Path
) -> None:
    lists = [["a", "b b", "é"], [], None, ["x", None], ["same"] * 3]
    rows = [{"text": cells, "meta": {"parts": cells}} for cells in lists]
    if ending == "jsonl":
        how = {}
    path = write(tmp_path / f"c.{ending}", rows, **how)
    for column in ("text", "meta.parts"):
        found = read(path, ReadOptions("auto", column, None, "line", 1 << 20))
        assert [d.text for d in found if d.problem is None] == ["a\nb b\né", "", "same\nsame\nsame"]
        assert [d.problem for d in found if d.problem] == [
            f"{column} is null",
            f"{column} is a list whose item 1 is null, expected a string",
        ]


def test_a_joined_text_is_bounded_and_its_items_are_strings(tmp_path: Path) -> None:
    options = ReadOptions("auto", "text", None, "line", 10)
    for row, why in (
        ({"text": ["12345", "12345"]}, "of at least 11 bytes is over max_document_bytes = 10"),
        ({"text": ["a", ["b"]]}, "item 1 is list, expected a string"),
        ({"text": [{"a": "b"}]}, "item 0 is dict, expected a string"),
    ):
        assert why in str(one(jsonl(row), "jsonl", options).problem)
    assert one(jsonl({"text": ["1234", "12345"]}), "jsonl", options).text == "1234\n12345"
    # The values of a page are shared: 20,000 items of 4 KB take 4 KB, and are not joined.
    path = write(tmp_path / "c.parquet", [{"text": ["x" * 4096] * 20_000}])
    assert path.stat().st_size < 1 << 16
    (document,) = read(path, replace(options, max_document_bytes=1 << 20))
    assert "of at least 1048831 bytes is over max_document_bytes" in str(document.problem)


def test_a_list_of_far_more_items_than_bytes_is_a_bomb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_groups, "EXPANSION_FROM_BYTES", 1 << 16)
    path = write(tmp_path / "c.parquet", [{"text": ["x"] * 100_000}])
    (document,) = read(path, ReadOptions("auto", "text", None, "line", 1 << 20))
    assert "give 400000, over 200 times as many" in str(document.problem)


# --- a run


def test_a_run_keeps_nested_columns_by_names_without_dots(tiny_bert: Path, tmp_path: Path) -> None:
    rows = [
        {
            "messages": [{"content": f"in the beginning {i}"}],
            "meta": {"lang": "de" if i % 2 else "en"},
        }
        for i in range(8)
    ]
    write_jsonl(tmp_path / "c.jsonl", rows)
    config = config_of(
        tiny_bert,
        tmp_path / "c.jsonl",
        tmp_path / "s",
        text_column="messages.0.content",
        keep_columns="meta.lang",
        group_by="meta_lang",
    )
    with afn_ray.run(config) as run:
        found = run.sql(
            "SELECT meta_lang, count(*) FROM documents GROUP BY ALL ORDER BY 1"
        ).fetchall()
        assert found == [("de", 4), ("en", 4)]
    assert not afn_ray.verify_store(str(tmp_path / "s")).findings


def test_names_of_kept_paths_are_checked_by_what_they_become() -> None:
    columns = kept.parse("meta.lang,meta.year:int64")
    assert [column.name for column in columns] == ["meta_lang", "meta_year"]
    assert kept.canonical(columns) == "meta.lang,meta.year:int64"
    for spec, message in (
        ("meta.lang,meta_lang", "twice"),
        ("n.tokens", "writes itself"),
        ("a..b", "expected names"),
        (".a", "expected names"),
        ("a.", "expected names"),
        ("a." + "b" * 62, "at most 63"),
    ):
        with pytest.raises(ConfigError, match=message):
            config_of(Path("m"), "c", "s", keep_columns=spec)


def test_a_shard_of_paths_is_another_than_one_of_the_columns() -> None:
    assert Shard.of([], CHAT).options == CHAT


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"text_column": "messages"},
            r"'messages' is a list of objects, expected .*messages.0.role, messages.0.content$",
        ),
        ({"text_column": "meta"}, "'meta' is an object, expected .*text is in: meta.lang"),
        ({"id_column": "messages"}, "id column 'messages' .*cannot be an id"),
    ],
)
def test_a_column_without_texts_or_ids_is_refused_before_the_run(
    ending: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / f"c.{ending}", ROWS)
    options = replace(CHAT, keep="", id_column=None)
    files = listing.list_files([str(path)], options)[0]
    listing.check_columns(files, options)
    with pytest.raises(CorpusError, match=message):
        listing.check_columns(files, replace(options, **changes))
        read(path, replace(options, **changes))  # Parquet's ids are checked as it is cut


def test_all_files_that_lack_a_column_are_named(tmp_path: Path) -> None:
    for name, text in (("a", "meta"), ("b", "text"), ("c", "meta")):
        write(tmp_path / f"{name}.jsonl", [{text: "x"}])
    options = ReadOptions("auto", "text", None, "line", 1 << 20)
    files = listing.list_files([str(tmp_path)], options)[0]
    with pytest.raises(CorpusError, match=r"a\.jsonl; .* 1 of 2 other files .*: \S*/c\.jsonl$"):
        listing.check_columns(files, options)
