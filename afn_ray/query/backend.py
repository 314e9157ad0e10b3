"""Backends of a run's rows: the query process, and DuckDB in this process for rows it sent."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import duckdb
import pyarrow as pa

from afn_ray.errors import QueryError
from afn_ray.query import sandbox, session
from afn_ray.query.contents import Contents
from afn_ray.query.expressions import quoted
from afn_ray.query.filling import encode_tables
from afn_ray.query.protocol import Setup
from afn_ray.query.sandbox import Allowance


class Backend:
    """The query process of one run, and the limits of each query."""

    def __init__(self, contents: Contents, limits: sandbox.QueryLimits) -> None:
        settings = session.CLOSED | {
            "memory_limit": f"{limits.memory_bytes}B",
            "threads": limits.threads,
        }
        setup = Setup(
            settings,
            encode_tables(contents.tables),
            contents.statements,
            contents.sizes,
            limits.process_bytes,
            limits.timeout_s,
        )
        self.limits = limits
        self.process = sandbox.Process(contents.files, setup, limits)

    def allowance(self) -> Allowance:
        """The time of a new query."""
        return Allowance(self.limits.timeout_s)

    def relation_here(self, table: pa.Table, types: Sequence[str] = ()) -> duckdb.DuckDBPyRelation:
        """Computed rows as a relation of this process, which has no access to anything else.

        With ``types``, columns are cast to these SQL types.
        """
        relation = _here(os.getpid()).cursor().from_arrow(table)
        if list(types) == [str(kind) for kind in relation.types] or not types:
            return relation
        columns = []
        for name, kind, wanted in zip(relation.columns, relation.types, types, strict=True):
            column = quoted(name)
            is_cast = str(kind) != wanted
            columns.append(f"{column}::{wanted} AS {column}" if is_cast else column)
        return relation.project(", ".join(columns))

    @contextmanager
    def plain_errors(self) -> Iterator[None]:
        """Raise errors of DuckDB and Arrow in this process as ``QueryError``."""
        try:
            yield
        except (duckdb.Error, OSError, pa.ArrowException) as error:
            if isinstance(error, duckdb.FatalException | duckdb.InternalException):
                _here.cache_clear()  # of no use any more
            raise QueryError(sandbox.readable(str(error), self.limits)) from error
        except ArithmeticError as error:  # an interval of a million years
            raise QueryError(
                f"a value is beyond what Python can hold ({error}); cast it, as with ::VARCHAR"
            ) from error


@functools.cache
def _here(pid: int) -> duckdb.DuckDBPyConnection:
    """The connection of this process, ``pid``: it has no access to anything."""
    here = duckdb.connect(":memory:", config=session.CLOSED | {"threads": 1})
    here.execute("SET enable_external_access = false")
    here.execute("SET lock_configuration = true")
    return here
