"""The rows of a query, computed by the query process each time that a method asks for them."""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterator
from functools import partial
from typing import Any

import duckdb
import pyarrow as pa

from afn_ray import notebook
from afn_ray.errors import QueryError
from afn_ray.query.backend import Backend
from afn_ray.query.protocol import Answer, AnswerFields, Made, Steps
from afn_ray.query.sandbox import Allowance
from afn_ray.text import printable

KEYS = itertools.count()
"""Keys of relations, unique in this process and each process forked from it."""

BATCH_ROWS = 1 << 17
"""Rows of an Arrow batch by default."""


PLAIN_TYPES = frozenset(
    {"BOOLEAN", "TINYINT", "SMALLINT", "INTEGER", "BIGINT", "FLOAT", "DOUBLE", "VARCHAR"}
)
"""SQL types whose Python values are the same from Arrow as from DuckDB."""

OF_ROWS = frozenset(
    {
        "fetchall",
        "df",
        "to_df",
        "fetchdf",
        "pl",
        "fetchnumpy",
        "to_dicts",
        "iter_rows",
        "torch",
        "tf",
        "fetch_arrow_table",
        "fetch_record_batch",
        "fetch_arrow_reader",
    }
)
"""Methods of a relation that return rows; the others return a relation or a value."""


def _has_duckdb_types(schema: pa.Schema) -> bool:
    """True if ``schema`` has a type of DuckDB's own, which Arrow has as an extension type."""
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

    __slots__ = ("_backend", "_first", "_key", "_made", "_steps")

    def __init__(self, backend: Backend, steps: Steps) -> None:
        """Bind ``steps`` in the query process. Raises ``QueryError`` for SQL that is wrong."""
        self._backend = backend
        self._steps = steps
        self._key = next(KEYS)
        self._first: Allowance | None = self._backend.allowance()
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
            try:
                schema = self._arrow_types(schema.empty_table()).schema
            except pa.ArrowNotImplementedError as error:
                raise QueryError(
                    "a column is a list or a struct of a type that Arrow lacks ("
                    f"{', '.join(self.types)[:200]}); cast it in the query, as with ::VARCHAR"
                ) from error
            batches = self._arrow_types_only(batches)
        return pa.RecordBatchReader.from_batches(schema, batches)

    def _arrow_types_only(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            yield from self._arrow_types(pa.table(batch)).to_batches()

    def _arrow_types(self, table: pa.Table) -> pa.Table:
        """``table`` with DuckDB's own types converted to the nearest Arrow types."""
        return self._backend.relation_here(table).to_arrow_table()

    arrow = to_arrow_reader

    def to_arrow_table(self, batch_size: int = BATCH_ROWS) -> pa.Table:
        """All rows as one Arrow table."""
        table = self._all_rows(batch_size)
        if _has_duckdb_types(table.schema):
            return self._arrow_types(table)
        return table

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object:
        return self.to_arrow_reader().__arrow_c_stream__(requested_schema)

    def show(self, **options: Any) -> None:
        """Print the first rows as a table, as ``duckdb.DuckDBPyRelation.show`` does."""
        print(self._text(options), end="")

    def __repr__(self) -> str:
        return self._text(None)

    def _repr_html_(self) -> str:
        """The first rows as an HTML table; the query computes no more than these."""
        reader = self.to_arrow_reader(notebook.MAX_ROWS + 1)
        taken: list[pa.RecordBatch] = []
        num_rows = 0
        for batch in reader:
            taken.append(batch)
            num_rows += batch.num_rows
            if num_rows > notebook.MAX_ROWS:
                break
        first = pa.Table.from_batches(taken, reader.schema)
        return notebook.table("", first, more=num_rows > notebook.MAX_ROWS)

    def _repr_mimebundle_(
        self, include: Container[str] | None = None, exclude: Container[str] | None = None
    ) -> dict[str, str]:
        """The rows for a notebook as HTML, and elsewhere as text, so that a query runs once."""
        if include is not None and "text/html" not in include:
            return {"text/plain": repr(self)}
        columns = printable(", ".join(self.columns))
        return {"text/html": self._repr_html_(), "text/plain": f"<Result: {columns}>"}

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
            columns = [column.to_pylist() for column in table.columns]
            return list(zip(*columns, strict=True))
        with self._backend.plain_errors():
            relation = self._backend.relation_here(table, self.types)
            method = getattr(relation, name)
            return method(*arguments, **options)

    def _step(self, name: str, *arguments: Any, **options: Any) -> Any:
        """Call the relation's method ``name`` in the query process.

        Returns a ``Result`` for a relation, otherwise the value.
        """
        sent_arguments = tuple(map(_sent, arguments))
        sent_options = {key: _sent(value) for key, value in options.items()}
        step = (name, sent_arguments, sent_options)
        made = Result(self._backend, (*self._steps, step))
        return made._made.get("value", made)

    def _allowance(self) -> Allowance:
        """Time of one call; the first call has what the preparation of the query left."""
        allowance = self._first or self._backend.allowance()
        self._first = None
        return allowance

    def _bind(self, allowance: Allowance) -> AnswerFields:
        _, answer = self._backend.process.ask(allowance, "bind", self._key, self._steps)
        return answer.fields

    def _ask(self, allowance: Allowance, do: str, argument: Any) -> tuple[int, Answer]:
        number, answer = self._backend.process.ask(allowance, do, self._key, argument)
        if "unknown" in answer.fields:  # the process used or dropped this relation: bind it again
            self._bind(allowance)
            number, answer = self._backend.process.ask(allowance, do, self._key, argument)
        return number, answer

    def _text(self, options: dict[str, object] | None) -> str:
        _, answer = self._ask(self._allowance(), "text", options)
        return printable(answer.fields["value"], keep="\n")

    def _batches(
        self, batch_rows: int, allowance: Allowance | None = None
    ) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
        """Schema and batches of the rows, with DuckDB's own types kept.

        All batches share ``allowance`` if it is given; otherwise each has the run's time limit.
        """
        reader, answer = self._ask(allowance or self._allowance(), "read", batch_rows)
        with self._backend.plain_errors():
            first = pa.ipc.open_stream(answer.arrow).read_all()

        def batches() -> Iterator[pa.RecordBatch]:
            last = answer.fields["last"]
            try:
                yield from first.to_batches()
                while not last:
                    left = allowance or self._backend.allowance()
                    _, more = self._backend.process.ask(left, "next", reader)
                    last = more.fields["last"]
                    if more.arrow:
                        yield from pa.ipc.open_stream(more.arrow)
            finally:
                if not last:
                    self._backend.process.forget(reader)

        return first.schema, batches()

    def _all_rows(self, batch_rows: int) -> pa.Table:
        """All rows. Raises ``QueryError`` if they are larger than the memory limit."""
        schema, batches = self._batches(batch_rows, self._allowance())
        taken = []
        num_bytes = 0
        for batch in batches:
            taken.append(batch)
            num_bytes += batch.nbytes
            if num_bytes > self._backend.limits.memory_bytes:
                raise QueryError(
                    f"the result is larger than the memory limit of {self._backend.limits.memory}: "
                    "ask for less, take it a batch at a time with .to_arrow_reader(), write it "
                    "with afn sql --out, or raise the limit"
                )
        return pa.Table.from_batches(taken, schema)
