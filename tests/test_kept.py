"""Kept columns: names, types and bounds of the values, and their way from each format into SQL."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import afn_ray
from afn_ray import kept
from afn_ray.analysis import remeasure, verify
from afn_ray.analysis.local_model import LocalModel
from afn_ray.config import RunConfig
from afn_ray.corpus import listing, reading
from afn_ray.corpus_values import Document, ReadOptions, Shard
from afn_ray.errors import ConfigError, CorpusError
from afn_ray.fingerprints import fingerprint
from afn_ray.reduce import group_drift
from afn_ray.runs.events import Event
from afn_ray.schema import LANGUAGE, NOT_KEPT
from afn_ray.store import manifest, plans
from conftest import config_of, write_jsonl

SPEC = "day:date,lang,score:double,seen:timestamp,valid:bool,year:int64"
ROWS: list[dict[str, Any]] = [
    {"text": "one", "lang": "de", "year": 2024, "score": 0.5, "valid": True,
     "day": "2026-11-01", "seen": "2026-11-01T10:00:00+02:00"},
    {"text": "two"},
    {"text": "three", "lang": "", "year": "7", "score": 3, "valid": "false", "day": None,
     "seen": "2026-11-02"},
    {"text": "four", "lang": 5, "year": "n/a", "score": "high", "valid": 1, "day": "tomorrow",
     "seen": "2026-11-02 10:00:00.000001"},
]  # fmt: skip
EXPECTED = [
    (date(2026, 11, 1), "de", 0.5, datetime(2026, 11, 1, 8), True, 2024),
    (None, None, None, None, None, None),
    (None, "", 3.0, datetime(2026, 11, 2), False, 7),
    (None, "5", None, datetime(2026, 11, 2, 10, 0, 0, 1), None, None),
]


def options(spec: str) -> ReadOptions:
    return ReadOptions("auto", "text", None, "file", 1 << 20, keep=kept.canonical(kept.parse(spec)))


def read(path: Path, spec: str) -> list[Document]:
    given = options(spec)
    (file,) = listing.list_files([str(path)], given)[0]
    return [d for piece in listing.cut(file, given, 1 << 20) for d in reading.read(piece, given)]


# --- names


@pytest.mark.parametrize(
    "spec", ["lang,year:int64", " year:int64 , lang:string", "lang:,year:int64"]
)
def test_a_spec_has_one_canonical_form(spec: str) -> None:
    assert kept.canonical(kept.parse(spec)) == "lang,year:int64"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "is empty"),
        ("lang,", "has ''"),
        ('a";DROP', "expected names of letters"),
        ("2nd", "expected names of letters"),
        ("a" * 64, "at most 63"),
        ("a\u202eb", "expected names of letters"),
        ("source", "writes itself"),
        ("Status", "writes itself"),
        ("mean_strength_8", "writes itself"),
        ("document_x", "writes itself"),
        ("not_kept", "writes itself"),
        ("lang,Lang", "twice"),
        ("year:int32", "expected one of string, int64"),
        (",".join(f"c{i}" for i in range(17)), "at most 16"),
        ("body", "the text column"),
    ],
)
def test_names_and_types_that_cannot_be_are_refused(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(Path("m"), "c", "s", keep_columns=spec, text_column="body")


def test_names_of_other_alphabets_are_columns() -> None:
    assert [name for name, _ in kept.parse("язык,言語,größe")] == ["größe", "язык", "言語"]


# --- values


@pytest.mark.parametrize(
    ("kind", "found", "value"),
    [
        ("string", Decimal("1.50"), "1.50"), ("string", 0.1, "0.1"), ("string", False, "false"),
        ("string", "x" * 1024, "x" * 1024),
        ("int64", 2**63 - 1, 2**63 - 1), ("int64", -(2**63), -(2**63)), ("int64", 5.0, 5),
        ("int64", " 12 ", 12),
        ("double", 2, 2.0), ("double", "1e3", 1000.0), ("bool", "True", True),
        ("date", datetime(2026, 1, 2), date(2026, 1, 2)),
        ("timestamp", date(2026, 1, 2), datetime(2026, 1, 2)),
    ],
)  # fmt: skip
def test_a_value_that_is_of_the_type_without_loss_is_kept(
    kind: str, found: object, value: object
) -> None:
    assert kept.values_of({"c": found}, kept.parse(f"c:{kind}")) == ((value,), ())


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("string", ["a"]), ("string", {"a": 1}), ("string", "x" * 1025), ("string", "ä" * 513),
        ("string", "\udcff"),
        ("int64", 2**63), ("int64", 0.5), ("int64", True), ("int64", "1_0"), ("int64", "٣"),
        ("int64", float("inf")),
        ("double", "nan"), ("double", float("nan")), ("double", 10**400), ("double", "1e999"),
        ("double", True),
        ("bool", 1), ("bool", "yes"), ("date", "2026-11-01T01:00"), ("date", 20261101),
        ("date", True),
        ("timestamp", 5), ("timestamp", "noon"), ("timestamp", "0001-01-01T00:00:00+05:00"),
    ],
)  # fmt: skip
def test_a_value_of_another_type_or_too_large_is_left_out_with_the_reason(
    kind: str, found: object
) -> None:
    (value,), ((name, reason),) = kept.values_of({"c": found}, kept.parse(f"c:{kind}"))
    assert (value, name) == (None, "c")
    assert reason and len(reason) < 300 and reason.isprintable()


# --- formats


def refused(documents: Sequence[Document]) -> list[list[str]]:
    return [[name for name, _ in document.refused] for document in documents]


def test_jsonl_gives_each_value_or_the_reason(tmp_path: Path) -> None:
    found = read(write_jsonl(tmp_path / "a.jsonl", ROWS), SPEC)
    assert [d.kept for d in found] == EXPECTED
    assert refused(found) == [[], [], [], ["day", "score", "valid", "year"]]
    assert dict(found[3].refused)["year"] == 'str "n/a", expected int64'


def test_csv_gives_the_same(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    names = ["text", *sorted(ROWS[0].keys() - {"text"})]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, restval="", extrasaction="raise")
        writer.writeheader()
        writer.writerows({k: "\\N" if v is None else v for k, v in row.items()} for row in ROWS)
    found = read(path, SPEC)
    expected = [list(row) for row in EXPECTED]
    expected[2][1] = None  # an empty field is no value
    assert [list(d.kept) for d in found] == expected
    assert refused(found) == [[], [], [], ["day", "score", "valid", "year"]]


def test_parquet_gives_the_same_from_its_own_types(tmp_path: Path) -> None:
    columns = {
        "text": ["one", "two", "three"],
        "lang": pa.array(["de", None, "x" * 2000]).dictionary_encode(),
        "year": pa.array([2024, None, 2**64 - 1], pa.uint64()),
        "score": pa.array([Decimal("0.50"), None, Decimal("3.00")]),
        "valid": [True, None, False],
        "day": pa.array([20758, None, 2**31 - 1], pa.date32()),
        "seen": pa.array([1793527200000000001, None, 0], pa.timestamp("ns", "Europe/Berlin")),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet", SPEC)
    assert found[0].kept == (date(2026, 11, 1), "de", 0.5, datetime(2026, 11, 1, 10), True, 2024)
    assert found[1].kept == (None,) * 6
    assert found[2].kept == (None, None, 3.0, datetime(1970, 1, 1), False, None)
    assert refused(found) == [[], [], ["day", "lang", "year"]]
    assert all(d.problem is None for d in found)


def test_parquet_strings_are_the_texts_that_ids_have(tmp_path: Path) -> None:
    columns = {
        "text": ["a", "b"],
        "i": [1, None],
        "f": [0.5, None],
        "b": pa.array([b"ok", b"\xff\x00"]),
        "t": pa.array([0, 1], pa.time32("s")),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet", "b,f,i,t,lacking")
    assert [d.kept for d in found] == [
        ("ok", "0.5", "1", None, "00:00:00.000"),
        ("\\xff00", None, None, None, "00:00:01.000"),
    ]


@pytest.mark.parametrize("kind", [pa.list_(pa.string()), pa.struct([("a", pa.int64())])])
def test_a_nested_column_of_parquet_is_refused_before_the_run(tmp_path: Path, kind: Any) -> None:
    table = pa.table({"text": ["a"], "tags": pa.nulls(1, kind)})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match=r"'tags' of .* cannot be kept"):
        read(tmp_path / "a.parquet", "tags")


def test_a_quarantined_document_has_its_values_and_a_line_that_is_no_object_has_none(
    tmp_path: Path,
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": 5, "lang": "de"}, "no JSON"])
    found = read(path, "lang")
    assert [(d.problem is None, d.kept) for d in found] == [(False, ("de",)), (False, ())]


def test_a_column_that_no_file_has_is_refused_and_a_sparse_one_is_not(tmp_path: Path) -> None:
    rows = [{"text": "a"} for _ in range(200)]
    write_jsonl(tmp_path / "a.jsonl", [*rows, {"text": "b", "licence": "cc"}])
    write_jsonl(tmp_path / "b.jsonl", [{"text": "c", "lang": "de"}])
    found = listing.list_files([str(tmp_path)], options(""))[0]
    listing.check_columns(found, options("lang,licence"))
    with pytest.raises(CorpusError, match=r"no column 'langg'.*did you mean lang"):
        listing.check_columns(found, options("langg"))
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "a.txt").write_text("a")
    with pytest.raises(CorpusError, match="txt, which has no columns"):
        listing.check_columns(
            listing.list_files([str(tmp_path / "t")], options(""))[0], options("lang")
        )


# --- identity


def test_shards_without_kept_columns_have_the_ids_and_options_that_they_had(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    plain = options("")
    (file,) = listing.list_files([str(path)], plain)[0]
    slices = listing.cut(file, plain, 1 << 20)
    shard = Shard.of(slices, plain)
    assert shard.id == fingerprint([[*s.identity, ["text", None, 1 << 20]] for s in slices])
    assert plain.as_dict() == {
        "format": "auto",
        "text_column": "text",
        "id_column": None,
        "txt_documents": "file",
        "max_document_bytes": 1 << 20,
        "labels": None,
        "csv_escape": "auto",
    }


@pytest.mark.parametrize("format", ["txt", "jsonl", "csv", "parquet", "conllu"])
def test_other_kept_columns_are_another_shard(format: str) -> None:
    identities = [options(spec).identity(format) for spec in ("", "lang", "lang:int64", "day")]
    assert len({json.dumps(identity) for identity in identities}) == 4


# --- a run

LANGUAGES = ("de", "en", 'fr"; <b>\x1b[31m')


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, verses: list[str]
) -> tuple[RunConfig, list[dict[str, Any]], list[Event], str]:
    folder = tmp_path_factory.mktemp("kept")
    rows = [
        {
            "text": text,
            "lang": LANGUAGES[i % 3],
            "year": 1600 + i if i % 7 else "unknown",
            "score": i / 4,
        }
        for i, text in enumerate(verses[:90])
    ]
    del rows[4]["lang"]
    (folder / "corpus").mkdir()
    write_jsonl(folder / "corpus" / "a.jsonl", rows[:50])
    pq.write_table(
        pa.Table.from_pylist([{"text": r["text"], "lang": r.get("lang")} for r in rows[50:]]),
        folder / "corpus" / "b.parquet",
    )
    config = config_of(
        tiny_bert,
        folder / "corpus",
        folder / "store",
        layers="1",
        shard_bytes=2048,
        keep_columns="year:int64,lang,score:double",
        screen=20,
    )
    events: list[Event] = []
    with afn_ray.run(config, events.append) as run:
        return config, rows, events, run.uri


Made = tuple[RunConfig, list[dict[str, Any]], list[Event], str]


def year_of(i: int, row: dict[str, Any]) -> int | None:
    return row["year"] if i < 50 and isinstance(row["year"], int) else None


def test_documents_kwic_and_screened_have_the_values_of_the_corpus(made: Made) -> None:
    _, rows, _, uri = made
    expected = {i: (row.get("lang"), year_of(i, row)) for i, row in enumerate(rows)}
    with afn_ray.open_run(uri) as run:
        found = run.sql("SELECT doc, lang, year, not_kept FROM documents ORDER BY doc").fetchall()
        assert {doc: (lang, year) for doc, lang, year, _ in found} == expected
        whose = [doc for doc, *_, refused in found if refused]
        assert whose == [i for i in range(50) if i % 7 == 0]
        assert found[0][3] == [{"name": "year", "reason": 'str "unknown", expected int64'}]
        for ask in ("FROM kwic('the')", "FROM screened"):
            asked = run.sql(f"SELECT doc, lang, year {ask}").fetchall()
            assert asked and all((lang, year) == expected[doc] for doc, lang, year in asked)
        types = dict(
            run.sql("SELECT column_name, column_type FROM (DESCRIBE documents)").fetchall()
        )
        assert (types["lang"], types["year"]) == ("VARCHAR", "BIGINT")


@pytest.mark.parametrize(
    "spec",
    [
        "class,document,layer,most,n,word:string,position,start:int64,totals",
        "bins:double,chosen,d,gap,head,k,left_context,number,one,place,r,rank,text_,token_id,value",
    ],
)
def test_a_column_may_have_the_name_of_anything_that_documents_lack(
    spec: str, tmp_path: Path, tiny_bert: Path
) -> None:
    """Names of a macro's parameters, and of columns of other tables, whatever their type."""
    names = [column.name for column in kept.parse(spec)]
    corpus = write_jsonl(
        tmp_path / "c.jsonl", [{"text": "the dog and the hill", **dict.fromkeys(names, 7)}]
    )
    config = config_of(tiny_bert, corpus, tmp_path / "s", layers="2", keep_columns=spec)
    with afn_ray.run(config) as run:
        values = run.sql("SELECT * FROM documents").to_dicts()[0]
        near = run.sql("FROM kwic('the', 2)").to_dicts()
        assert run.sql("SELECT document_text(0)").fetchall() == [("the dog and the hill",)]
    assert {str(values[name]).removesuffix(".0") for name in names} == {"7"}
    assert [one["right_context"] for one in near] == ["dog and", "hill"]
    assert {name for name in near[0] if name.removeprefix(kept.BESIDE) in names} >= {*names} - {
        "position",
        "start",
        "left_context",
    }
    assert str(near[1].get(f"{kept.BESIDE}position", 7)) == "7"


def test_every_value_left_out_is_counted_and_named(made: Made) -> None:
    _, rows, events, uri = made
    with afn_ray.open_run(uri) as run:
        found = {r[0]: r[1:] for r in run.sql("FROM kept").fetchall()}
    n_refused = sum(i % 7 == 0 for i in range(50))
    assert found["lang"] == ("string", len(rows) - 1, 1, 0, None, None)
    assert found["year"] == (
        "int64",
        50 - n_refused,
        40,
        n_refused,
        0,
        'str "unknown", expected int64',
    )
    said = [e.message for e in events if "not kept" in getattr(e, "message", "")]
    assert len(said) == 1 and "year: " in said[0] and f" in {n_refused} of 90 documents" in said[0]
    assert "unknown" not in said[0]


def test_verify_proves_a_run_with_kept_columns(made: Made) -> None:
    found = verify.verify_store(made[0].store)
    assert not found.findings and not found.unproved and found.num_runs == 1


@pytest.mark.parametrize("kind", ["string", "int64"])
def test_an_older_run_with_a_column_of_a_name_reserved_since_is_read_and_proved(
    tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Its values are no detected languages, and its groups none either."""
    values = ["en", "xx", None] if kind == "string" else [7, 8, None]
    rows = [{"text": "the house", LANGUAGE: value} for value in values]
    spec = LANGUAGE if kind == "string" else f"{LANGUAGE}:{kind}"
    with monkeypatch.context() as older:
        older.setattr(kept, "NEWLY_RESERVED", frozenset())
        kept.parse.cache_clear()
        config = config_of(
            tiny_bert,
            write_jsonl(tmp_path / "a.jsonl", rows),
            tmp_path / "store",
            layers="1",
            language="en",
            keep_columns=spec,
            group_by=LANGUAGE,
        )
        uri = afn_ray.run(config).uri
    kept.parse.cache_clear()
    with pytest.raises(ConfigError, match="writes itself"):
        replace(config)
    assert not verify.verify_store(config.store).findings
    with afn_ray.open_run(uri) as run:
        found = run.sql(f"SELECT {LANGUAGE} FROM documents ORDER BY doc").fetchall()
        groups = run.sql('SELECT DISTINCT "group" FROM groups ORDER BY 1').fetchall()
        words = run.sql("SELECT DISTINCT \"group\" FROM group_classes WHERE class = 'function'")
        assert len(words.fetchall()) == len(values)
    assert found == [(value,) for value in values]
    assert groups == [(None if value is None else str(value),) for value in values]
    folder = manifest.find_run(uri)
    assert group_drift.grouping_column(folder) == kept.KeptColumn(LANGUAGE, kind)
    task = remeasure.recorded_task(folder, LocalModel())
    assert task.measure.id == folder.info["measure"]["id"]


def test_the_same_columns_are_the_same_run_and_others_are_measured_anew(made: Made) -> None:
    config, rows, _, uri = made
    with afn_ray.run(replace(config, keep_columns="lang:string , year:int64,score:double")) as same:
        assert same.uri == uri
    with afn_ray.run(replace(config, keep_columns="lang", screen=0)) as other:
        assert other.info["counts"]["shards_reused"] == 0
        assert other.info["measure"]["id"] == same.info["measure"]["id"]
        ask = "SELECT lang, count(*) FROM documents GROUP BY ALL"
        assert dict(other.sql(ask).fetchall()) == Counter(r.get("lang") for r in rows)
    with afn_ray.run(replace(config, keep_columns=None, screen=0)) as plain:
        assert plain.info["counts"]["shards_reused"] == 0
        assert NOT_KEPT not in plain.sql("FROM documents").columns
        assert "kept" not in plain.info["tables"] and not plain.sql("FROM kept").fetchall()
        for shard in plans.read_shards(manifest.find_run(plain.uri))[0]:
            assert "keep" not in shard.options.as_dict()
    assert not verify.verify_store(config.store).findings


def test_other_values_of_parquet_are_another_shard(
    made: Made, tmp_path: Path, tiny_bert: Path
) -> None:
    """A kept column is content: a file whose text stays and whose language
    changes is read again.
    """
    ids = []
    for lang in ("de", "en"):
        pq.write_table(
            pa.table({"text": ["a"], "lang": [lang], "other": [lang]}), tmp_path / "a.parquet"
        )
        (file,) = listing.list_files([str(tmp_path)], options("lang"))[0]
        for spec in ("lang", ""):
            given = options(spec)
            ids.append(Shard.of(listing.cut(file, given, 1024), given).id)
    assert ids[0] != ids[2] and ids[1] == ids[3]


def test_the_report_escapes_names_and_values(made: Made, tmp_path: Path) -> None:
    page = afn_ray.write_report(made[3], tmp_path / "r.html", with_claims=False).read_text()
    assert "Columns of the corpus that documents carry" in page
    assert 'fr"; <b>' not in page and "\x1b" not in page
    assert "lang fr&#34;; &lt;b&gt;\\x1b[31m" in page


def test_the_catalog_of_other_clients_has_the_columns(made: Made, tmp_path: Path) -> None:
    import duckdb

    _, rows, _, uri = made
    afn_ray.write_catalog(uri, tmp_path / "c.duckdb")
    with duckdb.connect(str(tmp_path / "c.duckdb"), read_only=True) as client:
        found = client.execute("SELECT count(*) FROM documents WHERE lang = 'de'").fetchone()
    assert found == (sum(r.get("lang") == "de" for r in rows),)


def test_kept_columns_cost_their_own_bytes_and_no_more(
    tmp_path: Path, tiny_bert: Path, verses: list[str]
) -> None:
    """Every other column of every table takes the same bytes with and without kept columns."""
    rows = [{"text": t, "lang": LANGUAGES[i % 3], "n": i} for i, t in enumerate(verses[:200])]
    corpus = write_jsonl(tmp_path / "a.jsonl", rows)
    sizes = []
    for name, keep in (("kept", "lang,n:int64"), ("plain", None)):
        config = config_of(tiny_bert, corpus, tmp_path / name, layers="1", keep_columns=keep)
        afn_ray.run(config).close()
        sizes.append(column_bytes(tmp_path / name))
    with_kept, plain = sizes
    own = {column: with_kept.pop(column) for column in [*with_kept] if column not in plain}
    assert with_kept == plain
    assert {column.split(".")[0] for _, column in own} == {"lang", "n", NOT_KEPT}
    assert own["documents", "lang"] + own["documents", "n"] < 9 * len(rows)


def column_bytes(store: Path) -> Counter[tuple[str, str]]:
    """Bytes of the column chunks in all shards of ``store``, by table and column."""
    found: Counter[tuple[str, str]] = Counter()
    for file in (store / "shards").rglob("*.parquet"):
        metadata = pq.read_metadata(file)
        for group in map(metadata.row_group, range(metadata.num_row_groups)):
            for chunk in map(group.column, range(group.num_columns)):
                table = file.stem.rpartition("-")[2]
                found[table, chunk.path_in_schema] += chunk.total_compressed_size
    return found
