"""A run's small tables reach DuckDB as if DuckDB had imported each of them."""

from __future__ import annotations

import duckdb
import pyarrow as pa
import pytest

from afn_ray import schema
from afn_ray.query import session
from afn_ray.query.filling import Filling, decode_tables, encode_tables, sql_type
from afn_ray.query.protocol import Made, Steps

SCHEMAS = {k: v for k, v in vars(schema).items() if isinstance(v, pa.Schema)}


@pytest.mark.parametrize("name", SCHEMAS)
def test_an_empty_table_has_the_columns_that_duckdb_imports(name: str) -> None:
    empty = SCHEMAS[name].empty_table()
    with duckdb.connect() as connection:
        Filling(connection, {"made": empty}, {}).create_all(connection)
        made, imported = connection.table("made"), connection.from_arrow(empty)
        assert (made.columns, made.types) == (imported.columns, imported.types)


def test_a_type_that_has_no_name_here_is_imported() -> None:
    odd = pa.schema(
        {"at": pa.timestamp("ns", "UTC"), "of": pa.list_(pa.struct({"a": pa.decimal128(9, 2)}))}
    )
    assert [sql_type(kind) for kind in odd.types] == [None, None]
    with duckdb.connect() as connection:
        Filling(connection, {"made": odd.empty_table()}, {}).create_all(connection)
        imported = connection.from_arrow(odd.empty_table())
        assert connection.table("made").types == imported.types


def test_tables_survive_the_way_to_the_query_process() -> None:
    table = pa.table({"a": pa.array([1, None], pa.int16()), 'b"c': [["x"], None]})
    tables = {"some": table, "none": table.schema.empty_table()}
    assert decode_tables(encode_tables(tables)) == tables


def test_a_query_is_read_as_it_is_written_with_the_arguments_of_its_steps() -> None:
    asked = Made((("FROM\nwords", None, {}), ("filter", ("n > 1",), {})))
    steps: Steps = (("FROM\tdocuments", None, {}), ("join", (asked, "doc"), {"how": "left"}))
    assert list(session._texts(steps)) == ["FROM\tdocuments", "FROM\nwords", "n > 1", "doc", "left"]


def test_what_fails_or_is_stopped_while_it_is_created_is_created_by_the_next_query() -> None:
    statements = {"seen": ["CREATE VIEW seen AS SELECT 1", "COMMENT ON VIEW unseen IS 'x'"]}
    with duckdb.connect() as connection:
        filling = Filling(connection, {}, statements)
        for _ in range(2):
            with pytest.raises(duckdb.CatalogException, match="unseen"):
                filling.create_named(connection, "FROM seen")
        statements["seen"].pop()
        filling.create_named(connection, "FROM seen")
        assert connection.sql("FROM seen").fetchall() == [(1,)]
        assert not filling.create_all(connection)
