"""Fill a DuckDB connection with a run: its small tables, views and macros."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import duckdb
import pyarrow as pa

from afn_ray.query.expressions import quoted

SQL_TYPES = {
    pa.bool_(): "BOOLEAN",
    pa.int8(): "TINYINT",
    pa.int16(): "SMALLINT",
    pa.int32(): "INTEGER",
    pa.int64(): "BIGINT",
    pa.float32(): "FLOAT",
    pa.float64(): "DOUBLE",
    pa.string(): "VARCHAR",
    pa.date32(): "DATE",
    pa.timestamp("us"): "TIMESTAMP",
}
"""DuckDB's types of Arrow's that are not nested."""
WORD = re.compile(r"\w+")
"""Pattern of a word of SQL, which may be a name."""
Statements = Mapping[str, Sequence[str]]
"""SQL by the name of the view, macro or table that it creates, or on which it comments."""
LISTS = re.compile(
    r"describe|show|summarize|duckdb_|pg_|information_schema|sqlite_|pragma|query|json_execute"
    r"|json_serialize_plan"
    r"|(?:^|[(;]|\*/|\bexplain|\banalyze|\bunion)\s*desc\b",  # not that of ORDER BY
    re.IGNORECASE | re.MULTILINE,
)
"""Pattern of queries that list or call views and macros without their names in the text."""


def encode_tables(tables: Mapping[str, pa.Table]) -> dict[str, pa.Buffer]:
    """Arrow streams of ``tables``, by name: pickled tables take ten times as long."""
    return {name: _encoded(table) for name, table in tables.items()}


def decode_tables(streams: Mapping[str, pa.Buffer]) -> dict[str, pa.Table]:
    """The inverse of ``encode_tables``."""
    return {name: pa.ipc.open_stream(stream).read_all() for name, stream in streams.items()}


class Filling:
    """A run's tables, views and macros, of which a database gets those that a query may name.

    Nearly all queries name few of them, and DuckDB takes longer to create all than to answer.
    """

    def __init__(
        self,
        connection: duckdb.DuckDBPyConnection,
        tables: Mapping[str, pa.Table],
        statements: Statements,
    ) -> None:
        """``connection`` is to the empty database.

        Each of ``statements`` uses only tables and views before it.
        """
        self._tables = tables
        self._statements = statements
        self._missing = list(dict.fromkeys([*tables, *statements]))  # in an order to create them
        self._names: dict[str, list[str]] = {}  # by word: internal.salience and salience
        for name in self._missing:
            self._names.setdefault(name.rpartition(".")[2], []).append(name)
        connection.execute("CREATE SCHEMA internal")

    def create_all(self, connection: duckdb.DuckDBPyConnection) -> bool:
        """Create whatever is not there yet. False: nothing was missing."""
        return self._create(connection, set(self._missing))

    def create_named(self, connection: duckdb.DuckDBPyConnection, text: str) -> None:
        """Create what ``text``, a query, may name or list, and all that it is made of."""
        if LISTS.search(text):
            self.create_all(connection)
            return
        found: set[str] = set()
        waiting = self._named(text)
        while waiting:
            found.add(name := waiting.pop())
            for statement in self._statements.get(name, ()):
                if not statement.startswith("COMMENT"):  # whose text needs nothing that it names
                    waiting |= self._named(statement) - found
        self._create(connection, found)

    def _named(self, text: str) -> set[str]:
        """Names of what may be named in ``text``, which may be long."""
        words = {match[0] for match in WORD.finditer(text.lower()) if match[0] in self._names}
        return {name for word in words for name in self._names[word]}

    def _create(self, connection: duckdb.DuckDBPyConnection, names: set[str]) -> bool:
        wanted = [name for name in self._missing if name in names]
        for name in wanted:
            # A statement may read files, or be interrupted: then nothing of ``name`` is there.
            connection.begin()
            try:
                if name in self._tables:
                    _create_table(connection, name, self._tables[name])
                for statement in self._statements.get(name, ()):
                    connection.execute(statement)
                connection.commit()
            except BaseException:
                connection.rollback()
                raise
            self._missing.remove(name)
        return bool(wanted)


def _create_table(connection: duckdb.DuckDBPyConnection, name: str, table: pa.Table) -> None:
    """Create ``table``.

    Most tables of most runs are empty. DuckDB creates an empty table from its columns in a third of
    the time that it takes to import it.
    """
    columns = [_column(field) for field in table.schema]
    if len(table) or None in columns:
        connection.from_arrow(table).create(name)
    else:
        connection.execute(f"CREATE TABLE {name} ({', '.join(filter(None, columns))})")


def _column(field: pa.Field) -> str | None:
    """SQL of a column like ``field``, or None for a type that ``sql_type`` does not know."""
    kind = sql_type(field.type)
    return kind and f"{quoted(field.name)} {kind}"


def sql_type(kind: pa.DataType) -> str | None:
    """The type that DuckDB gives to a column of ``kind``, or None if it is not one of ours."""
    if pa.types.is_list(kind):
        of_items = sql_type(kind.value_type)
        return of_items and f"{of_items}[]"
    if pa.types.is_struct(kind):
        fields = [_column(field) for field in kind]
        return None if None in fields else f"STRUCT({', '.join(filter(None, fields))})"
    return SQL_TYPES.get(kind)


def _encoded(table: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()
