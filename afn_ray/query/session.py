"""The process that runs SQL: a sandboxed DuckDB session over a run's files.

``sandbox`` starts it. It answers one request at a time and has only sockets: it reads files through
its parent process, opens no file itself, and cannot write. Requests arrive as pickled objects, from
a parent that has full rights anyway. Answers return as JSON and Arrow, which cannot execute code.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import resource
import signal
import socket
import struct
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import duckdb
import pyarrow as pa

from afn_ray.query.files import ServedFiles

ALLOWED = (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN, duckdb.StatementType.MULTI)
"""Allowed types of statements.

SELECT includes FROM, WITH, VALUES, DESCRIBE, SHOW and SUMMARIZE. MULTI is PIVOT without an IN list.
"""

READ_ONLY = "BEGIN TRANSACTION READ ONLY"
"""SQL that begins the transaction of every query."""

CLOSED: dict[str, Any] = {
    "temp_directory": "",
    "python_enable_replacements": False,
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
    "allow_community_extensions": False,
    "allow_extension_repositories": "forbidden",
    "allow_persistent_secrets": False,
}
"""DuckDB settings that prevent spilling to disk and the loading of extensions."""

FRAME = struct.Struct("<IQ")
"""Header of an answer: bytes of its JSON, and bytes of its Arrow stream.

The answer to a read has the same header: bytes of the error, and bytes of the data.
"""
LENGTH = struct.Struct("<Q")
"""Message of the parent to stop a request: the request's number."""
READ = struct.Struct("<IQQ")
"""Header of a read request: bytes of the file's name, start and end of the range."""

MAX_RELATIONS = 32
"""Number of relations that stay bound; older ones are bound again on demand."""
MAX_READERS = 256
"""Largest number of results that are read in batches at the same time."""
MAX_OPEN_FILES = 256
"""Largest number of open file descriptors of the process."""
STACK_BYTES = 8 << 20
"""Stack of the main thread in bytes: a too deeply nested expression ends only the process."""
CPU_SPARE_S = 10
"""CPU time in seconds beyond the time limit, after which the kernel ends the process.

It matters for a process that hangs and whose parent is gone.
"""

OUT_OF_MEMORY = re.compile(
    r"^(Out of Memory Error|.*bad[_ ]alloc|.*[Ff]ailed to allocate|MemoryError$)"
)
"""Pattern of the out-of-memory errors of DuckDB, Arrow, C++ and Python."""

Steps = tuple[tuple[Any, ...], ...]
"""Steps that make a relation.

The first is (query, parameters, tables). Each other step is a method call: (name, arguments,
options).
"""


@dataclass(frozen=True)
class Setup:
    """Content and limits of a session."""

    settings: Mapping[str, Any]
    """DuckDB settings."""
    tables: Mapping[str, pa.Table]
    """Small tables of the run, by name."""
    statements: Sequence[str]
    """SQL that makes the views and macros, executed in order after the tables exist."""
    sizes: Mapping[str, int]
    """Sizes in bytes of the files that may be read, by name."""
    memory_bytes: int
    """Memory in bytes that the process may allocate beyond what it has before DuckDB starts."""
    timeout_s: float
    """Time limit of a query, in seconds."""


@dataclass(frozen=True)
class Request:
    """One call of a ``Session`` method."""

    number: int
    do: str  # name of a method of Session
    arguments: tuple[Any, ...] = ()
    forget: tuple[int, ...] = ()
    """Numbers of readers to release first."""


@dataclass(frozen=True)
class Made:
    """A relation that is an argument of another relation's method."""

    steps: Steps


@dataclass
class Answer:
    """The answer to a request: JSON fields, and an Arrow stream or nothing."""

    fields: dict[str, Any] = field(default_factory=dict)
    arrow: bytes | pa.Buffer = b""


class Unknown(Exception):
    """The relation is not bound here; the parent must send its steps."""


# --- sockets ---


def receive(connection: socket.socket, num_bytes: int) -> bytearray:
    """Receive the next ``num_bytes``. Raises ``EOFError`` if the other side is gone."""
    data = bytearray(num_bytes)
    view = memoryview(data)
    while view:
        if (got := connection.recv_into(view)) == 0:
            raise EOFError
        view = view[got:]
    return data


class _Reads:
    """Reads files through the parent process, over one connection for each reading thread."""

    def __init__(self, connections: socket.socket) -> None:
        """``connections`` is the socket that sends the other end of each connection."""
        self._connections, self._lock, self._local = (
            connections,
            threading.Lock(),
            threading.local(),
        )

    def __call__(self, name: str, start: int, end: int) -> bytes:
        if not hasattr(self._local, "connection"):
            here, there = socket.socketpair()
            with self._lock, there:
                socket.send_fds(self._connections, [b"."], [there.fileno()])
            self._local.connection = here
        connection, encoded = self._local.connection, name.encode()
        connection.sendall(READ.pack(len(encoded), start, end) + encoded)
        text_bytes, num_bytes = FRAME.unpack(receive(connection, FRAME.size))
        if text_bytes:
            raise OSError(receive(connection, text_bytes).decode())
        return bytes(receive(connection, num_bytes))


# --- the session ---


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
        self.connection = duckdb.connect(
            ":memory:", config={**setup.settings, "arrow_lossless_conversion": True}
        )
        self.connection.register_filesystem(ServedFiles(setup.sizes, read))
        fill(self.connection, setup.tables, setup.statements)
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
        except Exception as error:  # noqa: BLE001 - DuckDB's, Arrow's and Python's own, out of memory too
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
        cursor = self.connection.cursor()
        with self._at_work(cursor):
            made = self._make(cursor, steps)
        if isinstance(made, duckdb.DuckDBPyRelation):
            fields = {"columns": made.columns, "types": [str(kind) for kind in made.types]}
        elif callable(getattr(made, "agg", None)):  # the result of group_by
            fields = {"columns": [], "types": []}
        else:
            return Answer({"value": made})
        self._relations[key] = cursor, made
        if len(self._relations) > MAX_RELATIONS:
            self._relations.popitem(last=False)
        return Answer(fields)

    def read(self, key: int, batch_rows: int) -> Answer:
        """The first batch of a relation; the request's number names the reader for ``next``."""
        cursor, relation = self._relation(key)
        with self._at_work(cursor):
            reader = _within_arrow(relation).to_arrow_reader(batch_rows)
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
                "than "
                f"{MAX_READERS} results were read at a time; ask again"
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
        for name, table in tables.items():
            cursor.register(name, table)
        if not within:
            cursor.execute(READ_ONLY)
        try:
            made: Any = cursor.sql(query, params=parameters)
        except duckdb.ProgrammingError as error:
            raise _placed(error, cursor, query, parameters) from error
        for name, arguments, options in steps[1:]:
            made = getattr(made, name)(
                *(self._argument(cursor, a) for a in arguments),
                **{k: self._argument(cursor, a) for k, a in options.items()},
            )
        return made

    def _argument(self, cursor: duckdb.DuckDBPyConnection, value: Any) -> Any:
        return self._make(cursor, value.steps, within=True) if isinstance(value, Made) else value


def fill(
    connection: duckdb.DuckDBPyConnection, tables: Mapping[str, pa.Table], statements: Sequence[str]
) -> None:
    """Create a run's tables in ``connection``, then execute ``statements`` over them."""
    connection.execute("CREATE SCHEMA internal")
    for name, table in tables.items():
        connection.register("incoming", table)
        connection.execute(f"CREATE TABLE {name} AS FROM incoming")
        connection.unregister("incoming")
    for statement in statements:
        connection.execute(statement)


FARTHEST_INTERVAL_H = 2_562_047
"""Smallest number of hours in an INTERVAL, beside months and days, that Arrow cannot hold.

Arrow has 64 bits for nanoseconds.
"""


def _within_arrow(relation: duckdb.DuckDBPyRelation) -> duckdb.DuckDBPyRelation:
    """``relation`` with a check that raises an error for an INTERVAL that Arrow cannot hold.

    Without the check DuckDB would return a wrong value.
    """
    checks = [_beyond_arrow(f"#{at}", kind) for at, kind in enumerate(relation.types, 1)]
    if not any(checks):
        return relation
    columns = []
    for at, (name, check) in enumerate(zip(relation.columns, checks, strict=True), 1):
        quoted = name.replace('"', '""')
        value = (
            f"CASE WHEN {check} THEN error('{BEYOND_ARROW}') ELSE #{at} END" if check else f"#{at}"
        )
        columns.append(f'{value} AS "{quoted}"')
    return relation.project(", ".join(columns))


BEYOND_ARROW = (
    "an INTERVAL of 292 years or more, counted in hours, is beyond what Arrow can hold; cast it "
    "::VARCHAR"
)


def _beyond_arrow(value: str, kind: Any, depth: int = 0) -> str:
    """SQL that is true if ``value`` of type ``kind`` holds an INTERVAL beyond Arrow's range.

    It is empty if the type cannot hold an INTERVAL.
    """
    if kind.id == "interval":
        return f"abs(datepart('hour', {value})) >= {FARTHEST_INTERVAL_H}"
    found: list[str] = []
    if kind.id in ("list", "array", "map"):
        lists = {"key": f"map_keys({value})", "value": f"map_values({value})", "child": value}
        for name, inner in kind.children:
            if name in lists and (check := _beyond_arrow(f"x{depth}", inner, depth + 1)):
                found.append(f"len(list_filter({lists[name]}, lambda x{depth}: {check})) > 0")
    elif kind.id in ("struct", "tuple", "union"):
        function = "union_extract" if kind.id == "union" else "struct_extract"
        for at, (name, inner) in enumerate(kind.children, 1):
            key = str(at) if kind.id == "tuple" else "'" + name.replace("'", "''") + "'"
            found.append(_beyond_arrow(f"{function}({value}, {key})", inner, depth))
    return " OR ".join(f"coalesce({check}, false)" for check in found if check)


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


# --- the process ---


def main(requests_fd: int, stops_fd: int, files_fd: int) -> None:
    """Answer requests until the parent process is gone."""
    requests, stops, files = (socket.socket(fileno=fd) for fd in (requests_fd, stops_fd, files_fd))
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_NOFILE, MAX_OPEN_FILES)
    _limit(resource.RLIMIT_STACK, STACK_BYTES)
    try:
        receiver = Connection(os.dup(requests_fd), writable=False)
        setup: Setup = receiver.recv()
        _limit(resource.RLIMIT_DATA, _data_bytes() + setup.memory_bytes)
        try:
            session = Session(setup, _Reads(files))
        except Exception as error:  # noqa: BLE001 - told by the other process
            return _send(requests, Answer({"error": str(error), "kind": type(error).__name__}))
        threading.Thread(target=_listen, args=(stops, session), daemon=True).start()
        _send(requests, Answer({"ready": True}))
        while True:
            request: Request = receiver.recv()
            _limit_cpu(setup.timeout_s)
            _send(requests, session.answer(request))
    except (EOFError, OSError):
        return None


def _listen(stops: socket.socket, session: Session) -> None:
    """Interrupt requests on the parent's demand; exit when the parent is gone."""
    try:
        while True:
            session.interrupt(*LENGTH.unpack(receive(stops, LENGTH.size)))
    except (EOFError, OSError):
        os._exit(0)


def _send(connection: socket.socket, answer: Answer) -> None:
    text = json.dumps(answer.fields, default=str).encode()
    connection.sendall(FRAME.pack(len(text), len(answer.arrow)) + text)
    connection.sendall(answer.arrow)


def _limit(what: int, value: int) -> None:
    """Lower a resource limit of this process for good, if the system supports it."""
    with contextlib.suppress(OSError, ValueError):
        _, most = resource.getrlimit(what)
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(what, (value, value))


def _limit_cpu(timeout_s: float) -> None:
    """Limit the CPU time of the next request.

    So the kernel ends a process that hangs and whose parent is gone, even if no Python thread runs.
    """
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = used.ru_utime + used.ru_stime + timeout_s * (os.cpu_count() or 1) + CPU_SPARE_S
    with contextlib.suppress(OSError, ValueError):
        _, most = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(
            resource.RLIMIT_CPU, (int(seconds) if most == -1 else min(int(seconds), most), most)
        )


def _data_bytes() -> int:
    """Private writable memory of this process in bytes, as RLIMIT_DATA counts it.

    It is 0 if the system does not report it.
    """
    with contextlib.suppress(OSError), open("/proc/self/statm") as statm:  # noqa: PTH123 - without pathlib
        return int(statm.read().split()[5]) * resource.getpagesize()
    return 0


if sys.platform != "win32":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
