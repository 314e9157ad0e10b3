"""The only door to DuckDB: a run's tables as SQL views, read-only and sandboxed."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import duckdb
import pyarrow as pa

from afn_ray import cgroup, manifest, storage
from afn_ray.compare import compare
from afn_ray.config import SIGNAL
from afn_ray.errors import ConfigError, QueryError, StoreError
from afn_ray.schema import (
    CLASS_DRIFT_SCHEMA,
    DRIFT_SCHEMA,
    HISTOGRAM_SCHEMA,
    MOVERS_SCHEMA,
    NEURON_TYPES_SCHEMA,
    NEURONS_SCHEMA,
    SCREENED_SCHEMA,
    SHARDS_SCHEMA,
    SIGNAL_VOCABULARY_SCHEMA,
    SIGNALS_SCHEMA,
    SOURCES_SCHEMA,
    THRESHOLDS_SCHEMA,
    VOCABULARY_SCHEMA,
    Series,
)
from afn_ray.views import DERIVED, VIEWS, File, NeuronFiles, statements

T = TypeVar("T")

ALLOWED = (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN, duckdb.StatementType.MULTI)
"""SELECT is also FROM, WITH, VALUES, DESCRIBE, SHOW and SUMMARIZE; MULTI is PIVOT without an IN list."""

READ_ONLY = "BEGIN TRANSACTION READ ONLY"

FILE_NAME = re.compile(r"shards(/\w[\w.-]*){3}\.parquet", re.ASCII)
RUN_FILE_NAME = re.compile(r"runs(/\w[\w.-]*){2}\.parquet", re.ASCII)
"""A store names its folders and files as it likes, and all of these stand in SQL."""

MAX_TIMEOUT_S = 1_000_000
CLOSE_S = 5.0
"""For calls of other threads to end."""


def open_run(
    uri: str, *, baseline: str | None = None, memory_limit: str = "2GB", threads: int | None = None,
    timeout_s: float = 60.0,
) -> Run:  # fmt: skip
    """The run at ``uri`` (a run's URI, or a store's for its latest complete run), ready to be asked in SQL.

    ``baseline``, another run's URI or a store's, fills the views ``movers``, ``drift`` and ``class_drift``, in which
    ``_a`` is the baseline and ``_b`` this run; without one they are empty. ``memory_limit`` is DuckDB's, ``threads``
    None is one per core, ``timeout_s`` holds for each query. Opening reads the run's small tables and a Parquet footer
    of each part that ``words`` is read in, 16 at most. Raises ``StoreError`` when there is no such run or it is
    damaged, ``QueryError`` for a limit that DuckDB does not accept, ``ConfigError`` for a baseline of another measure.
    """
    against = None if baseline is None else manifest.find_run(baseline)
    return Run(manifest.find_run(uri), against, memory_limit=memory_limit, threads=threads, timeout_s=timeout_s)


def write_catalog(uri: str, path: Path, *, baseline: str | None = None) -> None:
    """Write the views and macros of ``open_run`` into ``path``, a DuckDB file that any client of DuckDB opens.

    It holds the run's small tables, and reads tokens and documents where the store is now; where it has moved,
    ``SET VARIABLE afn_store = '/its/new/place'`` says so. A store that is not local needs DuckDB's httpfs. The file is
    whole or not there. Raises ``ConfigError`` when ``path`` exists or cannot be written, and what ``open_run`` raises.
    """
    if os.path.lexists(path):
        raise ConfigError(f"{path} exists and stays as it is; name another file, or remove it")
    folder = manifest.find_run(uri)
    tables = _tables(folder, None if baseline is None else manifest.find_run(baseline))
    files = _files(folder, tables["shards"])
    place = folder.store.rstrip("/").replace("'", "''")
    unfinished = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        # The format of DuckDB 1.0: by default the file has one that only the newest clients open.
        with duckdb.connect(unfinished, config={"storage_compatibility_version": "v1.0.0"}) as connection:
            connection.execute(f"CREATE MACRO store() AS coalesce(getvariable('afn_store'), '{place}') || '/'")
            _create(connection, folder, tables, files, "store() || ")
            for view in DERIVED:
                hint = "where the store has moved: SET VARIABLE afn_store = ''/its/new/place''"
                connection.execute(f"COMMENT ON VIEW {view} IS '{VIEWS[view]}; {hint}'")
        os.link(unfinished, path)  # appears whole, and replaces nothing
    except FileExistsError as error:
        raise ConfigError(f"{path} exists and stays as it is; name another file, or remove it") from error
    except (duckdb.Error, OSError) as error:
        raise ConfigError(f"{path} cannot be written: {_readable(str(error), 'DuckDB')}") from error
    finally:
        for left in (unfinished, unfinished.with_name(f"{unfinished.name}.wal")):
            left.unlink(missing_ok=True)


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
    """A complete run as SQL views and macros, those of ``views``.

    A query cannot write, and cannot read anything but this run's own files:

    - one statement, and only one that reads, in a read-only transaction on a connection of its own;
    - DuckDB's own filesystem is off; what it reads comes through ``storage.ReadOnlyFiles``, which has nothing but
      the run's tokens and documents files and no way to write;
    - no external access, no extensions, no secrets, no Python variables, no spilling, and a locked configuration.
    """

    def __init__(
        self, folder: manifest.RunFolder, baseline: manifest.RunFolder | None, *, memory_limit: str,
        threads: int | None, timeout_s: float,
    ) -> None:  # fmt: skip
        if not 0 < timeout_s <= MAX_TIMEOUT_S:
            raise QueryError(f"the time limit is {timeout_s} s; expected more than 0 and at most {MAX_TIMEOUT_S}")
        self.uri, self.id, self.info = folder.uri, folder.id, folder.info
        self._memory_limit, self._timeout_s = memory_limit, timeout_s
        tables = _tables(folder, baseline)
        files = _files(folder, tables["shards"])
        named = {f.name: (f.uri, f.size) for of_table in files.values() for f in of_table}
        self._files = storage.ReadOnlyFiles(folder.store, named, partial(manifest.find_blocks, folder))
        with self._plain_errors():
            self._connection = duckdb.connect(":memory:", config=_settings(memory_limit, threads))
            self._connection.register_filesystem(self._files)
            _create(self._connection, folder, tables, files, AFN)
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
        """One row per word, in the order of the corpus within a shard."""
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
        until = time.monotonic() + CLOSE_S
        while True:
            try:
                return self._connection.close()
            except duckdb.Error:  # another thread is in a call: DuckDB refuses instead of waiting
                if time.monotonic() > until:
                    raise
                time.sleep(0.01)

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

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
    return settings | {"threads": cgroup.num_cores() if threads is None else threads}


# --- a run's tables, files and row -----------------------------------------------------------------------

SMALL = {
    "vocabulary": VOCABULARY_SCHEMA, "thresholds": THRESHOLDS_SCHEMA, "shards": SHARDS_SCHEMA,
    "histogram": HISTOGRAM_SCHEMA, "sources": SOURCES_SCHEMA, "screened": SCREENED_SCHEMA,
    "signals": SIGNALS_SCHEMA, "signal_vocabulary": SIGNAL_VOCABULARY_SCHEMA, "neurons": NEURONS_SCHEMA,
}  # fmt: skip
MAY_LACK = ("histogram", "sources", "screened", "signals", "signal_vocabulary", "neurons")
"""A run made before there was such a table, or without asking for it, has an empty one."""


def _tables(folder: manifest.RunFolder, baseline: manifest.RunFolder | None) -> dict[str, pa.Table]:
    """All small tables by the names of their views."""
    tables = {
        name: schema.empty_table() if name in MAY_LACK and name not in folder.info["tables"]
        else _table(folder, name, schema)
        for name, schema in SMALL.items()
    }  # fmt: skip
    tables["sources"] = tables["sources"].drop_columns(["bins", "counts"])  # of many sources too much for DuckDB
    tables["labels"] = _table(folder, manifest.labels_name(folder), THRESHOLDS_SCHEMA)
    tables["run"] = _run_row(folder)
    found = None if baseline is None else compare(baseline, folder)
    tables["movers"] = MOVERS_SCHEMA.empty_table() if found is None else found.movers
    tables["drift"] = DRIFT_SCHEMA.empty_table() if found is None else found.drift
    tables["class_drift"] = CLASS_DRIFT_SCHEMA.empty_table() if found is None else found.classes
    return tables


def _create(
    connection: duckdb.DuckDBPyConnection, folder: manifest.RunFolder, tables: Mapping[str, pa.Table],
    files: Mapping[str, Sequence[_File]], before: str,
) -> None:  # fmt: skip
    """Make the run's tables, views and macros in ``connection``; ``before`` is SQL before the name of a file."""
    quartiles = {r["layer"]: r for r in tables["labels"].to_pylist() if r["population"] == "tokens"}
    layers = folder.info["layers"]
    if not all(isinstance(layer, int) and layer in quartiles for layer in layers):
        raise StoreError(f"{folder.uri}/run.json is damaged: layers is {layers}, thresholds are of {list(quartiles)}")
    others = [Series(r["signal"], r["layer"]) for r in tables["signals"].to_pylist()]
    if wrong := [s.name for s in others if not SIGNAL.fullmatch(s.signal)]:
        raise StoreError(f"{folder.uri}/signals.parquet is damaged: {wrong[0]!r} is no signal")
    for name, table in tables.items():
        connection.register("incoming", table)
        connection.execute(f"CREATE TABLE {name} AS FROM incoming")
        connection.unregister("incoming")
    paths = {table: _paths(of_table, before) for table, of_table in files.items()}
    columns = _columns(connection, paths["tokens"][0].path)
    neurons = None
    if "neurons" in paths:
        found = [re.fullmatch(r"neurons_(\d+)", c) for c in _columns(connection, paths["neurons"][0].path)]
        neurons = NeuronFiles([int(m[1]) for m in found if m], paths["neurons"], paths["neuron_types"][0].path)
    connection.execute("CREATE SCHEMA internal")
    connection.register("incoming", NEURON_TYPES_SCHEMA.empty_table())
    connection.execute("CREATE TABLE internal.no_neuron_types AS FROM incoming")
    connection.unregister("incoming")
    for statement in statements(
        paths["tokens"], paths["documents"], layers, quartiles, others, neurons, "start" in columns, "tag" in columns
    ):
        connection.execute(statement)


def _columns(connection: duckdb.DuckDBPyConnection, path: str) -> list[str]:
    return connection.sql(f"FROM read_parquet([{path}])").columns


def _table(folder: manifest.RunFolder, name: str, schema: pa.Schema) -> pa.Table:
    try:
        return manifest.read_table(folder, name).select(schema.names).cast(schema)
    except (KeyError, pa.ArrowException) as error:
        raise StoreError(f"{folder.uri}/{name}.parquet is damaged: {error}") from error


class _File(NamedTuple):
    """One shard's file of a table, or a file of the run's own."""

    name: str  # below the store
    uri: str
    size: int  # bytes
    shard: Mapping[str, Any]  # its row of ``shards``


AFN = "'afn://' || "
"""Before a file's name: a run's own files, through ``storage.ReadOnlyFiles``."""


def _files(folder: manifest.RunFolder, shards: pa.Table) -> dict[str, list[_File]]:
    """The files that the views read, by table, in the order of the run's shards."""
    files: dict[str, list[_File]] = {"tokens": [], "documents": [], "neurons": []}
    for shard in shards.to_pylist():
        for table, of_table in files.items():
            name = shard[f"{table}_file"]
            if name is None and table == "neurons":
                continue
            if not FILE_NAME.fullmatch(name or ""):
                raise StoreError(f"{folder.uri}/shards.parquet is damaged: {name!r} is not the name of a shard's file")
            of_table.append(_File(name, storage.join(folder.store, name), shard[SIZES[table]], shard))
    if not files["tokens"] or len(files["neurons"]) not in (0, len(files["tokens"])):
        raise StoreError(f"{folder.uri}/shards.parquet is damaged: it does not name its shards' files")
    if not files["neurons"]:
        return {name: of_table for name, of_table in files.items() if of_table}
    entry = folder.info["tables"].get("neuron_types", {})
    path = f"runs/{folder.id}/{entry.get('name')}"
    if not RUN_FILE_NAME.fullmatch(path):
        raise StoreError(f"{folder.uri}/run.json is damaged: {path!r} is not the name of a run's table")
    return files | {"neuron_types": [_File(path, storage.join(folder.store, path), entry["bytes"], NO_SHARD)]}


SIZES = {"tokens": "token_bytes", "documents": "document_bytes", "neurons": "neurons_bytes"}
NO_SHARD = {"doc_offset": 0, "n_documents": 0, "n_tokens": 0}


def _paths(files: Sequence[_File], before: str) -> list[File]:
    """``files`` as the views read them; ``before`` is SQL. Names have neither quotes nor spaces (``FILE_NAME``,
    ``RUN_FILE_NAME``)."""
    return [
        File(f"{before}'{f.name}'", f.shard["doc_offset"], f.shard["n_documents"], f.shard["n_tokens"]) for f in files
    ]


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
