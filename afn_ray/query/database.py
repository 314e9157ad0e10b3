"""Query a run's tables as SQL views in a separate process; write a catalog for other clients."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any

import duckdb
import pyarrow as pa

from afn_ray import cgroup
from afn_ray.errors import QueryError
from afn_ray.query import sandbox, session
from afn_ray.query.contents import AFN, shard_files, small_tables, view_statements
from afn_ray.query.files import ReadOnlyFiles
from afn_ray.query.protocol import Answer, Made, Setup, Steps
from afn_ray.query.sandbox import Allowance
from afn_ray.query.views import VIEWS
from afn_ray.store import checksums, manifest
from afn_ray.text import printable

MAX_TIMEOUT_S = 1_000_000
"""Largest time limit of a query, in seconds."""
MAX_THREADS = 1024
"""Largest number of DuckDB's threads."""


def open_run(
    uri: str,
    *,
    baseline: str | None = None,
    memory_limit: str = "2GB",
    threads: int | None = None,
    timeout_s: float = 60.0,
) -> Run:
    """Open the run at ``uri`` for queries in SQL.

    ``uri`` is a run's URI, or a store's URI for its latest complete run. ``baseline``, given in the
    same way, fills the views ``movers``, ``drift`` and ``class_drift``, in which ``_a`` is the
    baseline and ``_b`` this run; without it they are empty. ``memory_limit`` is DuckDB's limit.
    ``threads`` is DuckDB's number of threads, one per core by default. ``timeout_s`` is the limit
    of each query in seconds. Opening reads the run's small tables, and one Parquet footer for each
    part of ``words``, at most 16.

    Raises ``StoreError`` if the run does not exist or is damaged, ``QueryError`` for a limit that
    is not valid, and ``ConfigError`` for a baseline of another measure.
    """
    against = None if baseline is None else manifest.find_run(baseline)
    return Run(
        manifest.find_run(uri),
        against,
        memory_limit=memory_limit,
        threads=threads,
        timeout_s=timeout_s,
    )


KEYS = itertools.count()
"""Keys of relations, unique in this process and each process forked from it."""

BATCH_ROWS = 1 << 17
"""Rows of an Arrow batch by default."""


class Result:
    """The rows of one query, computed anew by each method that returns them.

    It has every method of ``duckdb.DuckDBPyRelation`` that takes no Python function (``fetchall``,
    ``df``, ``pl``, ``to_arrow_table``, ``filter``, ``limit``, ``aggregate``, ...). Methods that
    return a relation there return a ``Result`` here. The run's query process computes the rows and
    sends them as Arrow.

    Errors are raised as ``QueryError``. Each call has the run's time limit; the first call has what
    the preparation of the query left of it. The size of the rows that a call returns at once is
    bounded by the memory limit. ``to_arrow_reader`` has no such bound: it reads one batch at a
    time.
    """

    __slots__ = ("_first", "_key", "_made", "_run", "_steps")

    def __init__(self, run: Run, steps: Steps) -> None:
        """Bind ``steps`` in the query process. Raises ``QueryError`` for SQL that is wrong."""
        self._run, self._steps, self._key = run, steps, next(KEYS)
        self._first: Allowance | None = run._allowance()
        self._made = self._bind(self._first)

    @property
    def columns(self) -> list[str]:
        """Column names."""
        return list(self._made["columns"])

    @property
    def types(self) -> list[str]:
        """SQL types of the columns, as text."""
        return list(self._made["types"])

    dtypes = types

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of rows and columns; a query counts the rows."""
        ((rows,),) = self.aggregate("count(*)").fetchall()
        return rows, len(self.columns)

    def to_arrow_reader(self, batch_size: int = BATCH_ROWS) -> pa.RecordBatchReader:
        """The rows as a stream of Arrow batches.

        The time limit applies to the computation of each batch, not to the time between reads.
        """
        schema, batches = self._batches(batch_size)
        if _has_duckdb_types(schema):  # convert DuckDB's own types to the nearest Arrow types
            schema = self._run._local(schema.empty_table()).to_arrow_table().schema
            batches = (
                b
                for t in batches
                for b in self._run._local(pa.table(t)).to_arrow_table().to_batches()
            )
        return pa.RecordBatchReader.from_batches(schema, batches)

    arrow = to_arrow_reader

    def to_arrow_table(self, batch_size: int = BATCH_ROWS) -> pa.Table:
        """All rows as one Arrow table."""
        table = self._all_rows(batch_size)
        return (
            self._run._local(table).to_arrow_table() if _has_duckdb_types(table.schema) else table
        )

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object:
        return self.to_arrow_reader().__arrow_c_stream__(requested_schema)

    def show(self, **options: Any) -> None:
        """Print the first rows as a table, as ``duckdb.DuckDBPyRelation.show`` does."""
        print(self._text(options), end="")

    def __repr__(self) -> str:
        return self._text(None)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name in OF_ROWS:
            return partial(self._of_rows, name)
        if isinstance(getattr(duckdb.DuckDBPyRelation, name, None), property):
            return self._step("__getattribute__", name)
        return partial(self._step, name)

    def _of_rows(self, name: str, *arguments: Any, **options: Any) -> Any:
        """Call the relation's method ``name`` on all rows, in this process."""
        table = self._all_rows(BATCH_ROWS)
        # Plain types need no query in this process to give the same values.
        if name == "fetchall" and set(self.types) <= PLAIN_TYPES:
            return list(zip(*(column.to_pylist() for column in table.columns), strict=True))
        with self._run._plain_errors():
            return getattr(self._run._local(table, self.types), name)(*arguments, **options)

    def _step(self, name: str, *arguments: Any, **options: Any) -> Any:
        """Call the relation's method ``name`` in the query process.

        Returns a ``Result`` for a relation, otherwise the value.
        """
        step = (name, tuple(map(_sent, arguments)), {k: _sent(v) for k, v in options.items()})
        made = Result(self._run, (*self._steps, step))
        return made._made.get("value", made)

    def _allowance(self) -> Allowance:
        """Time of one call; the first call has what the preparation of the query left."""
        allowance, self._first = self._first or self._run._allowance(), None
        return allowance

    def _bind(self, allowance: Allowance) -> dict[str, Any]:
        return self._run._process.ask(allowance, "bind", self._key, self._steps)[1].fields

    def _ask(self, allowance: Allowance, do: str, argument: Any) -> tuple[int, Answer]:
        number, answer = self._run._process.ask(allowance, do, self._key, argument)
        if "unknown" in answer.fields:  # the process used or dropped this relation: bind it again
            self._bind(allowance)
            number, answer = self._run._process.ask(allowance, do, self._key, argument)
        return number, answer

    def _text(self, options: dict[str, Any] | None) -> str:
        _, answer = self._ask(self._allowance(), "text", options)
        return printable(answer.fields["value"], keep="\n")

    def _batches(
        self, batch_rows: int, allowance: Allowance | None = None
    ) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
        """Schema and batches of the rows, with DuckDB's own types kept.

        All batches share ``allowance`` if it is given; otherwise each has the run's time limit.
        """
        reader, answer = self._ask(allowance or self._allowance(), "read", batch_rows)
        with self._run._plain_errors():
            first = pa.ipc.open_stream(answer.arrow).read_all()

        def batches() -> Iterator[pa.RecordBatch]:
            last = answer.fields["last"]
            try:
                yield from first.to_batches()
                while not last:
                    _, more = self._run._process.ask(
                        allowance or self._run._allowance(), "next", reader
                    )
                    last = more.fields["last"]
                    if more.arrow:
                        yield from pa.ipc.open_stream(more.arrow)
            finally:
                if not last:
                    self._run._process.forget(reader)

        return first.schema, batches()

    def _all_rows(self, batch_rows: int) -> pa.Table:
        """All rows. Raises ``QueryError`` if they are larger than the memory limit."""
        schema, batches = self._batches(batch_rows, self._allowance())
        taken, num_bytes = [], 0
        for batch in batches:
            taken.append(batch)
            num_bytes += batch.nbytes
            if num_bytes > self._run._limits.memory_bytes:
                raise QueryError(
                    f"the result is larger than the memory limit of {self._run._limits.memory}: "
                    "ask for less, take it "
                    "a batch at a time with .to_arrow_reader(), write it with afn sql --out, or "
                    "raise the limit"
                )
        return pa.Table.from_batches(taken, schema)


EMPTY_BY_DESIGN = (
    "signals", "signal_vocabulary", "token_neurons", "neurons", "neuron_types", "sources", "screened", "movers",
    "drift", "class_drift",
)  # fmt: skip
"""Views that may be empty; their descriptions say when."""

PLAIN_TYPES = frozenset(
    {"BOOLEAN", "TINYINT", "SMALLINT", "INTEGER", "BIGINT", "FLOAT", "DOUBLE", "VARCHAR"}
)
"""SQL types whose Python values are the same from Arrow as from DuckDB."""

OF_ROWS = frozenset({
    "fetchall", "df", "to_df", "fetchdf", "pl", "fetchnumpy", "to_dicts", "iter_rows", "torch", "tf",
    "fetch_arrow_table", "fetch_record_batch", "fetch_arrow_reader",
})  # fmt: skip
"""Methods of a relation that return rows; the others return a relation or a value."""


def _has_duckdb_types(schema: pa.Schema) -> bool:
    """Whether ``schema`` has a type of DuckDB's own, which Arrow has as an extension type."""
    return "extension<" in str(schema.types)


def _sent(value: Any) -> Any:
    """``value``, an argument of a method, in the form in which it is sent.

    Raises ``QueryError`` for a Python function.
    """
    if isinstance(value, Result):
        return Made(value._steps)
    if isinstance(value, duckdb.Expression):
        return str(value)
    if callable(value):
        raise QueryError(
            "a Python function cannot be called there; take the rows out, as with .df(), and call "
            "it here"
        )
    return value


class Run:
    """A complete run as SQL views and macros, defined in ``views``.

    Queries run in a separate process (``sandbox``). It cannot write, and it can read only this
    run's own files (``session``). A query over its limits is interrupted. If that does not help,
    the process is killed, and the next query starts a new one.
    """

    def __init__(
        self,
        folder: manifest.RunFolder,
        baseline: manifest.RunFolder | None,
        *,
        memory_limit: str,
        threads: int | None,
        timeout_s: float,
    ) -> None:
        if not 0 < timeout_s <= MAX_TIMEOUT_S:
            raise QueryError(
                f"the time limit is {timeout_s} s; expected more than 0 and at most {MAX_TIMEOUT_S}"
            )
        if threads is not None and not 0 < threads <= MAX_THREADS:
            raise QueryError(
                f"threads is {threads}; expected 1 to {MAX_THREADS}, or None for one per core"
            )
        self._limits = sandbox.Limits(
            memory_limit,
            sandbox.memory_bytes(memory_limit),
            threads or cgroup.num_cores(),
            timeout_s,
        )
        self.uri, self.id, self.info = folder.uri, folder.id, folder.info
        self._here: duckdb.DuckDBPyConnection | None = None
        with checksums.named_damage(folder.uri):
            tables = small_tables(folder, baseline)
            files = shard_files(folder, tables["shards"])
            named = {f.name: (f.uri, f.size) for of_table in files.values() for f in of_table}
            self._files = ReadOnlyFiles(folder.store, named, partial(manifest.find_blocks, folder))
            made = view_statements(folder, tables, files, AFN, self._files)
        setup = Setup(
            duckdb_settings(self._limits),
            tables,
            made,
            {name: size for name, (_, size) in named.items()},
            self._limits.process_bytes,
            timeout_s,
        )
        self._process = sandbox.Process(self._files, setup, self._limits)

    def _allowance(self) -> Allowance:
        return Allowance(self._limits.timeout_s)

    def sql(
        self, query: str, parameters: Sequence[Any] | Mapping[str, Any] | None = None, **tables: Any
    ) -> Result:
        """The result of one statement that reads; the result's methods compute it.

        ``parameters`` are for ``?`` or ``$1`` (a sequence) or ``$name`` (a mapping). ``tables`` are
        your own tables, from pandas, polars or Arrow, by the names that the query uses, as in
        ``run.sql("FROM words JOIN meta USING (doc)", meta=frame)``. Raises ``QueryError`` for SQL
        that is wrong or forbidden. The result's methods raise it for a query over its limits.
        """
        if not query.isascii() and any("\ud800" <= c <= "\udfff" for c in query):
            raise QueryError(
                "the query is no Unicode text: was it written in another encoding than UTF-8?"
            )
        own = {name: self._own(name, table) for name, table in tables.items()}
        return Result(self, ((query, parameters, own),))

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

    def why_empty(self, query: str) -> list[str]:
        """Possible reasons why ``query`` has no rows, found from its text."""
        notes = [
            f"{v}: {VIEWS[v]}"
            for v in EMPTY_BY_DESIGN
            if re.search(rf"\b{v}\b", query) and not self._has_rows(v)
        ]
        layers = self.info["layers"]
        if wrong := sorted(
            {int(k) for k in re.findall(r"\blayer\s*=\s*(\d{1,9})\b", query)} - set(layers)
        ):
            notes.append(
                f"layer {wrong[0]} was not recorded; the run has {', '.join(map(str, layers))}"
            )
        if asked := re.findall(r"\bclass\s*=\s*'([^']*)'", query):
            has = [
                c
                for (c,) in self.sql(
                    "SELECT DISTINCT class FROM vocabulary ORDER BY class"
                ).fetchall()
            ]
            has += [
                c
                for (c,) in self.sql("SELECT DISTINCT class FROM class_drift").fetchall()
                if c not in has
            ]
            if "classes" not in query and (wrong_class := [c for c in asked if c not in has]):
                notes.append(
                    f"no type is of class {wrong_class[0]!r}; the run has {', '.join(has)}"
                )
        if found := re.search(r"\bkwic\(\s*'((?:[^']|'')*\S\s+\S(?:[^']|'')*)'", query):
            notes.append(
                f"kwic takes one word, and {found[1]!r} is several: ask for one and filter by its "
                "context"
            )
        elif re.search(r"\bkwic\([^)]*,\s*(?:n\s*:=\s*)?-\s*\d", query):
            notes.append("kwic takes the number of words on each side, 0 or more")
        elif found := re.search(r"\bkwic\(\s*'((?:[^']|'')*)'", query):
            notes.append(
                f"no word is {found[1]!r}, in upper or lower case, or the rest of the query leaves "
                "no row"
            )
        return notes

    def _has_rows(self, view: str) -> bool:
        return bool(self.sql(f"SELECT 1 FROM {view} LIMIT 1").fetchall())  # noqa: S608 - a name of ours

    def close(self) -> None:
        """End the session and its process."""
        self._process.close()

    def __repr__(self) -> str:
        model, layers = self.info.get("model", {}).get("name"), self.info["layers"]
        tokens = self.info.get("counts", {}).get("tokens", 0)
        return printable(
            f"<Run {self.id}: {model}, layers {layers}, {tokens:,} tokens, {self.uri}>"
        )

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _own(self, name: str, table: Any) -> pa.Table:
        """The caller's ``table`` as Arrow.

        Raises ``QueryError`` if its name is a view's, if it is no table, or if it has more than
        half of the memory limit.
        """
        if name.lower() in VIEWS:
            raise QueryError(f"{name} is a view of the run; give your table another name")
        try:
            arrow = pa.table(table)
        except (TypeError, ValueError, pa.ArrowException) as error:
            raise QueryError(f"{name} is no table of pandas, polars or Arrow: {error}") from error
        if arrow.nbytes > self._limits.memory_bytes // 2:
            raise QueryError(
                f"{name} has {arrow.nbytes:,} bytes, over half of the memory limit of "
                f"{self._limits.memory}; "
                "take the columns that the query needs, or raise the limit"
            )
        return arrow

    def _local(self, table: pa.Table, types: Sequence[str] = ()) -> duckdb.DuckDBPyRelation:
        """Computed rows as a relation of this process, which has no access to anything else.

        With ``types``, columns are cast to these SQL types.
        """
        if self._here is None:
            here = duckdb.connect(":memory:", config=session.CLOSED | {"threads": 1})
            here.execute("SET enable_external_access = false")
            here.execute("SET lock_configuration = true")
            self._here = here
        relation = self._here.cursor().from_arrow(table)
        if list(types) == [str(kind) for kind in relation.types] or not types:
            return relation
        columns = zip(relation.columns, relation.types, types, strict=True)
        return relation.project(
            ", ".join(
                _identifier(name)
                if str(kind) == wanted
                else f"{_identifier(name)}::{wanted} AS {_identifier(name)}"
                for name, kind, wanted in columns
            )
        )

    @contextmanager
    def _plain_errors(self) -> Iterator[None]:
        try:
            yield
        except (duckdb.Error, OSError, pa.ArrowException) as error:
            raise QueryError(sandbox.readable(str(error), self._limits)) from error
        except ArithmeticError as error:  # an interval of a million years
            raise QueryError(
                f"a value is beyond what Python can hold ({error}); cast it, as with ::VARCHAR"
            ) from error


def _identifier(name: str) -> str:
    """``name`` as a quoted SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def duckdb_settings(limits: sandbox.Limits) -> dict[str, Any]:
    return session.CLOSED | {"memory_limit": f"{limits.memory_bytes}B", "threads": limits.threads}


# --- a run's tables and files ---
