"""The only door to DuckDB: a run's tables as SQL views, read-only and sandboxed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

import duckdb
import pyarrow as pa

from afn_ray import manifest, storage
from afn_ray.errors import QueryError, StoreError
from afn_ray.schema import (
    REPLACED,
    SCREENED_SCHEMA,
    SHARDS_SCHEMA,
    SOURCES_SCHEMA,
    SPECIAL,
    THRESHOLDS_SCHEMA,
    VOCABULARY_SCHEMA,
    WORD_START,
)

T = TypeVar("T")

ALLOWED = (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN, duckdb.StatementType.MULTI)
"""SELECT is also FROM, WITH, VALUES, DESCRIBE, SHOW and SUMMARIZE; MULTI is PIVOT without an IN list."""

READ_ONLY = "BEGIN TRANSACTION READ ONLY"

FILE_NAME = re.compile(r"shards(/\w[\w.-]*){3}\.parquet", re.ASCII)

MAX_TIMEOUT_S = 1_000_000
VIEWS = {
    "tokens": "one row per token of the corpus, special tokens included",
    "documents": "one row per document read",
    "vocabulary": "statistics of every type (token_id) that occurs, per layer",
    "words": "one row per word with the strengths of its tokens; special tokens belong to none",
    "thresholds": "quartiles of the run per layer, with and without sinks",
    "labels": "the quartiles that labels go by: these, or frozen ones of another run",
    "sources": "tokens by file, or by folder where files are many; empty when the run was not screened",
    "screened": "the strangest documents; empty when the run was not screened",
    "shards": "where the files are and how many rows they hold",
    "run": "the run itself: one row",
}


def open_run(
    uri: str, *, memory_limit: str = "2GB", threads: int | None = None, timeout_s: float = 60.0
) -> Run:  # fmt: skip
    """The run at ``uri`` (a run's URI, or a store's for its latest complete run), ready to be asked in SQL.

    ``memory_limit`` is DuckDB's, ``threads`` None is one per core, ``timeout_s`` holds for each query. Opening
    reads the run's small tables and two Parquet footers. Raises ``StoreError`` when there is no such run or it
    is damaged, ``QueryError`` for a limit that DuckDB does not accept.
    """
    return Run(manifest.find_run(uri), memory_limit=memory_limit, threads=threads, timeout_s=timeout_s)


class Result:
    """The rows of one query: lazy, computed by the method that asks for them, anew each time.

    It has every method of ``duckdb.DuckDBPyRelation`` (``fetchall``, ``df``, ``pl``, ``to_arrow_table``,
    ``filter``, ``limit``, ``aggregate``, ...); those that return a relation return a ``Result``. Errors are
    ``QueryError``, and each call has the run's time limit for itself.
    """

    __slots__ = ("_ask", "_relation")

    def __init__(self, relation: duckdb.DuckDBPyRelation, ask: Callable[[Callable[[], Any]], Any]) -> None:
        """``ask`` calls what reads ``relation``, under the run's limits."""
        self._relation, self._ask = relation, ask

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return self._relation.columns

    @property
    def types(self) -> list[str]:
        """SQL types of the columns."""
        return [str(t) for t in self._relation.types]

    def to_arrow_reader(self, batch_size: int = 1 << 17) -> pa.RecordBatchReader:
        """The rows as a stream of Arrow batches; the time limit holds for each batch, not for who reads them."""
        reader = self._ask(lambda: self._relation.to_arrow_reader(batch_size))
        batches = iter(lambda: self._ask(lambda: next(reader, None)), None)
        return pa.RecordBatchReader.from_batches(reader.schema, batches)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") and name != "__arrow_c_stream__":
            raise AttributeError(name)
        attribute = getattr(self._relation, name)
        return self._limited(attribute) if callable(attribute) else attribute

    def _limited(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            value = self._ask(lambda: method(*(_unwrapped(a) for a in args), **options))
            return Result(value, self._ask) if isinstance(value, duckdb.DuckDBPyRelation) else value

        return call

    def __repr__(self) -> str:
        return str(self._ask(lambda: repr(self._relation)))


def _unwrapped(value: object) -> object:
    return value._relation if isinstance(value, Result) else value


class Run:
    """A complete run as SQL views: tokens, documents, vocabulary, words, thresholds, shards and run.

    A query cannot write, and cannot read anything but this run's own files:

    - one statement, and only one that reads, in a read-only transaction on a connection of its own;
    - DuckDB's own filesystem is off; what it reads comes through ``storage.ReadOnlyFiles``, which has nothing but
      the run's tokens and documents files and no way to write;
    - no external access, no extensions, no secrets, no Python variables, no spilling, and a locked configuration.
    """

    def __init__(
        self, folder: manifest.RunFolder, *, memory_limit: str, threads: int | None, timeout_s: float
    ) -> None:  # fmt: skip
        if not 0 < timeout_s <= MAX_TIMEOUT_S:
            raise QueryError(f"the time limit is {timeout_s} s; expected more than 0 and at most {MAX_TIMEOUT_S}")
        self.uri, self.id, self.info = folder.uri, folder.id, folder.info
        self._memory_limit, self._timeout_s = memory_limit, timeout_s
        shards = _table(folder, "shards", SHARDS_SCHEMA)
        labels = _table(folder, manifest.labels_name(folder), THRESHOLDS_SCHEMA)
        files = {table: _files(folder, shards, table) for table in ("tokens", "documents")}
        self._files = storage.ReadOnlyFiles(folder.store, files["tokens"] | files["documents"])
        with self._plain_errors():
            self._connection = duckdb.connect(":memory:", config=_settings(memory_limit, threads))
            self._connection.register_filesystem(self._files)
            self._load("vocabulary", _table(folder, "vocabulary", VOCABULARY_SCHEMA))
            self._load("thresholds", _table(folder, "thresholds", THRESHOLDS_SCHEMA))
            self._load("labels", labels)
            for name, schema in (("sources", SOURCES_SCHEMA), ("screened", SCREENED_SCHEMA)):
                has = name in folder.info["tables"]
                self._load(name, _table(folder, name, schema) if has else schema.empty_table())
            self._load("shards", shards)
            self._load("run", _run_row(folder))
            self._create_views(files, labels)
            for statement in (
                "SET disabled_filesystems = 'LocalFileSystem'",
                "SET allowed_directories = ['afn://']",  # it grants writing too, which ReadOnlyFiles refuses
                "SET enable_external_access = false",
                "SET lock_configuration = true",
            ):
                self._connection.execute(statement)

    def sql(self, query: str, parameters: Sequence[Any] | Mapping[str, Any] | None = None) -> Result:
        """The result of one statement that reads; nothing is computed before a method of it is called.

        ``parameters`` are for ``?`` or ``$1`` (a sequence) or ``$name`` (a mapping). Raises ``QueryError`` for SQL
        that is wrong or forbidden; the result's methods raise it for a query over its limits.
        """
        with self._plain_errors():
            statements = self._connection.extract_statements(query)
        if len(statements) != 1:
            raise QueryError(f"expected one SQL statement, got {len(statements)}; ask them one by one")
        if (kind := statements[0].type) not in ALLOWED:
            raise QueryError(
                f"{kind.name} is not allowed: a run is read-only. Ask with SELECT, FROM, WITH, DESCRIBE, SHOW, "
                "SUMMARIZE, PIVOT or EXPLAIN; for changes of your own, take rows out with .to_arrow_table() or --format"
            )
        with self._plain_errors():
            cursor = self._connection.cursor()
            cursor.execute(READ_ONLY)

        def relation() -> duckdb.DuckDBPyRelation:
            try:
                return cursor.sql(query, params=parameters)
            except duckdb.ProgrammingError as error:
                raise _placed(error, cursor, query, parameters) from error

        return Result(self._ask(cursor, relation), partial(self._ask, cursor))

    def tokens(self) -> Result:
        """One row per token, in the order of the corpus within a shard."""
        return self.sql("FROM tokens")

    def documents(self) -> Result:
        """One row per document read."""
        return self.sql("FROM documents")

    def vocabulary(self) -> Result:
        """Statistics of every type that occurs, per layer."""
        return self.sql("FROM vocabulary")

    def words(self) -> Result:
        """One row per word. It sorts by document: beyond some ten million tokens filter by ``doc``."""
        return self.sql("FROM words")

    def thresholds(self) -> Result:
        """The run's quartiles per layer and population."""
        return self.sql("FROM thresholds")

    def shards(self) -> Result:
        """The run's shards in plan order."""
        return self.sql("FROM shards")

    def tables(self) -> dict[str, list[str]]:
        """The columns of each view."""
        return {name: self.sql(f"FROM {name}").columns for name in VIEWS}

    def close(self) -> None:
        """End the session; results taken from it stay readable."""
        self._connection.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _load(self, name: str, table: pa.Table) -> None:
        self._connection.register("incoming", table)
        self._connection.execute(f"CREATE TABLE {name} AS FROM incoming")
        self._connection.unregister("incoming")

    def _create_views(self, files: Mapping[str, Mapping[str, object]], labels: pa.Table) -> None:
        # A token that occurs both as text and as a special token has two rows in the vocabulary, with one text.
        self._connection.execute(
            "CREATE SCHEMA internal; CREATE TABLE internal.types AS "
            "SELECT token_id, any_value(token) AS token, any_value(text) AS text FROM vocabulary GROUP BY token_id"
        )
        tokens, documents = (_read_parquet(files[table]) for table in ("tokens", "documents"))
        offsets = "start" in self._connection.sql(f"FROM {tokens}").columns
        quartiles = {r["layer"]: r for r in labels.to_pylist() if r["population"] == "tokens"}
        layers = self.info["layers"]
        if not all(isinstance(layer, int) and layer in quartiles for layer in layers):
            raise StoreError(f"{self.uri}/run.json is damaged: layers is {layers}, thresholds are of {list(quartiles)}")
        for name, query in (
            ("tokens", tokens_view(tokens, layers, quartiles, offsets)),
            ("documents", documents_view(documents, layers)),
            ("words", words_view(layers, offsets)),
        ):
            self._connection.execute(f"CREATE VIEW {name} AS {query}")
        for name, comment in VIEWS.items():
            kind = "VIEW" if name in ("tokens", "documents", "words") else "TABLE"
            self._connection.execute(f"COMMENT ON {kind} {name} IS '{comment}'")

    def _ask(self, cursor: duckdb.DuckDBPyConnection, call: Callable[[], T]) -> T:
        """What ``call`` returns; what it runs on ``cursor`` ends at the time limit and at Ctrl-C.

        It runs in another thread: DuckDB does not always notice a signal, and its own max_execution_time would
        count the time that the reader of a stream takes.
        """
        with self._plain_errors(), ThreadPoolExecutor(1) as pool:
            future = pool.submit(call)
            try:
                late = not wait([future], self._timeout_s).done
            finally:
                while not wait([future], 0).done:  # more than once: an interrupt before the query begins is lost
                    cursor.interrupt()
                    wait([future], 0.05)
            if (error := future.exception()) is None:
                return future.result()
            cursor.rollback()  # the error ended the transaction, and the result may be asked again
            cursor.execute(READ_ONLY)
            if late:
                raise QueryError(
                    f"stopped after {self._timeout_s:g} s; ask for less, as in WHERE doc < 1000, or give it more time"
                ) from error
            raise error

    @contextmanager
    def _plain_errors(self) -> Iterator[None]:
        try:
            yield
        except (duckdb.Error, OSError, pa.ArrowException) as error:  # Arrow streams have errors of their own
            failed, self._files.failed = self._files.failed, None
            if failed is not None:
                raise failed from error
            raise QueryError(_readable(str(error), self._memory_limit)) from error


def _placed(error: duckdb.Error, cursor: duckdb.DuckDBPyConnection, query: str, parameters: Any) -> duckdb.Error:
    """``error`` with the line and place in ``query``, which DuckDB gives on executing but not to a lazy relation."""
    try:
        cursor.execute(f"EXPLAIN\n{query}", parameters)
    except duckdb.Error as placed:
        if str(placed).startswith(str(error)):
            line = r"(?m)^LINE (\d+)"
            return type(error)(re.sub(line, lambda m: f"LINE {int(m[1]) - 1:>{len(m[1])}}", str(placed)))
    return error


def _readable(message: str, memory_limit: str) -> str:
    if "Out of Memory Error" in message:
        return (
            f"the query needs more memory than its limit of {memory_limit}; ask for less, as in WHERE doc < 1000, "
            "or raise the memory limit"
        )
    if "Permission Error" in message or "read-only mode" in message:
        return f"{message.strip()}\nA query reads the views of its run, and writes nothing"
    if "Traceback (most recent call last)" in message:  # our filesystem's error, told by DuckDB
        return message.strip().rpartition("\n")[2]
    return message.strip()


def _settings(memory_limit: str, threads: int | None) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "memory_limit": memory_limit,
        "temp_directory": "",
        "python_enable_replacements": False,
        "autoinstall_known_extensions": False,
        "autoload_known_extensions": False,
        "allow_community_extensions": False,
        "allow_extension_repositories": "forbidden",
        "allow_persistent_secrets": False,
    }
    return settings if threads is None else settings | {"threads": threads}


# --- a run's files and its row ---------------------------------------------------------------------------


def _table(folder: manifest.RunFolder, name: str, schema: pa.Schema) -> pa.Table:
    try:
        return manifest.read_table(folder, name).select(schema.names).cast(schema)
    except (KeyError, pa.ArrowException) as error:
        raise StoreError(f"{folder.uri}/{name}.parquet is damaged: {error}") from error


def _files(folder: manifest.RunFolder, shards: pa.Table, table: str) -> dict[str, tuple[str, int]]:
    """Name, URI and size of the run's files of ``table``; DuckDB reads doc_offset off the name."""
    files: dict[str, tuple[str, int]] = {}
    size = {"tokens": "token_bytes", "documents": "document_bytes"}[table]
    for shard in shards.to_pylist():
        name = shard[f"{table}_file"]
        if not FILE_NAME.fullmatch(name):
            raise StoreError(f"{folder.uri}/shards.parquet is damaged: {name!r} is not the name of a shard's file")
        files[f"{shard['ordinal']}/doc_offset={shard['doc_offset']}/{table}.parquet"] = (
            storage.join(folder.store, name), shard[size],
        )  # fmt: skip
    if not files:
        raise StoreError(f"{folder.uri}/shards.parquet is damaged: it names no shards")
    return files


def _run_row(folder: manifest.RunFolder) -> pa.Table:
    """run.json as one row: what people look for as columns, the rest as JSON."""
    info = folder.info
    config, measure = info.get("config", {}), info.get("measure", {})
    row = {
        "id": folder.id,
        "uri": folder.uri,
        "model": info.get("model", {}).get("name"),
        "layers": info["layers"],
        "corpus": list(config.get("corpus", ())),
        "created_at": _utc(info.get("created_at")),
        "finished_at": _utc(info.get("finished_at")),
        "seconds": info.get("seconds"),
        **{f"n_{name}": n for name, n in info.get("counts", {}).items()},
        "measure": measure.get("id"),
        "config": json.dumps(config),
        "info": json.dumps(info),
    }
    return pa.Table.from_pylist([row])


def _utc(iso: str | None) -> datetime | None:
    return None if iso is None else datetime.fromisoformat(iso).astimezone(UTC).replace(tzinfo=None)


def _read_parquet(names: Mapping[str, object]) -> str:
    listed = ", ".join(f"'afn://{name}'" for name in names)
    return f"read_parquet([{listed}], hive_partitioning = true, hive_types = {{'doc_offset': BIGINT}})"


# --- the views -------------------------------------------------------------------------------------------
# What goes into their SQL is our own text and numbers: file names are made here, layers are integers.


def _exact(value: float | None, kind: str) -> str:
    # From text the nearest FLOAT is taken, which is the value itself; a bare number would be a DECIMAL first.
    return f"NULL::{kind}" if value is None else f"'{value!r}'::{kind}"


def tokens_view(source: str, layers: Sequence[int], thresholds: Mapping[int, Mapping[str, Any]], offsets: bool) -> str:
    """SQL of the ``tokens`` view; ``thresholds`` by layer, of the population of all tokens."""
    columns = [
        "doc_offset + doc AS doc", "position", "token_id", "token", "text", "surface",
        f"flags & {SPECIAL} <> 0 AS is_special",
        f"flags & {WORD_START} <> 0 AS is_word_start",
        f"flags & {REPLACED} <> 0 AS is_replaced",
        *(("start", '"end"') if offsets else ()),
    ]  # fmt: skip
    for k in layers:
        row = thresholds[k]
        strength = f"strength_{k}"
        q1, q2, q3 = (_exact(row[q], "FLOAT") for q in ("q1", "q2", "q3"))
        sink = None if row["q2"] is None else row["sink_factor"] * row["q2"]
        columns += [
            strength,
            f"CASE WHEN is_special OR {q3} IS NULL THEN NULL WHEN {strength} < {q1} THEN 1 "
            f"WHEN {strength} < {q2} THEN 2 WHEN {strength} < {q3} THEN 3 ELSE 4 END::TINYINT AS quartile_{k}",
            f"CASE WHEN NOT is_special THEN {strength} >= {q3} END AS high_{k}",
            f"CASE WHEN NOT is_special THEN {strength}::DOUBLE > {_exact(sink, 'DOUBLE')} END AS sink_{k}",
        ]
    return f"SELECT {', '.join(columns)} FROM {source} LEFT JOIN internal.types USING (token_id)"  # noqa: S608


def documents_view(source: str, layers: Sequence[int]) -> str:
    """SQL of the ``documents`` view."""
    means = "".join(f", mean_strength_{k}" for k in layers)
    return f"""
        SELECT doc_offset + doc AS doc, coalesce(doc_id, left(lower(hex(text_sha256)), 16)) AS doc_id, source, "offset",
            n_tokens, n_windows, n_chars, n_replaced, lower(hex(text_sha256)) AS text_sha256, status{means}
        FROM {source}"""  # noqa: S608


def words_view(layers: Sequence[int], offsets: bool) -> str:
    """SQL of the ``words`` view, over ``tokens``.

    A word starts at a token with the word-start flag, and at the first token of a document that is not special.
    """
    places = ', min(start) AS start, max("end") AS "end"' if offsets else ""
    strengths = "".join(
        f", max(strength_{k}) AS max_strength_{k}, avg(strength_{k}) AS mean_strength_{k}"
        f", max(strength_{k}) FILTER (is_first) AS first_strength_{k}, bool_or(high_{k}) AS high_{k}"
        for k in layers
    )
    return f"""
        SELECT doc, word, coalesce(max(surface) FILTER (is_first), string_agg(text, '' ORDER BY position)) AS text,
            count(*) AS n_tokens, min(position) AS position{places}{strengths}
        FROM (
            SELECT *, is_word_start OR position = first_value(position) OVER tokens_so_far AS is_first,
                (sum(is_word_start::INTEGER) OVER tokens_so_far
                    - first_value(is_word_start::INTEGER) OVER tokens_so_far)::INTEGER AS word
            FROM tokens WHERE NOT is_special WINDOW tokens_so_far AS (PARTITION BY doc ORDER BY position)
        ) GROUP BY doc, word"""  # noqa: S608
