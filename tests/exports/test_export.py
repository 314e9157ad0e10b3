"""Exports of a run: every reader gets the rows of SQL, once, however often an export is stopped."""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import pandas
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import afn_ray
from afn_ray.cli import commands
from afn_ray.errors import ConfigError, QueryError
from afn_ray.exports import catalogs, formats, writing
from afn_ray.exports.formats import FORMATS
from afn_ray.exports.target import Target
from afn_ray.exports.writing import ExportFile
from afn_ray.query.database import Run
from afn_ray.runs import job
from afn_ray.store import storage
from conftest import config_of, write_jsonl

Rows = list[dict[str, Any]]
FILE_BYTES = 20_000
"""Size of a file, in bytes: a few of them for the runs of these tests."""
AWKWARD = ['He said, "no"', "one\ntwo", "", "naïve 漢字 \U0001f600", "a|b `c` <b> $x$"]
TOKENS = (
    "SELECT t.doc, doc_id, source, d.lang, d.token AS document_token, t.* EXCLUDE (doc) "
    "FROM tokens t JOIN documents d USING (doc)"
)
"""The rows of an export of tokens; the corpus has a column ``token`` too."""


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, verses: list[str]
) -> Iterator[Run]:
    """A run of 140 documents in a few shards, of which one is large, with kept columns."""
    folder = tmp_path_factory.mktemp("export")
    (folder / "corpus").mkdir()
    texts = [*verses[:20], *AWKWARD, *verses[20:135]]
    rows = [
        {"id": f"v{i}", "text": text, "token": f'{i},"', "lang": ("", None, "en")[i % 3]}
        for i, text in enumerate(texts)
    ]
    for name, part in {"a": rows[:30], "b": rows[30:40], "c": rows[40:60]}.items():
        write_jsonl(folder / "corpus" / f"{name}.jsonl", part)
    with gzip.open(folder / "corpus" / "d.jsonl.gz", "wt") as file:  # one shard, however large
        file.writelines(json.dumps(row) + "\n" for row in rows[60:])
    config = config_of(
        tiny_bert,
        folder / "corpus",
        folder / "store",
        layers="1,3",
        id_column="id",
        keep_columns="lang,token",
        shard_bytes=2048,
    )
    with job.run(config) as made:
        yield made


def in_order(rows: Rows, *keys: str) -> Rows:
    return sorted(rows, key=lambda row: [row[key] for key in keys or ("doc", "position")])


def asked(run: Run, sql: str = TOKENS) -> Rows:
    rows: Rows = run.sql(sql).to_arrow_table().to_pylist()
    return rows


def relation(sql: str) -> duckdb.DuckDBPyRelation:
    found = duckdb.sql(sql)
    assert found is not None
    return found


def by_duckdb(files: str) -> Rows:
    rows: Rows = relation(f"FROM '{files}'").to_arrow_table().to_pylist()
    return rows


def by_polars(files: str) -> Rows:
    return polars.scan_parquet(files).collect().to_dicts()


def by_pandas(files: str) -> Rows:
    frame = pandas.read_parquet(str(Path(files).parent), dtype_backend="pyarrow")
    rows: Rows = pa.Table.from_pandas(frame, preserve_index=False).to_pylist()
    return rows


@pytest.mark.parametrize("read", [by_duckdb, by_polars, by_pandas])
def test_readers_of_parquet_get_the_rows_of_sql(
    run: Run, tmp_path_factory: pytest.TempPathFactory, read: Callable[[str], Rows]
) -> None:
    target = tmp_path_factory.getbasetemp() / "tokens"  # the same export for each reader
    done = afn_ray.export(run, str(target), file_bytes=FILE_BYTES)
    rows = asked(run)
    assert len(done.files) > 2 and done.num_rows == len(rows)
    assert in_order(read(f"{target}/data/*.parquet")) == in_order(rows)


def test_datasets_loads_the_rows_of_sql_and_the_card(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    done = afn_ray.export(run, str(tmp_path / "hub"), format="hf-dataset", file_bytes=FILE_BYTES)
    assert len(done.files) > 2
    loaded = datasets.load_dataset(str(tmp_path / "hub"), cache_dir=str(tmp_path / "cache"))
    assert list(loaded) == ["train"]
    assert in_order(loaded["train"].to_list()) == in_order(asked(run))
    card = (tmp_path / "hub" / "README.md").read_text("utf-8")
    assert card.startswith("---\npretty_name: ") and run.id in card
    (read,) = re.findall(r"^datasets: load_dataset\((.*)\)$", card, re.M)
    assert read == f'"{tmp_path}/hub", split="train"'
    assert formats.readers("hf-dataset", "memory://b/hub")[0] == (
        'datasets: load_dataset("parquet", data_files="memory://b/hub/data/*.parquet", '
        'split="train")'
    )


def test_readers_of_iceberg_get_the_rows_of_sql_and_the_comments(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLARS_ICEBERG_PLANNER", "pyiceberg")
    from pyiceberg.catalog import load_catalog

    target = tmp_path / "lake"
    table = afn_ray.IcebergTable("nights.tokens", f"sqlite:///{tmp_path}/catalog.db")
    options: dict[str, Any] = {"format": "iceberg", "iceberg": table, "file_bytes": FILE_BYTES}
    done = afn_ray.export(run, str(target), **options)
    rows = in_order(asked(run))
    found = load_catalog("afn", uri=table.catalog).load_table("nights.tokens")
    assert in_order(found.scan().to_arrow().to_pylist()) == rows
    assert in_order(polars.scan_iceberg(found).collect().to_dicts()) == rows
    files = [task.file.file_path.removeprefix("file://") for task in found.scan().plan_files()]
    read = relation(f"FROM read_parquet({files})").to_arrow_table()
    assert in_order(read.to_pylist()) == rows
    # A file's columns have the ids of the table's: so Spark and Trino find them.
    ids = {field.name: field.field_id for field in found.schema().fields}
    columns = pq.read_schema(files[0])
    assert {c.name: int(c.metadata[b"PARQUET:field_id"]) for c in columns} == ids
    assert "Q3 of the run's labels at layer 3" in str(found.schema().find_field("high_3").doc)
    assert len(found.snapshots()) == 1 and len(files) == len(done.files) > 2
    # The card's lines read it as they are.
    card = (target / "README.md").read_text("utf-8")
    (line,) = re.findall("^pyiceberg: (.*)$", card, re.M)
    assert line == f'load_catalog("afn", uri="{table.catalog}").load_table("nights.tokens")'
    (metadata,) = re.findall(r"""iceberg_scan\('(.*)'\)""", card)
    assert f'pl.scan_iceberg("{metadata}")' in card
    assert polars.scan_iceberg(metadata).collect().height == len(rows)
    assert afn_ray.export(run, str(target), **options) == afn_ray.Exported(
        done.uri, "iceberg", done.files, num_new=0
    )


def test_csv_has_the_fields_of_afn_sql(
    run: Run, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    target = tmp_path / "csv"
    afn_ray.export(run, str(target), format="csv", file_bytes=50_000)
    with pytest.raises(SystemExit):
        commands.main(["sql", run.uri, TOKENS, "--format", "csv"])
    head, *rows = csv.reader(capsysbinary.readouterr().out.decode().splitlines(keepends=True))
    files = sorted((target / "data").iterdir())
    found = []
    for file in files:
        with file.open(newline="", encoding="utf-8") as lines:
            first, *more = csv.reader(lines)
        assert first == head
        found += more
    assert len(files) > 2 and sorted(found) == sorted(rows)
    # Null and empty text stay apart, in readers that can tell them.
    options = "allow_quoted_nulls = false, all_varchar = true"
    counted = relation(
        "SELECT count(*) FILTER (lang = ''), count(*) FILTER (lang IS NULL) "
        f"FROM read_csv('{target}/data/*.csv', {options})"
    ).fetchall()
    assert (
        counted
        == run.sql(
            "SELECT count(*) FILTER (lang = ''), count(*) FILTER (lang IS NULL) "
            "FROM tokens JOIN documents USING (doc)"
        ).fetchall()
        and 0 not in counted[0]
    )


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("table", ["documents", "words", "vocabulary", "screened", "movers"])
def test_every_table_has_its_rows_in_every_format(
    run: Run, tmp_path: Path, table: str, format: str
) -> None:
    done = afn_ray.export(run, str(tmp_path / "t"), table, format=format, file_bytes=60_000)
    assert done.num_rows == run.sql(f"SELECT count(*) FROM {table}").fetchall()[0][0]
    if format != "csv":
        found = [pq.read_table(tmp_path / "t" / "data" / file.name) for file in done.files]
        rows = pa.concat_tables(found).to_pylist() if found else []
        assert sorted(map(str, rows)) == sorted(map(str, asked(run, f"FROM {table}")))


def test_a_query_is_exported_with_its_text_and_numbered_names(run: Run, tmp_path: Path) -> None:
    sql = (
        "SELECT doc, doc, [1.5, NULL] AS 'l`|', DATE '2026-01-02' AS d FROM documents ORDER BY doc"
    )
    done = afn_ray.export(run, str(tmp_path / "q"), sql=sql, file_bytes=1000)
    rows = pq.read_table(tmp_path / "q" / "data").to_pylist()
    assert [[*row.values()] for row in rows] == [[*row] for row in run.sql(sql).fetchall()]
    assert [*rows[0]] == ["doc", "doc_1", "l`|", "d"]
    metadata = pq.read_metadata(tmp_path / "q" / "data" / done.files[0].name).metadata
    assert json.loads(metadata[b"afn.export"])["sql"] == sql
    assert f"```\n{sql}\n```" in (tmp_path / "q" / "README.md").read_text("utf-8")


def test_types_that_a_format_lacks_are_widened_or_refused_at_once(run: Run, tmp_path: Path) -> None:
    largest = {"a": 2**32 - 1, "b": 2**64 - 1, "c": "x"}
    sql = f"SELECT {2**32 - 1}::UINTEGER AS a, {2**64 - 1}::UBIGINT AS b, 'x'::ENUM('x') AS c"
    done = afn_ray.export(run, str(tmp_path / "wide"), sql=sql, format="iceberg")
    (file,) = done.files
    assert pq.read_table(tmp_path / "wide" / "data" / file.name).to_pylist() == [largest]
    nested = (
        "SELECT [1]::UINTEGER[] AS l, {'x': 2::UBIGINT} AS s, ['x'::ENUM('x')] AS e, "
        "MAP {'k': 3::UINTEGER} AS m, [4]::UINTEGER[1] AS f"
    )
    done = afn_ray.export(run, str(tmp_path / "nested"), sql=nested, format="iceberg")
    (file,) = done.files
    (row,) = pq.read_table(tmp_path / "nested" / "data" / file.name).to_pylist()
    assert row == {"l": [1], "s": {"x": 2}, "e": ["x"], "m": [("k", 3)], "f": [4]}
    for format, lacking in (
        ("parquet", "INTERVAL 1 DAY"),
        ("parquet", "TIMETZ '12:00:00+05'"),
        ("csv", "['101'::BIT]"),
        ("iceberg", "TIMESTAMP_NS '2026-01-02'"),
        ("iceberg", "['2026-01-02'::TIMESTAMP_NS]"),
    ):
        target = tmp_path / "lacking"
        match = rf"does not fit into {format}: .*cast it in the query"
        with pytest.raises(QueryError, match=match):
            afn_ray.export(run, str(target), sql=f"SELECT {lacking} AS i", format=format)
        assert not target.exists()
    with pytest.raises(QueryError, match=r"Arrow lacks \(BIT\[\]\); cast it in the query"):
        run.sql("SELECT ['101'::BIT] AS i").to_arrow_reader()


def test_files_say_what_their_columns_hold_and_where_they_come_from(
    run: Run, tmp_path: Path
) -> None:
    done = afn_ray.export(run, str(tmp_path / "t"))
    (file,) = done.files
    schema = pq.read_schema(tmp_path / "t" / "data" / file.name)
    comments = json.loads(schema.metadata[b"afn.columns"])
    assert {*schema.names} - {*comments} == {"lang", "document_token"}  # of the corpus
    assert schema.field("doc").metadata[b"doc"].decode() == comments["doc"]
    assert "run" in comments["doc"] and "layer 3" in comments["quartile_3"]
    assert json.loads(schema.metadata[b"afn.provenance"]) == run.info["provenance"]
    assert json.loads(schema.metadata[b"afn.run"])["model"] == run.info["model"]
    assert json.loads(schema.metadata[b"afn.export"])["run"] == run.id


def test_a_file_has_about_the_size_asked_for_also_where_a_shard_is_larger(
    run: Run, tmp_path: Path
) -> None:
    target = tmp_path / "t"
    done = afn_ray.export(run, str(target), file_bytes=30_000)  # metadata alone take half of it
    parts = json.loads((target / "plan.json").read_text())["parts"]
    assert len(parts) == len(done.files) > 2
    assert {docs is None for _, _, docs in parts} == {True, False}
    assert max(file.bytes for file in done.files) < 60_000
    for file in done.files:  # whole documents
        rows = pq.read_table(target / "data" / file.name, columns=["doc"])["doc"].unique()
        counted = run.sql(
            f"SELECT sum(n_tokens) FROM documents WHERE doc IN {(*rows.to_pylist(), -1)}"
        )
        assert counted.fetchall() == [(file.rows,)]


@pytest.mark.parametrize("format", FORMATS)
def test_a_table_without_rows_has_at_most_one_file(run: Run, tmp_path: Path, format: str) -> None:
    done = afn_ray.export(run, str(tmp_path / "t"), "token_neurons", format=format)
    assert len(done.files) <= 1 and done.num_rows == 0


# --- stopped, twice at once, and in the wrong place


class Killed(BaseException):
    """The end of a process, in this one."""


WRITES = ("write_once", "write_over", "write_whole", "delete")


@pytest.mark.parametrize(
    ("format", "sql"), [("parquet", None), ("iceberg", None), ("csv", "FROM tokens")]
)
def test_an_export_that_is_killed_before_every_write_has_every_row_once(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, sql: str | None
) -> None:
    target = str(tmp_path / "t")
    left = 0

    def counted(name: str) -> Callable[..., Any]:
        call = getattr(storage, name)

        def or_killed(*args: Any, **options: Any) -> Any:
            nonlocal left
            if not left:
                raise Killed
            left -= 1
            return call(*args, **options)

        return or_killed

    for name in WRITES:
        monkeypatch.setattr(storage, name, counted(name))
    new, done = 0, None
    for attempt in range(60):
        # Parts that are written stay; a query begins again, so each attempt may write more.
        left = 2 if sql is None else attempt
        with contextlib.suppress(Killed):
            done = afn_ray.export(
                run, target, sql=sql, format=format, file_bytes=60_000, on_file=lambda *_: None
            )
            break
        new += 1
    assert done is not None and new > 3
    assert done.num_rows == run.sql("SELECT count(*) FROM tokens").fetchall()[0][0]
    data = {path.name for path in Path(target, "data").iterdir()}
    assert data == {file.name for file in done.files}
    assert not Path(target, "written").exists()
    if format == "iceberg":
        from pyiceberg.catalog import load_catalog

        table = load_catalog("afn", uri=f"sqlite:///{target}/catalog.db").load_table("afn.tokens")
        assert len(table.snapshots()) == 1 and table.scan().count() == done.num_rows
        assert catalogs.NO_RETRIES not in table.properties
    if format != "csv":
        assert in_order(pq.read_table(f"{target}/data").to_pylist()) == in_order(asked(run))
        assert done.num_new < len(done.files)  # the last attempt did not write all of them


@pytest.mark.parametrize("format", ["parquet", "iceberg"])
@pytest.mark.parametrize("sql", [None, "FROM tokens"])
def test_of_two_exports_at_once_one_counts(
    run: Run, tmp_path: Path, format: str, sql: str | None
) -> None:
    target = str(tmp_path / "t")
    options: dict[str, Any] = {"sql": sql, "format": format, "file_bytes": 60_000}
    others: list[afn_ray.Exported | None] = []

    def meanwhile(*_: Any) -> None:
        if not others:
            others.append(None)
            others[0] = afn_ray.export(run, target, **options)

    first = afn_ray.export(run, target, on_file=meanwhile, **options)
    (second,) = others
    assert second is not None and first.files == second.files
    data = {path.name for path in Path(target, "data").iterdir()}
    assert data == {file.name for file in first.files}
    assert len(pq.read_table(f"{target}/data")) == first.num_rows == second.num_rows


@pytest.mark.parametrize("format", ["parquet", "iceberg"])
@pytest.mark.parametrize("sql", [None, "FROM tokens"])
def test_the_second_of_two_exports_ends_well_and_changes_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, sql: str | None
) -> None:
    """The first one begins later, and is done while the second one writes a file."""
    target = str(tmp_path / "t")
    options: dict[str, Any] = {"sql": sql, "format": format, "file_bytes": FILE_BYTES}
    write_whole = storage.write_whole
    first: list[afn_ray.Exported] = []
    written: list[tuple[str, int]] = []
    num_begun = 0

    @contextlib.contextmanager
    def overtaken(uri: str) -> Iterator[Any]:
        nonlocal num_begun
        num_begun += 1
        is_overtaken = num_begun == (2 if sql is None else 1)  # a query has one file here
        with write_whole(uri) as sink:
            yield sink
            if is_overtaken:
                first.append(afn_ray.export(run, target, **options))
                written.extend(inodes())

    def inodes() -> list[tuple[str, int]]:
        return sorted((path.name, path.stat().st_ino) for path in Path(target, "data").iterdir())

    monkeypatch.setattr(storage, "write_whole", overtaken)
    second = afn_ray.export(run, target, **options)
    assert [done.files for done in first] == [second.files]
    assert inodes() == written and {name for name, _ in written} == {f.name for f in second.files}
    assert not Path(target, "written").exists()
    num_tokens = run.sql("SELECT count(*) FROM tokens").fetchall()[0][0]
    assert len(pq.read_table(f"{target}/data")) == num_tokens == second.num_rows
    if sql is None:  # the part that was whole before is of both
        assert first[0].num_new == len(second.files) - 1 > 1 and second.num_new == 1
    if format == "iceberg":
        from pyiceberg.catalog import load_catalog

        name = "afn.tokens" if sql is None else "afn.query"
        table = load_catalog("afn", uri=f"sqlite:///{target}/catalog.db").load_table(name)
        assert len(table.snapshots()) == 1 and table.scan().count() == num_tokens


@pytest.mark.parametrize("format", ["parquet", "iceberg"])
def test_a_process_that_is_overtaken_writes_no_part_that_is_there(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    """The first one writes a part, and then all; the second one has planned before."""
    target = str(tmp_path / "t")
    options: dict[str, Any] = {"format": format, "file_bytes": FILE_BYTES}
    note, written = Target.note, list[tuple[int, str]]()
    first: list[afn_ray.Exported] = []

    def overtaken(self: Target, part: int, file: ExportFile) -> ExportFile:
        written.append((part, file.name))
        noted = note(self, part, file)
        if len(written) == 1:
            first.append(afn_ray.export(run, target, **options))
        return noted

    monkeypatch.setattr(Target, "note", overtaken)
    second = afn_ray.export(run, target, **options)
    assert first[0].files == second.files and second.num_new == 1
    assert sorted(part for part, _ in written) == list(range(len(second.files)))


def test_a_plan_that_wrote_nothing_gives_way_to_another(run: Run, tmp_path: Path) -> None:
    target = tmp_path / "t"

    def killed_at_once(*_: Any) -> Any:
        raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(writing, "write_file", killed_at_once)
        afn_ray.export(run, str(target), "documents")
    assert (target / "plan.json").exists()
    done = afn_ray.export(run, str(target), "tokens", file_bytes=FILE_BYTES)
    assert done.num_new == len(done.files) > 1
    (target / "export.json").unlink()  # files are there: nothing gives way
    with pytest.raises(ConfigError, match="holds another export"):
        afn_ray.export(run, str(target), "documents")


def test_a_target_with_anything_else_is_refused(run: Run, tmp_path: Path) -> None:
    target = str(tmp_path / "t")
    afn_ray.export(run, target, "thresholds")
    for table, format, difference in (
        ("classes", "parquet", "its table is thresholds, here it is classes"),
        ("thresholds", "csv", "its format is parquet, here it is csv"),
    ):
        with pytest.raises(ConfigError, match=difference):
            afn_ray.export(run, target, table, format=format)
    assert afn_ray.export(run, target, "thresholds").num_new == 0
    with pytest.raises(ConfigError, match=r"holds 'README\.md' and no export; give an empty"):
        Path(target, "plan.json").unlink()
        Path(target, "export.json").unlink()
        afn_ray.export(run, target, "thresholds")
    with pytest.raises(ConfigError, match=r"no table of a run \(did you mean tokens"):
        afn_ray.export(run, target, "token")


def test_what_contradicts_itself_is_refused(run: Run, tmp_path: Path) -> None:
    target = str(tmp_path / "t")
    with pytest.raises(ConfigError, match="both a table, 'tokens', and a query"):
        afn_ray.export(run, target, "tokens", sql="FROM words")
    with pytest.raises(ConfigError, match="an Iceberg table is named, and the format is 'parquet'"):
        afn_ray.export(run, target, iceberg=afn_ray.IcebergTable("a.b"))
    with pytest.raises(ConfigError, match="the target is empty; name a folder"):
        afn_ray.export(run, "", "thresholds")
    assert not Path(target).exists()


def test_an_export_to_a_bucket_has_every_row(run: Run, object_store: str, tmp_path: Path) -> None:
    catalog = f"sqlite:///{tmp_path}/c.db"
    for format in ("parquet", "iceberg"):
        table = afn_ray.IcebergTable("a.b", catalog) if format == "iceberg" else None
        target = f"{object_store}/{format}"
        options: dict[str, Any] = {"format": format, "iceberg": table, "file_bytes": FILE_BYTES}
        done = afn_ray.export(run, target, **options)
        found = [
            pq.read_table(pa.BufferReader(storage.read_bytes(f"{target}/data/{file.name}")))
            for file in done.files
        ]
        assert len(found) > 2
        assert in_order(pa.concat_tables(found).to_pylist()) == in_order(asked(run))
        assert storage.list_names(f"{target}/written") == []
        assert afn_ray.export(run, target, **options).num_new == 0


def test_the_command_writes_says_so_and_leaves_with_a_code(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def typed(*words: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as end:
            commands.main(["export", run.uri, str(tmp_path / "t"), *words])
        said = capsys.readouterr()
        return int(str(end.value.code)), said.out + said.err

    code, said = typed("--table", "thresholds")
    assert code == 0 and "/t has 4 rows in 1 file, " in said and "there" not in said
    code, said = typed("--table", "thresholds", "--json")
    assert code == 0 and json.loads(said)["num_new"] == 0
    assert "1 file of them was there" in typed("--table", "thresholds")[1]
    assert typed() == (
        2,
        f"afn: {tmp_path}/t holds another export: its table is thresholds, here it "
        "is tokens; give another folder, or remove that one\n",
    )
    assert typed("--catalog", "x")[0] == typed("--sql", "FROM nothing")[0] == 2
    assert "'0MiB' is not a size" in typed("--file-size", "0MiB")[1]
