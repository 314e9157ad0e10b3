"""A run as SQL: the views against a reference in Python, the sandbox against every way out we
know.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from afn_ray.errors import QueryError, StoreError
from afn_ray.query import expressions, files, processes, result, sandbox, session, views
from afn_ray.query.contents import read_contents
from afn_ray.query.database import Run, open_run
from afn_ray.query.files import ReadOnlyFiles
from afn_ray.query.filling import Filling
from afn_ray.query.views import VIEWS
from afn_ray.reduce import lexicon
from afn_ray.run_info import RunInfo
from afn_ray.schema import (
    FILES_SCHEMA,
    MOVERS_SCHEMA,
    REPLACED,
    SCHEMA_VERSION,
    SCREENED_SCHEMA,
    SHARDS_SCHEMA,
    SPECIAL,
    THRESHOLDS_SCHEMA,
    TOKEN_CHARS,
    VOCABULARY_SCHEMA,
    WORD_START,
    documents_schema,
    strength_column,
    strengths,
    tokens_schema,
)
from afn_ray.store import blocks, checksums, corpus_files, manifest, storage, uris
from afn_ray.store.manifest import RunFolder
from conftest import RUN_INFO, edit_checksummed, edit_table

LAYERS = (0, 8)
RUN = "20260102T030405.000Z-0123456789ab"
PIECES = ["[CLS]", "ri", "##ver", "bank", "##s", "."]
TEXTS = ["", "ri", "ver", "bank", "s", "."]
SINK_FACTOR = 3.0


def write_parquet(uri: str, table: pa.Table, **options: Any) -> int:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    storage.write_once(uri, sink.getvalue())
    return len(sink.getvalue())


VIEWED = {"doc_in_shard": "doc", "start_ahead": "start", "length": "end"}
"""Columns of the views by those of the files that they are made of; version 5 stored the former."""


def viewed(schema: pa.Schema) -> pa.Schema:
    """``schema``, of a shard's table, with the names of the views."""
    return pa.schema([field.with_name(VIEWED.get(field.name, field.name)) for field in schema])


def stored(table: pa.Table) -> pa.Table:
    """``table``, of a schema that ``viewed`` gives, as today's version stores it."""
    if "end" in table.column_names:
        length = pc.subtract(table["end"], table["start"])
        chars = pc.multiply(table["position"], pa.scalar(TOKEN_CHARS, pa.int32()))
        for name, values in (
            ("length", length),
            ("start_ahead", pc.subtract(table["start"], chars)),
        ):
            at = table.column_names.index(VIEWED[name])
            table = table.set_column(at, table.schema.field(at).with_name(name), values)
    return table.rename_columns({"doc": "doc_in_shard"})


def write_run(
    store: str,
    shards: list[tuple[pa.Table, pa.Table]],
    layers: tuple[int, ...],
    name: str = RUN,
    versions: Sequence[int] = (),
    **options: Any,
) -> str:
    """A run over ``shards`` (tokens, documents) as ``afn run`` leaves it; thresholds by numpy.

    ``versions`` are those of the shards' files; by default they are today's.
    """
    rows, offset = [], 0
    versions = versions or [SCHEMA_VERSION] * len(shards)
    for i, (tokens, documents) in enumerate(shards):
        is_todays = versions[i] == SCHEMA_VERSION
        commit: dict[str, Any] = {"schema_version": versions[i], "files": {}, "crc32": {}}
        row: dict[str, Any] = dict.fromkeys(SHARDS_SCHEMA.names, 0) | {"neurons_file": None}
        row |= {
            "ordinal": i,
            "shard": f"s{i}",
            "doc_offset": offset,
            "n_documents": len(documents),
            "n_tokens": len(tokens),
            "summary_file": f"shards/m/s{i}/a-summary.parquet",
            "schema_version": SCHEMA_VERSION if is_todays else None,
        }
        for kind, table in (("tokens", tokens), ("documents", documents)):
            table = stored(table) if is_todays else table
            row[f"{kind}_file"] = f"shards/m/s{i}/a-{kind}.parquet"
            uri = uris.join(store, row[f"{kind}_file"])
            size = (
                write_parquet(uri, table, **options)
                if not storage.exists(uri)
                else corpus_files.stat(uri).size
            )
            row[f"{kind[:-1]}_bytes"] = size
            commit["files"][kind] = {"name": f"a-{kind}.parquet", "bytes": size}
            commit["crc32"][kind] = blocks.checksums(storage.read_bytes(uri))
        storage.write_over(
            uris.join(store, f"shards/m/s{i}/commit.json"), checksums.checksummed(commit)
        )
        rows.append(row)
        offset += len(documents)
    tokens = pa.concat_tables([t for t, _ in shards]).unify_dictionaries()
    normal = tokens.filter(pc.equal(pc.bit_wise_and(tokens["flags"], SPECIAL), 0))
    thresholds = []
    for layer in layers:
        values = normal[strength_column(layer)].to_numpy()
        q1, q2, q3 = (
            (np.quantile(values, q, method="inverted_cdf") for q in (0.25, 0.5, 0.75))
            if len(values)
            else [None] * 3
        )
        for population in ("tokens", "tokens_without_sinks"):
            thresholds.append(
                {
                    "layer": layer,
                    "population": population,
                    "n": len(values),
                    "q1": q1,
                    "q2": q2,
                    "q3": q3,
                    "n_high": 0,
                    "n_sinks": 0,
                    "n_special": 0,
                    "sink_factor": SINK_FACTOR,
                    "definition": "",
                }
            )
    vocabulary = [
        dict.fromkeys(VOCABULARY_SCHEMA.names, 0)
        | {"layer": layer, "token_id": i, "token": piece, "text": text, "class": "content"}
        | {"is_ambiguous": False}
        for layer in layers
        for i, (piece, text) in enumerate(zip(PIECES, TEXTS, strict=True))
    ]
    folder = uris.join(store, "runs", name)
    run = RunFolder(folder, store, name, {})
    tables = {}
    for table, schema, values in (
        ("shards", SHARDS_SCHEMA, rows),
        ("thresholds", THRESHOLDS_SCHEMA, thresholds),
        ("vocabulary", VOCABULARY_SCHEMA, vocabulary),
        ("files", FILES_SCHEMA, []),
    ):
        tables[table] = manifest.write_table(run, table, pa.Table.from_pylist(values, schema))
    info: RunInfo = {
        "layers": list(layers),
        "model": {"name": "tiny"},
        "seconds": 1.5,
        "config": {"corpus": ["a.txt", "b's.txt"], "store": store},
        "measure": {"id": "m"},
        "corpus": {},
        "precision": RUN_INFO["precision"],
        "counts": {"shards": len(shards), "documents": offset, "tokens": len(tokens)},
        "created_at": "2026-01-02T03:04:05+00:00",
        "finished_at": "2026-01-02T04:04:05+01:00",
        "tables": tables,
    }
    storage.write_once(uris.join(folder, "plan.parquet"), b"")
    manifest.finish_run(run, info)
    return folder


def make_shard(
    seed: int, num_documents: int, offsets: bool = True, with_ids: bool = True
) -> tuple[pa.Table, pa.Table]:
    """A shard of random documents: [CLS] first, some without a word-start flag, words written
    otherwise, specials.
    """
    rng = np.random.default_rng(seed)
    tokens, documents = [], []
    for doc in range(num_documents):
        n = int(rng.integers(0, 9))
        for position in range(n):
            flags = (
                SPECIAL
                if position == 0 or rng.random() < 0.1
                else WORD_START * int(rng.random() < 0.5)
            )
            flags |= REPLACED * int(rng.random() < 0.1)
            tokens.append(
                {
                    "doc": doc,
                    "position": position,
                    "token_id": 0 if flags & SPECIAL else int(rng.integers(1, 6)),
                    "flags": flags,
                    "surface": "RIVER" if flags & WORD_START and rng.random() < 0.3 else None,
                    "start": 5 * position,
                    "end": 5 * position + 4,
                }
                | {
                    strength_column(k): float(np.float32(round(rng.lognormal(k, 1), 2)))
                    for k in LAYERS
                }
            )
        digest = hashlib.sha256(b"%d %d" % (seed, doc)).digest()
        documents.append(
            {
                "doc": doc,
                "doc_id": f"id-{seed}-{doc}" if with_ids else None,
                "source": "a.txt",
                "offset": 10 * doc,
                "n_tokens": n,
                "n_windows": 1,
                "n_chars": 5 * n,
                "n_replaced": 0,
                "lost_bytes": 0,
                "lost_documents": 0,
                "text_sha256": digest,
                "status": "ok" if n else "empty",
                **{f"mean_{strength_column(k)}": 1.0 if n else None for k in LAYERS},
            }
        )
    return (
        pa.Table.from_pylist(tokens, viewed(tokens_schema(strengths(LAYERS), offsets))),
        pa.Table.from_pylist(documents, viewed(documents_schema(strengths(LAYERS)))),
    )


SHARDS = [make_shard(1, 20), make_shard(2, 0), make_shard(3, 7), make_shard(4, 12, with_ids=False)]
"""The second one has no documents at all: its doc_offset is also the third one's."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a run r1 over SHARDS, and a later run r2 over a shard of its own."""
    folder = tmp_path_factory.mktemp("store with 'quotes'")
    write_run(str(folder), SHARDS, LAYERS)
    other = folder / "other"
    write_run(str(other), [make_shard(9, 5)], LAYERS)
    return folder


@pytest.fixture(scope="module")
def run(store: Path) -> Iterator[Run]:
    with open_run(f"{store}/runs/{RUN}", threads=2, memory_limit="500MB", timeout_s=20) as run:
        yield run


def reference_tokens() -> list[dict[str, Any]]:
    """Every token with its run-wide document, from the shards' tables, in plain Python."""
    rows, offset = [], 0
    for tokens, documents in SHARDS:
        rows += [r | {"doc": r["doc"] + offset} for r in tokens.to_pylist()]
        offset += len(documents)
    return rows


def thresholds_of(run: Run) -> dict[int, dict[str, Any]]:
    return {r["layer"]: r for r in run.thresholds().to_dicts() if r["population"] == "tokens"}


# --- the views
# -------------------------------------------------------------------------------------------


def test_tokens_have_their_document_text_flags_and_quartiles(run: Run) -> None:
    expected = []
    limits = thresholds_of(run)
    for r in reference_tokens():
        special = bool(r["flags"] & SPECIAL)
        row = {
            "doc": r["doc"],
            "position": r["position"],
            "token_id": r["token_id"],
            "token": PIECES[r["token_id"]],
            "text": TEXTS[r["token_id"]],
            "surface": r["surface"],
            "is_special": special,
            "is_word_start": bool(r["flags"] & WORD_START),
            "is_replaced": bool(r["flags"] & REPLACED),
            "start": r["start"],
            "end": r["end"],
        }
        for k in LAYERS:
            value, row_k = r[f"strength_{k}"], limits[k]
            quartile = 1 + sum(value >= row_k[q] for q in ("q1", "q2", "q3"))
            row |= {
                f"strength_{k}": value,
                f"quartile_{k}": None if special else quartile,
                f"high_{k}": None if special else value >= row_k["q3"],
                f"sink_{k}": None if special else value > SINK_FACTOR * row_k["q2"],
            }
        expected.append(row)
    got = run.sql("FROM tokens ORDER BY doc, position").to_dicts()
    assert got == expected
    assert {r["quartile_8"] for r in got} == {None, 1, 2, 3, 4}
    assert {r["sink_8"] for r in got} == {None, True, False}


def test_thresholds_are_compared_as_the_floats_they_are() -> None:
    """Values in the views' SQL come back bit by bit."""
    rng = np.random.default_rng(0)
    values = np.exp(rng.uniform(-60, 60, 3000)).astype(np.float32)
    with duckdb.connect() as connection:
        texts = ", ".join(expressions.exact(float(v), "FLOAT") for v in values)
        got = connection.sql(f"SELECT unnest([{texts}]) AS v").fetchnumpy()["v"]
    assert got.dtype == np.float32
    assert np.array_equal(got, values)


def test_documents_are_run_wide_and_always_have_an_id(run: Run) -> None:
    expected, offset = [], 0
    for _, documents in SHARDS:
        for r in documents.to_pylist():
            digest = r["text_sha256"].hex()
            doc_id = digest[:16] if r["doc_id"] is None else r["doc_id"]
            shown = {"doc": r["doc"] + offset, "doc_id": doc_id, "text_sha256": digest}
            beside = ("detected_language", "duplicate_of", "near_duplicate_of")
            expected.append(r | shown | dict.fromkeys(beside))
        offset += len(documents)
    assert run.sql("FROM documents ORDER BY doc").to_dicts() == expected


def test_words_are_a_first_token_and_what_follows_it(run: Run) -> None:
    words: list[dict[str, Any]] = []
    limits = thresholds_of(run)
    normal = [r for r in reference_tokens() if not r["flags"] & SPECIAL]
    for before, r in zip([None, *normal], normal, strict=False):
        is_new_document = before is None or before["doc"] != r["doc"]
        if is_new_document or r["flags"] & WORD_START:
            ordinal = 0 if is_new_document else words[-1]["word"] + 1
            words.append({"doc": r["doc"], "word": ordinal, "tokens": []})
        words[-1]["tokens"].append(r)
    expected = []
    for word in words:
        tokens = word.pop("tokens")
        text = tokens[0]["surface"] or "".join(TEXTS[r["token_id"]] for r in tokens)
        guess = lexicon.classify(
            text.lower(), special=False, starts=1, whole=1, words=lexicon.find("en")
        )
        row = word | {
            "text": text,
            "class": guess.name,
            "n_tokens": len(tokens),
            "position": tokens[0]["position"],
            "start": tokens[0]["start"],
            "end": tokens[-1]["end"],
        }
        for k in LAYERS:
            values = [r[f"strength_{k}"] for r in tokens]
            row |= {
                f"max_strength_{k}": max(values),
                f"mean_strength_{k}": pytest.approx(np.mean(values)),
                f"first_strength_{k}": values[0],
                f"last_strength_{k}": values[-1],
                f"high_{k}": max(values) >= limits[k]["q3"],
            }
        expected.append(row)
    got = run.sql("FROM words ORDER BY doc, word").to_dicts()
    assert got == expected
    assert max(r["n_tokens"] for r in got) > 2
    assert any(r["text"] == "RIVER" for r in got)
    assert run.sql("FROM words WHERE doc = 22 ORDER BY word").to_dicts() == [
        r for r in expected if r["doc"] == 22
    ]


def test_the_run_is_one_row(run: Run, store: Path) -> None:
    [row] = run.sql("FROM run").to_dicts()
    assert row["id"] == run.id == RUN
    assert (row["model"], row["layers"], row["corpus"]) == ("tiny", [0, 8], ["a.txt", "b's.txt"])
    assert (row["n_documents"], row["n_shards"]) == (39, 4)
    assert row["finished_at"].isoformat() == "2026-01-02T03:04:05"  # UTC, as created_at
    assert json.loads(row["config"])["store"] == str(store)


def test_offsets_may_be_absent(tmp_path: Path) -> None:
    write_run(str(tmp_path), [make_shard(1, 5, offsets=False)], LAYERS)
    with open_run(str(tmp_path)) as run:
        assert "start" not in run.tables()["tokens"] + run.tables()["words"]
        assert run.words().fetchall()


def test_a_layer_of_special_tokens_alone_has_no_quartiles(tmp_path: Path) -> None:
    tokens, documents = make_shard(1, 5)
    tokens = tokens.filter(pc.equal(tokens["position"], 0))
    write_run(str(tmp_path), [(tokens, documents)], LAYERS)
    with open_run(str(tmp_path)) as run:
        assert run.sql("SELECT DISTINCT quartile_8, high_8, sink_8 FROM tokens").fetchall() == [
            (None, None, None)
        ]
        assert run.words().fetchall() == []


def test_tables_lists_every_view_with_its_columns(run: Run) -> None:
    tables = run.tables()
    assert list(tables) == list(views.VIEWS)
    assert tables["movers"] == MOVERS_SCHEMA.names and tables["screened"] == SCREENED_SCHEMA.names
    assert tables["vocabulary"] == VOCABULARY_SCHEMA.names
    *recorded, last_mean, mean = viewed(documents_schema(strengths(LAYERS))).names
    beside = ["detected_language", "duplicate_of", "near_duplicate_of"]
    assert tables["documents"] == [*recorded, *beside, last_mean, mean]
    assert tables["shards"] == SHARDS_SCHEMA.names
    comments = dict(
        run.sql("SELECT view_name, comment FROM duckdb_views() WHERE NOT internal").fetchall()
    )
    assert comments["tokens"].startswith("one row per token")


def test_a_store_in_memory_gives_the_same_rows(run: Run) -> None:
    write_run("memory://query-test", SHARDS, LAYERS)
    with open_run("memory://query-test", threads=2) as other:
        for view in ("tokens", "documents", "words"):
            sql = f"FROM {view} ORDER BY ALL"
            assert other.sql(sql).fetchall() == run.sql(sql).fetchall()


# --- results
# ---------------------------------------------------------------------------------------------


def test_a_result_is_lazy_and_has_the_methods_of_a_relation(run: Run) -> None:
    high = run.tokens().filter("high_8").aggregate("count(*) AS n")
    assert isinstance(high, result.Result)
    assert (high.columns, high.types) == (["n"], ["BIGINT"])
    [(n,)] = high.fetchall()
    assert n == sum(bool(r["high_8"]) for r in run.tokens().to_dicts())
    assert run.vocabulary().pl()["token"].to_list() == PIECES * 2
    assert pa.table(run.shards()).num_rows == 4
    reader = run.tokens().to_arrow_reader(batch_size=10)
    assert pa.Table.from_batches(reader, reader.schema).num_rows == len(reference_tokens())


def test_parameters_by_position_and_by_name(run: Run) -> None:
    assert run.sql(
        "SELECT text FROM vocabulary WHERE layer = ? AND token_id = ?", [8, 3]
    ).fetchall() == [("bank",)]
    sql = "SELECT text FROM vocabulary WHERE token = $token AND layer = 8"
    assert run.sql(sql, {"token": "'; DROP TABLE vocabulary; --"}).fetchall() == []
    assert run.sql(sql, {"token": "##ver"}).fetchall() == [("ver",)]


def test_own_tables_are_joined(run: Run) -> None:
    import pandas
    import polars

    rows = {"doc": [0, 1], "day": ["mon", "tue"]}
    for table in (pandas.DataFrame(rows), polars.DataFrame(rows), pa.table(rows)):
        joined = run.sql("SELECT day FROM documents JOIN meta USING (doc) ORDER BY doc", meta=table)
        assert joined.fetchall() == joined.fetchall() == [("mon",), ("tue",)]
    with pytest.raises(QueryError, match="is a view"):
        run.sql("FROM tokens", tokens=pa.table(rows))
    with pytest.raises(QueryError, match="no table"):
        run.sql("FROM meta", meta=3)
    with pytest.raises(QueryError, match=r"name=table"):
        run.sql("FROM read_csv('dates.csv')").fetchall()


def test_a_name_with_hyphens_that_lacks_its_quotes_is_named(run: Run) -> None:
    kept = pa.table({"http-status": [200], "WARC-Date": ["x"]})
    with pytest.raises(QueryError) as caught:
        run.sql('SELECT "WARC-Date", HTTP-status FROM kept_columns', kept_columns=kept)
    assert str(caught.value).endswith('needs double quotes, or SQL subtracts: "http-status"')
    with pytest.raises(QueryError) as caught:
        run.sql('SELECT "http-status", day FROM kept_columns', kept_columns=kept)
    assert "double quotes" not in str(caught.value)
    assert run.sql('SELECT "http-status" FROM k', k=kept).fetchall() == [(200,)]


@pytest.mark.parametrize("can_fork", [True, False])
def test_a_crash_a_hang_and_memory_leave_the_run_usable(
    store: Path, own_templates: None, monkeypatch: pytest.MonkeyPatch, can_fork: bool
) -> None:
    """So it is in forks of a template and in fresh processes."""
    monkeypatch.setattr(processes, "CAN_FORK", processes.CAN_FORK and can_fork)
    deep = "SELECT json_transform('1', repeat('[',50000)||'\"INT\"'||repeat(']',50000))"
    slow = "SELECT levenshtein(repeat('a',300000), repeat('b',300000))"
    large = "SELECT length(repeat('x',2000000000))"
    with open_run(str(store), timeout_s=1, memory_limit="300MB", threads=2) as run:
        assert run.id in repr(run) and "tiny" in repr(run)
        for text, said in (
            (deep, "SIGSEGV"),
            (slow, "stopped after 1 s"),
            (large, "limit of 300MB"),
        ):
            processes._once.add(processes._Python.now())  # the next one may be a fork
            assert run.sql("SELECT 1").fetchall() == [(1,)]
            began = time.monotonic()
            with pytest.raises(QueryError, match=said):
                run.sql(text).fetchall()
            assert (
                time.monotonic() - began < 20
            )  # a start, the limit and its grace, on a busy machine
            assert run.sql("SELECT 1").fetchall() == [(1,)]


def test_a_run_may_be_opened_first_in_a_thread() -> None:
    code = (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from importlib import import_module\n"
        "ThreadPoolExecutor(1).submit(import_module, 'afn_ray.query.database').result()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_results_of_one_run_are_independent(run: Run) -> None:
    reader = run.sql("FROM range(500000)").to_arrow_reader(1000)
    first = reader.read_next_batch()
    assert run.sql("SELECT 1").fetchall() == [(1,)]
    assert first.num_rows + sum(b.num_rows for b in reader) == 500_000
    failing = run.sql("SELECT error('no') FROM range(3)")
    for _ in range(2):
        with pytest.raises(QueryError, match="no"):
            failing.fetchall()


# --- limits and errors
# -----------------------------------------------------------------------------------


def test_an_unknown_column_names_candidates_and_the_place(run: Run) -> None:
    with pytest.raises(QueryError) as caught:
        run.sql("SELECT token,\n  strenth_8 FROM tokens WHERE doc < ?", [3])
    message, place, caret = (
        str(caught.value).split("\n\nLINE ")[0],
        *str(caught.value).split("\n")[-2:],
    )
    assert '"strength_8"' in message
    assert place == "LINE 2:   strenth_8 FROM tokens WHERE doc < ?"
    assert caret.index("^") == place.index("strenth_8")


@pytest.mark.parametrize(
    "text", ["", "-- nothing", "SELECT 1; SELECT 2", "SELECT 1; COPY (SELECT 1) TO 'x'"]
)
def test_one_statement_and_only_one(run: Run, text: str) -> None:
    with pytest.raises(QueryError, match="one SQL statement"):
        run.sql(text)


ENDLESS = "SELECT sum(a.range * b.range) FROM range(10000000000) a, range(100000) b"


@pytest.mark.parametrize(
    "text",
    [
        ENDLESS,
        "WITH RECURSIVE x AS (SELECT 1 AS a UNION ALL SELECT a + 1 FROM x) SELECT count(*) FROM x",
        "EXPLAIN ANALYZE " + ENDLESS,
    ],
)
@pytest.mark.parametrize("method", ["fetchall", "to_arrow_reader"])
def test_a_query_without_end_is_stopped(store: Path, text: str, method: str) -> None:
    began = time.monotonic()
    with (
        open_run(f"{store}/runs/{RUN}", timeout_s=0.3) as run,
        pytest.raises(QueryError, match="stopped after 0"),
    ):
        list(getattr(run.sql(text), method)())
    assert time.monotonic() - began < 5


def test_the_time_limit_is_for_the_query_and_not_for_its_reader(store: Path) -> None:
    with open_run(f"{store}/runs/{RUN}", timeout_s=0.5, threads=2) as run:
        reader = run.sql("SELECT a.range, sqrt(a.range) FROM range(2000000) a").to_arrow_reader(
            100_000
        )
        rows = 0
        for batch in reader:
            rows += batch.num_rows
            time.sleep(0.05)
    assert rows == 2_000_000


def test_a_query_over_its_memory_says_so(run: Run) -> None:
    with pytest.raises(QueryError, match="more memory than its limit of 500MB"):
        run.sql("SELECT string_agg(range::VARCHAR, '') FROM range(1000000000)").fetchall()
    with pytest.raises(
        QueryError, match="memory"
    ):  # sorting would spill to disk, which there is none of
        run.sql(
            "SELECT sum(x) FROM (SELECT a.range AS x FROM range(200000000) a ORDER BY hash(x))"
        ).fetchall()


def test_an_answer_of_too_much_text_is_refused_unread_and_the_run_goes_on(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run.sql("SELECT 1").fetchall() == [(1,)]
    monkeypatch.setattr(sandbox, "MOST_TEXT_BYTES", 10_000)
    for sql in ("SELECT error(repeat('x', 20000))", f'SELECT 1 AS "{"x" * 20_000}"'):
        with pytest.raises(QueryError, match=r"take 20,[0-9]{3} bytes; expected at most 10,000"):
            run.sql(sql).fetchall()
    assert run.sql("SELECT 2").fetchall() == [(2,)]


@pytest.mark.parametrize("method", ["fetchall", "to_arrow_reader"])
def test_ctrl_c_stops_a_query_and_the_run_goes_on(run: Run, method: str) -> None:
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        timer.start()
        try:
            list(getattr(run.sql(ENDLESS), method)())
        finally:
            timer.cancel()
    assert time.monotonic() - began < 5
    assert run.sql("SELECT 1").fetchall() == [(1,)]


@pytest.mark.parametrize("limits", [{"memory_limit": "lots"}, {"threads": 0}, {"timeout_s": 0}])
def test_a_limit_that_makes_no_sense_is_refused(store: Path, limits: dict[str, Any]) -> None:
    with pytest.raises(QueryError):
        open_run(f"{store}/runs/{RUN}", **limits)


def test_a_closed_run_cannot_be_asked(store: Path) -> None:
    run = open_run(f"{store}/runs/{RUN}")
    run.close()
    with pytest.raises(QueryError, match="closed"):
        run.sql("SELECT 1")


# --- the sandbox
# -----------------------------------------------------------------------------------------


def snapshot(*folders: Path) -> dict[str, tuple[str, int]]:
    """Every file below ``folders``: content and modification time."""
    files = sorted(p for folder in folders for p in folder.rglob("*"))
    digests = [hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "" for p in files]
    return {
        str(p): (digest, p.lstat().st_mtime_ns) for p, digest in zip(files, digests, strict=True)
    }


ATTACKS = """
COPY (SELECT 1) TO '{out}/x.csv'
COPY vocabulary TO '{token}' (FORMAT parquet)
COPY vocabulary TO '{name}' (FORMAT parquet)
COPY vocabulary TO 'afn://new.parquet'
COPY vocabulary FROM '{token}'
WITH x AS (COPY (SELECT 1 AS a) TO '{out}/x.csv') FROM x
WITH x AS (COPY (SELECT 1 AS a) TO '{token}') FROM x
WITH x AS (COPY (SELECT 1 AS a) TO '{name}' (FORMAT parquet)) FROM x
WITH x AS (COPY (SELECT 1 AS a) TO 'afn://new.parquet') FROM x
WITH x AS (COPY (SELECT 1 AS a) TO 'afn://new.csv' (USE_TMP_FILE false)) FROM x
WITH x AS (COPY (SELECT 1 AS a, 2 AS b) TO 'afn://new' (PARTITION_BY (a))) FROM x
WITH x AS (COPY (SELECT 1 AS a) TO '{out}/x.parquet' (FORMAT parquet)) FROM x
WITH x AS (COPY (SELECT 1 AS a) TO '{out}/x.json' (FORMAT json)) FROM x
EXPLAIN ANALYZE COPY (SELECT 1) TO '{out}/x.csv'
EXPLAIN ANALYZE COPY (SELECT 1) TO '{name}'
EXPLAIN ANALYZE COPY vocabulary TO '{token}' (FORMAT parquet)
ATTACH '{out}/x.duckdb'
ATTACH ':memory:' AS other
ATTACH '{token}' AS other (READ_ONLY)
EXPORT DATABASE '{out}/x'
IMPORT DATABASE '{out}/x'
CREATE TABLE x AS SELECT 1
CREATE TEMP TABLE vocabulary AS SELECT 1
CREATE OR REPLACE VIEW tokens AS SELECT 1
CREATE MACRO upper(x) AS 'y'
DROP TABLE vocabulary
DROP VIEW tokens
ALTER TABLE vocabulary RENAME TO x
INSERT INTO vocabulary FROM vocabulary
DELETE FROM thresholds
UPDATE thresholds SET q3 = 0
TRUNCATE thresholds
WITH x AS (INSERT INTO vocabulary FROM vocabulary RETURNING *) FROM x
WITH x AS (DELETE FROM thresholds RETURNING *) FROM x
WITH x AS (UPDATE thresholds SET q3 = 0 RETURNING *) FROM x
EXPLAIN ANALYZE UPDATE thresholds SET q3 = 0
EXPLAIN ANALYZE DROP VIEW tokens
EXPLAIN ANALYZE CREATE OR REPLACE VIEW tokens AS SELECT 1
FROM query('COPY (SELECT 1) TO ''{out}/x.csv''')
INSTALL httpfs
INSTALL '{out}/x.duckdb_extension'
LOAD httpfs
LOAD '{out}/x.duckdb_extension'
FORCE INSTALL httpfs FROM 'http://127.0.0.1:9/'
FROM sql_auto_complete('SEL')
FROM read_text('{secret}')
FROM read_text('file://{secret}')
FROM read_blob('{secret}')
FROM read_csv('{secret}')
FROM sniff_csv('{secret}')
FROM read_json('{out}/secret.json')
FROM '{out}/secret.csv'
FROM read_text('/etc/passwd')
FROM read_text('/dev/stdin')
FROM glob('*')
FROM glob('{store}/**')
FROM read_text('{store}/runs/20260102T030405.000Z-0123456789ab/run.json')
FROM read_parquet('{token}')
FROM read_parquet('{other}')
FROM read_parquet('file://{token}')
FROM parquet_metadata('{token}')
FROM read_text('afn://{secret}')
FROM read_text('afn:///etc/passwd')
FROM read_text('afn://../../etc/passwd')
FROM read_text('afn://shards/../shards/m/s0/a-tokens.parquet')
FROM read_text('{name}/../a-tokens.parquet')
FROM read_parquet('afn://shards/m/s9/a-tokens.parquet')
FROM read_parquet('afn://shards/*/*/a-tokens.parquet')
FROM glob('afn://**')
FROM read_csv('http://127.0.0.1:9/x.csv')
FROM read_parquet('s3://bucket/x.parquet')
FROM read_text('memory://x')
FROM read_duckdb('{out}/x.duckdb')
SET threads = 1
SET lock_configuration = false
SET enable_external_access = true
SET disabled_filesystems = ''
SET allowed_directories = ['/']
SET GLOBAL memory_limit = '100GB'
SET temp_directory = '{out}'
SET profiling_output = '{out}/x.json'
SET log_query_path = '{out}/x.log'
SET VARIABLE x = 1
RESET lock_configuration
RESET disabled_filesystems
EXPLAIN ANALYZE SET lock_configuration = false
EXPLAIN ANALYZE SET log_query_path = '{out}/x.log'
PRAGMA enable_profiling = 'json'
PRAGMA profiling_output = '{out}/x.json'
PRAGMA database_list
CALL enable_logging(storage = 'file', storage_path = '{out}/log')
FROM enable_logging(storage = 'file', storage_path = '{out}/log')
FROM enable_logging(storage = 'file', storage_config = {{'path': '{out}/log'}})
FROM enable_logging('QueryLog', storage = 'file', storage_config = {{'path': '{name}'}})
CREATE SECRET s (TYPE http)
CREATE PERSISTENT SECRET s (TYPE http)
FROM which_secret('s3://x', 's3')
USE internal
BEGIN
COMMIT
ROLLBACK
CHECKPOINT
VACUUM
PREPARE p AS SELECT 1
EXECUTE p
FROM python_rows
FROM python_table
"""


def attacks(store: Path, out: Path) -> list[str]:
    names = {
        "out": out,
        "store": store,
        "secret": out / "secret.txt",
        "token": store / "shards/m/s0/a-tokens.parquet",
        "other": store / "other/shards/m/s0/a-tokens.parquet",
        "name": "afn://shards/m/s0/a-tokens.parquet",
    }
    quoted = {k: str(v).replace("'", "''") for k, v in names.items()}
    return [line.format(**quoted) for line in ATTACKS.split("\n")[1:-1]]


@pytest.mark.parametrize(
    "query",
    [
        "SELECT doc FROM KWIC('bank')",
        "SELECT doc FROM \"kwic\"('bank')",
        "SELECT doc FROM (SELECT *, document_text(doc) AS text FROM documents)",
        "SELECT doc FROM query('FROM kw' || 'ic(''bank'')')",
        "SELECT doc FROM query($asked)",
        "SELECT function_name AS doc FROM duckdb_functions() WHERE NOT internal",
        "SELECT n AS doc FROM Main.VOCABULARY",
        "SELECT n AS doc FROM query_table('vocab' || 'ulary')",
        "SELECT table_name AS doc FROM information_schema.tables",
        "SELECT name AS doc FROM (SHOW ALL TABLES)",
        "SELECT name AS doc FROM (DESC)",
        "SELECT name AS doc FROM (\n\tDESC ALL TABLES)",
        "SELECT column_name AS doc FROM (SUMMARIZE vocabulary)",
    ],
)
def test_views_and_macros_are_there_for_each_query_that_may_see_them(
    store: Path, query: str
) -> None:
    """They are created only then, so each query has a process of its own."""
    with open_run(str(store)) as run:
        asked = {"asked": "FROM kwic('bank')"} if "$" in query else None
        found = {doc for (doc,) in run.sql(query, asked).fetchall()}
        if "functions" in query:
            assert found >= {"kwic", "document_text"}
        if "table_name" in query or "SHOW" in query or "DESC" in query:
            assert found >= VIEWS.keys()
        assert found


@pytest.mark.parametrize("name", [*VIEWS, "kwic('bank')"])
def test_a_view_comes_with_all_that_it_is_made_of_and_with_its_comment(
    store: Path, name: str
) -> None:
    place = str(store).replace("'", "''")
    contents = read_contents(manifest.find_run(str(store)), None, f"'{place}/' || ")
    with duckdb.connect() as connection:
        filling = Filling(connection, contents.tables, contents.statements)
        filling.create_named(connection, f"FROM {name.upper()}")
        assert connection.sql(f"FROM {name}").columns
        made = connection.sql(
            "SELECT view_name, comment FROM duckdb_views() WHERE NOT internal "
            "UNION ALL SELECT table_name, comment FROM duckdb_tables() WHERE schema_name = 'main'"
        )
        comments = dict(made.fetchall())
    assert len(comments) < len(contents.tables)
    if name in VIEWS:
        assert comments[name] == VIEWS[name]


def test_a_hint_knows_the_views_and_macros(store: Path) -> None:
    for wrong, right in (("kiwc('bank')", "kwic"), ("salienc", "salience")):
        with open_run(str(store)) as run, pytest.raises(QueryError, match=f'"{right}"'):
            run.sql(f"FROM {wrong}").fetchall()


def test_a_step_may_name_a_macro(store: Path) -> None:
    with open_run(str(store)) as run:
        assert run.documents().project("document_text(doc)").fetchall()
    with open_run(str(store)) as run:
        assert run.documents().filter("doc IN (SELECT doc FROM Kwic('bank'))").fetchall()


def test_no_way_out_of_the_run(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """No statement reads another file or writes any; the store and the rows of the run stay as they
    were.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    python_rows, python_table = [1, 2], pa.table({"a": [1]})
    assert python_rows and python_table  # only SQL could read them
    for name in ("secret.txt", "secret.csv", "secret.json"):
        (tmp_path / name).write_text('{"password": "hunter2"}')
    before = snapshot(store, tmp_path)
    with open_run(f"{store}/runs/{RUN}", threads=2, timeout_s=20) as run:
        rows = {view: run.sql(f"FROM {view} ORDER BY ALL").fetchall() for view in run.tables()}
        through = []
        for text in attacks(store, tmp_path):
            try:
                got = run.sql(text).fetchall()
            except QueryError:
                continue
            if got:
                through.append((text, got))
        assert through == []
        assert snapshot(store, tmp_path) == before
        assert run.sql("FROM duckdb_secrets()").fetchall() == []
        assert {
            view: run.sql(f"FROM {view} ORDER BY ALL").fetchall() for view in run.tables()
        } == rows
        settings = "SELECT current_setting('threads'), current_setting('enable_logging')"
        assert run.sql(settings).fetchall() == [(2, False)]
    assert "hunter2" not in capfd.readouterr().out


def session_of(run: Run) -> session.Session:
    """Parts of the run's process, in this process."""

    def read(name: str, start: int, end: int) -> bytes:
        with run._backend.process._files.open(name) as file:
            file.seek(start)
            return bytes(file.read(end - start))

    return session.Session(run._backend.process._setup, read)


def test_the_engine_itself_cannot_write_or_read_elsewhere(store: Path, tmp_path: Path) -> None:
    """Behind the rule of one reading statement: on DuckDB's own connection nothing leaves or enters
    either.
    """
    (tmp_path / "secret.txt").write_text("hunter2")
    before = snapshot(store, tmp_path)
    with open_run(f"{store}/runs/{RUN}", threads=2) as run:
        cursor = session_of(run).connection.cursor()
        for text in attacks(store, tmp_path):
            try:
                got = cursor.execute(text).fetchall()
            except (duckdb.Error, RuntimeError):
                continue
            assert "hunter2" not in str(got), text
            assert not text.startswith(("SET", "RESET")) or "VARIABLE" in text, text
        assert snapshot(store, tmp_path) == before
        assert cursor.execute("SELECT current_setting('lock_configuration')").fetchall() == [
            (True,)
        ]


def test_the_relation_of_a_result_cannot_write_either(run: Run, tmp_path: Path) -> None:
    writes: tuple[Callable[[result.Result], object], ...] = (
        lambda r: r.to_csv(str(tmp_path / "x.csv")),
        lambda r: r.to_parquet(str(tmp_path / "x.parquet")),
        lambda r: r.create("vocabulary2"),
        lambda r: r.create_view("tokens"),
        lambda r: r.insert_into("vocabulary"),
    )
    for write in writes:
        with pytest.raises(QueryError):
            write(run.vocabulary())
    assert not list(tmp_path.iterdir())


@pytest.fixture
def nothing_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files are read again and again, as larger ones are."""
    monkeypatch.setattr(files, "HELD_BYTES", 0)


def test_a_link_out_of_the_store_is_refused(tmp_path: Path, nothing_held: None) -> None:
    store = tmp_path / "store"
    write_run(str(store), SHARDS, LAYERS)
    file = store / "shards/m/s0/a-tokens.parquet"
    with open_run(str(store), threads=2) as run:
        assert run.sql("SELECT count(*) FROM tokens").fetchall() != [(0,)]
        outside = file.rename(tmp_path / "outside.parquet")
        file.symlink_to(outside)
        with pytest.raises(QueryError, match="leaves the store"):
            run.sql("SELECT sum(strength_8) FROM tokens").fetchall()
    with pytest.raises(QueryError, match="leaves the store"):
        open_run(str(store))
    file.unlink()
    file.symlink_to(
        outside.rename(store / "moved.parquet")
    )  # inside the store it is none of our business
    with open_run(str(store)) as run:
        assert run.tables()


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd", "../x.parquet", "shards/m/s0/../x.parquet", "shards/../../x.parquet",
        "shards/m/../x.parquet",
        "shards/m/s0/x.csv", "file:///etc/passwd", "s3://bucket/shards/m/s/x.parquet",
        "shards/m/s0/x'.parquet",
        "shards/m/s0/a.parquet\n", "", "shards/m//x.parquet", "shards/m/s0/t/x.parquet",
        "shards\\m\\s\\x.parquet",
    ],
)  # fmt: skip
def test_a_name_that_is_no_shards_file_is_refused(tmp_path: Path, name: str) -> None:
    folder = write_run(str(tmp_path), SHARDS, LAYERS)

    def rename(table: pa.Table) -> pa.Table:
        names = pa.array([name, *table["tokens_file"].to_pylist()[1:]])
        at = table.schema.get_field_index("tokens_file")
        return table.set_column(at, SHARDS_SCHEMA.field(at), names)

    edit_table(folder, "shards", rename)
    with pytest.raises(StoreError, match="damaged"):
        open_run(str(tmp_path))


def test_layers_and_offsets_cannot_carry_sql(tmp_path: Path) -> None:
    folder = Path(write_run(str(tmp_path), SHARDS, LAYERS))
    edit_checksummed(
        f"{folder}/run.json",
        lambda info: info.update(layers=["8 FROM read_text('/etc/passwd') --"]),
    )
    with pytest.raises(StoreError):
        open_run(str(tmp_path))


def test_a_lost_or_cut_file_is_named(tmp_path: Path) -> None:
    write_run(str(tmp_path), SHARDS, LAYERS)
    (tmp_path / "shards/m/s2/a-tokens.parquet").unlink()
    with (
        open_run(str(tmp_path)) as run,
        pytest.raises(StoreError, match=r"s2/a-tokens\.parquet is gone.*afn verify"),
    ):
        run.sql("SELECT sum(strength_8) FROM tokens").fetchall()


@pytest.mark.parametrize("table", ["tokens", "documents"])
def test_a_flipped_bit_in_what_is_read_is_an_error_that_names_the_file(
    tmp_path: Path, table: str, nothing_held: None
) -> None:
    write_run(str(tmp_path), SHARDS, LAYERS)
    file = tmp_path / f"shards/m/s1/a-{table}.parquet"
    kept = file.read_bytes()
    ask = f"SELECT bit_xor(hash(t)), count(*) FROM {table} t"
    with open_run(str(tmp_path)) as run:
        right = run.sql(ask).fetchall()
    random = Random(table)
    wrong = rf"s1/a-{table}\.parquet is damaged.*afn verify"
    for _ in range(20):
        damaged = bytearray(kept)
        damaged[at := random.randrange(len(kept))] ^= 1 << random.randrange(8)
        file.write_bytes(damaged)
        with (
            pytest.raises(StoreError, match=wrong),
            run._backend.process._files.open(f"shards/m/s1/a-{table}.parquet") as part,
        ):
            part.seek(at)
            part.read(1)
    with open_run(str(tmp_path)) as run, pytest.raises(StoreError, match=wrong):
        run.sql(ask).fetchall()
    file.write_bytes(kept)
    with open_run(str(tmp_path)) as run:
        assert run.sql(ask).fetchall() == right


def test_a_small_file_is_held_once_it_was_read_whole_and_right(tmp_path: Path) -> None:
    write_run(str(tmp_path), SHARDS, LAYERS)
    file = tmp_path / "shards/m/s1/a-tokens.parquet"
    kept = file.read_bytes()
    file.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with open_run(str(tmp_path)) as run:

        def read() -> bytes:
            with run._backend.process._files.open("shards/m/s1/a-tokens.parquet") as part:
                return bytes(part.read(10))

        with pytest.raises(StoreError, match="is damaged"):
            read()
        file.write_bytes(kept)
        assert read() == kept[:10]
        file.unlink()
        assert read() == kept[:10]


def test_as_many_small_files_are_held_as_are_allowed_and_no_larger_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MOST_HELD", 2)
    (tmp_path / "small").write_bytes(b"x" * files.HELD_BYTES)
    (tmp_path / "large").write_bytes(b"x" * (files.HELD_BYTES + 1))
    sizes = dict.fromkeys("abc", files.HELD_BYTES) | {"large": files.HELD_BYTES + 1}
    named = {
        name: (str(tmp_path / ("large" if name == "large" else "small")), size)
        for name, size in sizes.items()
    }

    def find(name: str) -> blocks.Blocks:
        return blocks.Blocks(sizes[name], blocks.checksums(b"x" * sizes[name]))

    served = ReadOnlyFiles(str(tmp_path), named, find)
    read: list[str] = []
    read_checked = served._read_checked

    def count(name: str, start: int, end: int) -> bytes:
        read.append(name)
        return read_checked(name, start, end)

    monkeypatch.setattr(served, "_read_checked", count)
    for name in (*"aabbccab", "large", "large"):
        assert served.open(f"afn://{name}").read() == b"x" * sizes[name]
    assert read == ["a", "b", "c", "c", "large", "large"]


# --- reading from many threads, and speed
# ----------------------------------------------------------------


def read_only_files(folder: Path) -> ReadOnlyFiles:
    (folder / "file").write_bytes(bytes(range(100)))
    found = blocks.Blocks(100, blocks.checksums(bytes(range(100))))
    return ReadOnlyFiles(str(folder), {"name": (str(folder / "file"), 100)}, lambda name: found)


def test_checksums_of_a_few_files_are_held_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing_held: None
) -> None:
    monkeypatch.setattr("afn_ray.query.files.MOST_BLOCKS", 2)
    (tmp_path / "file").write_bytes(b"x" * 100)
    found = blocks.Blocks(100, blocks.checksums(b"x" * 100))
    asked: list[str] = []

    def find(name: str) -> blocks.Blocks:
        asked.append(name)
        return found

    named = dict.fromkeys("abc", (str(tmp_path / "file"), 100))
    served = ReadOnlyFiles(str(tmp_path), named, find)
    for name in "aabcca":
        assert served.open(f"afn://{name}").read() == b"x" * 100
    assert asked == ["a", "b", "c", "a"]


def test_every_thread_has_a_position_of_its_own(tmp_path: Path) -> None:
    file = read_only_files(tmp_path).open("afn://name")
    barrier = threading.Barrier(4)

    def read(position: int) -> bytes:
        file.seek(position)
        barrier.wait(10)  # all have sought before any reads
        first = file.read(5)
        barrier.wait(10)
        return bytes(first + file.read(5))

    positions = [0, 20, 40, 95]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(read, positions))
    assert got == [bytes(range(p, min(p + 10, 100))) for p in positions]
    assert (file.seek(-3, os.SEEK_END), file.read()) == (97, bytes([97, 98, 99]))


def test_the_filesystem_holds_what_it_was_given_and_never_writes(tmp_path: Path) -> None:
    files = read_only_files(tmp_path)
    assert (files.exists("afn://name"), files.exists("afn://other"), files.size("name")) == (
        True,
        False,
        100,
    )
    assert (files.glob("afn://name"), files.glob("afn://*")) == (["afn://name"], [])
    calls: list[Callable[[], object]] = [
        partial(files.open, "name", mode) for mode in ("wb", "ab", "xb", "r+b")
    ]
    calls += [
        lambda: files.open("other"),
        lambda: files.open(str(tmp_path / "file")),
        lambda: files.ls(""),
    ]
    calls += [
        lambda: files.rm("name"),
        lambda: files.mv("name", "x"),
        lambda: files.pipe_file("x", b""),
    ]
    calls += [lambda: files.mkdir("x"), lambda: files.touch("name"), lambda: files.info("../file")]
    for call in calls:
        with pytest.raises(PermissionError):
            call()
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def big_shard(seed: int, num_tokens: int) -> tuple[pa.Table, pa.Table]:
    rng = np.random.default_rng(seed)
    num_documents = num_tokens // 500
    columns = {
        "doc": np.repeat(np.arange(num_documents), 500).astype(np.int32),
        "position": np.tile(np.arange(500), num_documents).astype(np.int32),
        "token_id": rng.integers(0, 6, num_tokens).astype(np.int32),
        "flags": np.full(num_tokens, WORD_START, np.uint8),
        "surface": pa.DictionaryArray.from_arrays(
            pa.nulls(num_tokens, pa.int32()), pa.array([], pa.string())
        ),
        "strength_8": rng.lognormal(2, 0.3, num_tokens).astype(np.float32),
    }
    _, documents = make_shard(seed, 1)
    rows = (
        documents.select(viewed(documents_schema(strengths([8]))).names).to_pylist() * num_documents
    )
    documents = pa.Table.from_pylist(
        [r | {"doc": i} for i, r in enumerate(rows)], viewed(documents_schema(strengths([8])))
    )
    return pa.table(columns, viewed(tokens_schema(strengths([8]), False))), documents


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_sums_are_right_from_many_threads(tmp_path: Path, compression: str) -> None:
    """DuckDB's threads share a file object; one that keeps a position gives errors and now and then
    wrong sums.
    """
    shards = [big_shard(seed, 1_500_000) for seed in range(3)]
    write_run(
        str(tmp_path),
        shards,
        (8,),
        compression=compression,
        use_dictionary=False,
        row_group_size=1 << 18,
    )
    table = pa.concat_tables([t for t, _ in shards])
    expected = [sum(pc.sum(table[c]).as_py() for c in ("position", "token_id")), table.num_rows]
    bits = int(np.sum(table["strength_8"].to_numpy().view(np.uint32).astype(np.int64)))
    sql = (
        "SELECT sum(position) + sum(token_id), count(*), sum(strength_8::BIT::INTEGER::BIGINT) "
        "FROM tokens"
    )
    for _ in range(8):  # each with a cache of its own
        with open_run(str(tmp_path), threads=4) as run:
            assert run.sql(sql).fetchall() == [(*expected, bits)]


def test_opening_and_asking_the_vocabulary_is_quick(tmp_path: Path) -> None:
    shard = make_shard(1, 20)
    write_run(str(tmp_path), [shard] * 200, LAYERS)
    with open_run(str(tmp_path)):
        pass  # imports and page cache
    began = time.monotonic()
    with open_run(str(tmp_path)) as run:
        opened = time.monotonic()
        run.sql("SELECT 1").fetchall()  # its process begins
        started = time.monotonic()
        run.sql(
            "SELECT text, share_high FROM vocabulary WHERE layer = 8 ORDER BY share_high LIMIT 9"
        ).fetchall()
        asked = time.monotonic()
        assert run.sql("SELECT count(DISTINCT doc) FROM documents").fetchall() == [(4000,)]
    assert opened - began < 2
    assert started - opened < 10  # 0.6 s on a core of its own
    assert asked - started < 0.2


def test_values_beyond_python_and_queries_that_are_no_text_are_refused(run: Run) -> None:
    for asked in ("SELECT INTERVAL 1000000000 MONTH", "SELECT MAP {INTERVAL 1000000000 MONTH: 1}"):
        with pytest.raises(QueryError, match="beyond what Python can hold"):
            run.sql(asked).fetchall()
    assert run.sql("SELECT (INTERVAL 1000000000 MONTH)::VARCHAR").fetchall() == [
        ("83333333 years 4 months",)
    ]
    with pytest.raises(QueryError, match="no Unicode text"):
        run.sql("SELECT '\udcc3'")


FAR = "to_hours(90000000)"


@pytest.mark.parametrize(
    "value",
    [FAR, f"-{FAR}", f"[{FAR}]", f"[NULL, {FAR}]::INTERVAL[2]", f"MAP {{'a': {FAR}}}",
     f"MAP {{{FAR}: 1}}",
     f"{{'a': [{{'it''s': {FAR}}}]}}", f"row(1, {FAR})", f"union_value(k := {FAR})"],
)  # fmt: skip
def test_an_interval_that_arrow_would_alter_is_refused(run: Run, value: str) -> None:
    with pytest.raises(QueryError, match="292 years"):
        run.sql(f"SELECT 1 AS i, {value} AS i").fetchall()


def test_other_intervals_come_as_they_are(run: Run) -> None:
    day, month = timedelta(days=1), timedelta(days=30)
    asked = (
        "SELECT INTERVAL 1 DAY, [INTERVAL 1 MONTH, NULL], NULL::INTERVAL, {'a': INTERVAL 1 DAY}, "
        "to_hours(2562046)"
    )
    assert run.sql(asked).fetchall() == [
        (day, [month, None], None, {"a": day}, timedelta(hours=2562046))
    ]
