"""A sandboxed DuckDB session over a run's files, as the query process runs it."""

from __future__ import annotations

import contextlib
import io
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import duckdb
import pyarrow as pa

from afn_ray.query.files import ServedFiles
from afn_ray.query.filling import Filling, decode_tables
from afn_ray.query.intervals import check_intervals
from afn_ray.query.protocol import Answer, AnswerFields, Made, Request, Settings, Setup, Steps

CLOSED: Settings = {
    "temp_directory": "",
    "python_enable_replacements": False,
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
    "allow_community_extensions": False,
    "allow_extension_repositories": "forbidden",
    "allow_persistent_secrets": False,
}
"""DuckDB settings that prevent spilling to disk and the loading of extensions."""


OUT_OF_MEMORY = re.compile(
    r"^(Out of Memory Error|.*bad[_ ]alloc|.*[Ff]ailed to allocate|MemoryError$)"
)
"""Pattern of the out-of-memory errors of DuckDB, Arrow, C++ and Python."""


ALLOWED = (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN, duckdb.StatementType.MULTI)
"""Allowed types of statements.

SELECT includes FROM, WITH, VALUES, DESCRIBE, SHOW and SUMMARIZE. MULTI is PIVOT without an IN list.
"""
READ_ONLY = "BEGIN TRANSACTION READ ONLY"
"""SQL that begins the transaction of every query."""
MAX_RELATIONS = 32
"""Number of relations that stay bound; older ones are bound again on demand."""
MAX_READERS = 256
"""Largest number of results that are read in batches at the same time."""


class Unknown(Exception):
    """The relation is not bound here; the parent must send its steps."""


class Session:
    """A run's views in DuckDB. A query cannot write, and can read only the given files.

    - A query is one statement that reads, in a read-only transaction on its own connection.
    - DuckDB's own filesystem is off. All reads use ``files.ServedFiles``, which has only the run's
      files and cannot write.
    - There is no external access, no extension, no secret, no Python variable and no spilling. The
      configuration is locked.
    """

    def __init__(self, setup: Setup, read: Callable[[str, int, int], bytes]) -> None:
        self._lock = threading.Lock()
        self._asked: tuple[int, duckdb.DuckDBPyConnection] | None = None
        self._relations: OrderedDict[int, tuple[duckdb.DuckDBPyConnection, Any]] = OrderedDict()
        self._readers: OrderedDict[
            int, tuple[duckdb.DuckDBPyConnection, Iterator[pa.RecordBatch]]
        ] = OrderedDict()
        self._number = 0
        settings = {**setup.settings, "arrow_lossless_conversion": True}
        self.connection = duckdb.connect(":memory:", config=settings)
        self.connection.register_filesystem(ServedFiles(setup.sizes, read))
        self._filling = Filling(self.connection, decode_tables(setup.tables), setup.statements)
        for statement in (
            "SET disabled_filesystems = 'LocalFileSystem'",
            # This also permits writing, which ServedFiles refuses.
            "SET allowed_directories = ['afn://']",
            "SET enable_external_access = false",
            "SET lock_configuration = true",
        ):
            self.connection.execute(statement)

    def answer(self, request: Request) -> Answer:
        """Carry out ``request``. Errors are returned in the answer, never raised."""
        for reader in request.forget:
            self._readers.pop(reader, None)
        self._number = request.number
        try:
            answer: Answer = getattr(self, request.do)(*request.arguments)
            return answer
        except Unknown:
            return Answer({"unknown": True})
        # Errors are DuckDB's, Arrow's and Python's own, out of memory too.
        except Exception as error:  # noqa: BLE001
            return Answer(
                {"error": str(error) or type(error).__name__, "kind": type(error).__name__}
            )
        finally:
            with self._lock:
                self._asked = None

    def interrupt(self, number: int) -> None:
        """Interrupt request ``number`` if it is still running."""
        with self._lock:
            if self._asked is not None and self._asked[0] == number:
                self._asked[1].interrupt()

    # Methods that a request can name.

    def bind(self, key: int, steps: Steps) -> Answer:
        """Bind the relation that ``steps`` make; return its columns and types, or its value.

        A relation is not computed. Steps that end in no relation give a value.
        """
        try:
            cursor, made = self._bound(steps)
        except duckdb.CatalogException:
            # The query may name a view in a way that its text does not show, and DuckDB's hint
            # suggests only what exists.
            if not self._create_all():
                raise
            cursor, made = self._bound(steps)
        fields: AnswerFields = {"columns": [], "types": []}
        if isinstance(made, duckdb.DuckDBPyRelation):
            fields = {"columns": made.columns, "types": [str(kind) for kind in made.types]}
        elif not callable(getattr(made, "agg", None)):  # else the result of group_by
            return Answer({"value": made})
        self._relations[key] = cursor, made
        if len(self._relations) > MAX_RELATIONS:
            self._relations.popitem(last=False)
        return Answer(fields)

    def _create_all(self) -> bool:
        """Create whatever is not there yet. False: nothing was missing."""
        cursor = self.connection.cursor()
        with self._at_work(cursor):
            return self._filling.create_all(cursor)

    def _bound(self, steps: Steps) -> tuple[duckdb.DuckDBPyConnection, Any]:
        """The result of ``steps``, and its cursor."""
        cursor = self.connection.cursor()
        with self._at_work(cursor):
            return cursor, self._make(cursor, steps)

    def read(self, key: int, batch_rows: int) -> Answer:
        """The first batch of a relation; the request's number names the reader for ``next``."""
        cursor, relation = self._relation(key)
        with self._at_work(cursor):
            reader = check_intervals(relation).to_arrow_reader(batch_rows)
            batch = next(reader, None)
            # A batch that is not full is nearly always the last one. Reading ahead finds out
            # without another request.
            is_full = batch is not None and batch.num_rows >= batch_rows
            after = None if batch is None or is_full else next(reader, None)
        last = not is_full and after is None
        if not last:
            self._readers[self._number] = cursor, reader if after is None else _chain(after, reader)
            if len(self._readers) > MAX_READERS:
                self._readers.popitem(last=False)
        return Answer({"last": last}, _encoded(reader.schema, batch))

    def next(self, reader: int) -> Answer:
        """The next batch of a reader."""
        if reader not in self._readers:
            raise duckdb.InvalidInputException(
                "this result is no longer there: the process that computed it was stopped, or more "
                f"than {MAX_READERS} results were read at a time; ask again"
            )
        cursor, batches = self._readers[reader]
        try:
            with self._at_work(cursor):
                batch = next(batches, None)
        except Exception:
            del self._readers[reader]
            raise
        if batch is None:
            del self._readers[reader]
            return Answer({"last": True})
        return Answer({"last": False}, _encoded(batch.schema, batch))

    def text(self, key: int, options: Mapping[str, Any] | None) -> Answer:
        """A relation drawn as a table, as ``show`` or, without ``options``, ``repr`` does."""
        cursor, relation = self._relation(key)
        with self._at_work(cursor), contextlib.redirect_stdout(io.StringIO()) as printed:
            if options is None:
                return Answer({"value": repr(relation)})
            relation.show(**options)
        return Answer({"value": printed.getvalue()})

    # Helpers.

    @contextlib.contextmanager
    def _at_work(self, cursor: duckdb.DuckDBPyConnection) -> Iterator[None]:
        """Make ``cursor`` the connection that ``interrupt`` stops."""
        with self._lock:
            self._asked = self._number, cursor
        yield

    def _relation(self, key: int) -> tuple[duckdb.DuckDBPyConnection, duckdb.DuckDBPyRelation]:
        """Remove and return a bound relation and its connection. Raises ``Unknown``.

        Each computation needs its own connection, so a relation is used once.
        """
        try:
            return self._relations.pop(key)
        except KeyError:
            raise Unknown from None

    def _make(self, cursor: duckdb.DuckDBPyConnection, steps: Steps, within: bool = False) -> Any:
        """The result of ``steps`` on ``cursor``; ``within``: a transaction is already open."""
        query, parameters, tables = steps[0]
        statements = cursor.extract_statements(query)
        if len(statements) != 1:
            raise duckdb.ParserException(
                f"expected one SQL statement, got {len(statements)}; ask them one by one"
            )
        if (kind := statements[0].type) not in ALLOWED:
            raise duckdb.PermissionException(
                f"{kind.name} is not allowed: a run is read-only. Ask with SELECT, FROM, WITH, "
                "DESCRIBE, SHOW, "
                "SUMMARIZE, PIVOT or EXPLAIN; for changes of your own, take rows out with "
                ".to_arrow_table() or --format"
            )
        # Before the caller's tables are there, which a view does not read.
        self._filling.create_named(cursor, "\n".join(_texts(steps)))
        for name, table in tables.items():
            cursor.register(name, table)
        if not within:
            cursor.execute(READ_ONLY)
        try:
            made: Any = cursor.sql(query, params=parameters)
        except duckdb.ProgrammingError as error:
            placed = _placed(error, cursor, query, parameters)
            raise type(placed)(f"{placed}{_to_quote(cursor, query)}") from error
        for name, arguments, options in steps[1:]:
            made = getattr(made, name)(
                *(self._argument(cursor, a) for a in arguments),
                **{k: self._argument(cursor, a) for k, a in options.items()},
            )
        return made

    def _argument(self, cursor: duckdb.DuckDBPyConnection, value: Any) -> Any:
        return self._make(cursor, value.steps, within=True) if isinstance(value, Made) else value


def _texts(steps: Steps) -> Iterator[str]:
    """Texts of ``steps`` that may name something: the query, and arguments of each method."""
    yield steps[0][0]
    for _, arguments, options in steps[1:]:
        for value in (*arguments, *options.values()):
            if isinstance(value, Made):
                yield from _texts(value.steps)
            else:
                yield str(value)


def _chain(first: pa.RecordBatch, rest: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    yield first
    yield from rest


def _encoded(schema: pa.Schema, batch: pa.RecordBatch | None) -> pa.Buffer:
    """An Arrow stream of ``schema`` with ``batch``, if there is one."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        if batch is not None:
            writer.write_batch(batch)
    return sink.getvalue()


def _to_quote(cursor: duckdb.DuckDBPyConnection, query: str) -> str:
    """A hint at the columns with hyphens that ``query`` names without quotes, or "".

    ``query`` has failed, which ended the transaction of ``cursor``.
    """
    cursor.rollback()
    listed = cursor.execute(
        "SELECT DISTINCT column_name FROM duckdb_columns() WHERE contains(column_name, '-') "
        "ORDER BY ALL"
    )
    bare = []
    for (name,) in listed.fetchall():
        if re.search(rf"(?i)(?<![\w\"'-]){re.escape(name)}(?![\w\"'-])", query):
            bare.append(f'"{name}"')
    if not bare:
        return ""
    return f"\nA name with hyphens needs double quotes, or SQL subtracts: {', '.join(bare)}"


def _placed(
    error: duckdb.Error, cursor: duckdb.DuckDBPyConnection, query: str, parameters: Any
) -> duckdb.Error:
    """``error`` with the line and column in ``query``.

    DuckDB reports the position when it executes a query, but not for a lazy relation.
    """
    try:
        cursor.execute(f"EXPLAIN\n{query}", parameters)
    except duckdb.Error as placed:
        if str(placed).startswith(str(error)):
            line = r"(?m)^LINE (\d+)"
            return type(error)(
                re.sub(line, lambda m: f"LINE {int(m[1]) - 1:>{len(m[1])}}", str(placed))
            )
    return error
