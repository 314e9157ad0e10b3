"""Request of an export, and the rows that answer it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa

from afn_ray import kept
from afn_ray.errors import ConfigError, QueryError
from afn_ray.exports.formats import FORMATS
from afn_ray.query.column_comments import column_comments
from afn_ray.query.database import Run
from afn_ray.query.expressions import quoted
from afn_ray.query.result import Result
from afn_ray.query.shard_views import SHARD_VIEWS, ShardRange
from afn_ray.query.views import VIEWS
from afn_ray.text import nearest

BATCH_ROWS = 1 << 16
"""Rows that come from the query process at a time."""
LOST_TYPES = re.compile(r"\bBIT\b|\bTIME WITH TIME ZONE\b")
"""SQL types that Arrow lacks: values would come as others without an error, or not at all."""


@dataclass(frozen=True)
class IcebergTable:
    """The table of an Iceberg catalog that an export creates."""

    name: str
    """Its namespace and name, as in ``afn.tokens``."""
    catalog: str | None = None
    """URI of the catalog, or its name in pyiceberg's configuration; None: SQLite in the target."""


@dataclass(frozen=True)
class ExportRequest:
    """All that decides the rows and files of an export."""

    run: str
    baseline: str | None
    table: str | None
    """Name of a view; None: the rows of ``sql``."""
    sql: str | None
    format: str
    file_bytes: int
    iceberg: IcebergTable | None
    columns: tuple[tuple[str, str], ...]
    """Names and SQL types."""

    def to_json(self) -> dict[str, object]:
        """The request as a value that reads back equal from JSON."""
        value: dict[str, object] = json.loads(json.dumps(asdict(self)))
        return value

    def id_in(self, target: str) -> str:
        """Identity of the export to ``target``: exports that differ in anything differ in it."""
        asked = json.dumps({**asdict(self), "target": target})
        return hashlib.sha256(asked.encode()).hexdigest()[:32]

    @property
    def ending(self) -> str:
        return FORMATS[self.format]

    @property
    def title(self) -> str:
        return self.table or "query"


def check_names(table: str | None, sql: str | None, format: str, file_bytes: int) -> None:
    """Raise ``ConfigError`` for what no run can answer."""
    if table is not None and sql is not None:
        raise ConfigError(f"both a table, {table[:80]!r}, and a query are given; give one of them")
    if format not in FORMATS:
        raise ConfigError(f"format is {format!r}; expected one of {', '.join(FORMATS)}")
    if file_bytes < 1:
        raise ConfigError(f"the file size is {file_bytes} bytes; expected 1 or more")
    if table is not None and table not in VIEWS:
        raise ConfigError(
            f"{table[:80]!r} is no table of a run{nearest([table], list(VIEWS))}; expected one of "
            f"{', '.join(VIEWS)}"
        )


def rows(run: Run, request: ExportRequest, part: ShardRange | None = None) -> Result:
    """The rows of the export, or of one of ``SHARD_VIEWS`` those that belong to ``part``."""
    if request.sql is not None:
        return run.sql(request.sql)
    assert request.table is not None
    if part is not None:
        return table_rows(run, request.table, part)
    return run.sql(f"FROM {request.table}")


def first_rows(run: Run, request: ExportRequest) -> Result:
    """Some of the rows, which have the columns of all."""
    return rows(run, request, ShardRange(0, 1) if request.table in SHARD_VIEWS else None)


def table_rows(run: Run, table: str, part: ShardRange) -> Result:
    """The rows of one of ``SHARD_VIEWS`` that belong to ``part``.

    Tokens have the id, the source and the kept columns of their document too.
    """
    rows = run.shard_views.sql(table, part)
    if table != "tokens":
        return run.sql(rows)
    taken = ["doc_id", "source", *run.sql(rows).columns]
    columns = ["t.doc", "d.doc_id", "d.source"]
    for name in run.shard_views.recorded.kept:
        columns.append(f"d.{quoted(name)} AS {quoted(kept.beside(name, taken))}")
    documents = run.shard_views.sql("documents", part)
    return run.sql(
        f"SELECT {', '.join(columns)}, t.* EXCLUDE (doc) FROM ({rows}) AS t "  # noqa: S608
        f"LEFT JOIN ({documents}) AS d USING (doc)"
    )


def _of_corpus(run: Run, table: str, columns: Sequence[str]) -> set[str]:
    """The kept columns among ``columns`` of ``table``: the corpus says what is in them."""
    if table not in ("tokens", "documents"):
        return set()
    found = set[str]()
    for name in run.shard_views.recorded.kept:
        beside = f"{kept.BESIDE}{name}"
        found.add(beside if beside in columns else name)
    return found


def arrow_schema(run: Run, request: ExportRequest) -> pa.Schema:
    """Schema of the files: with comments of the columns, and where the rows come from.

    Columns of one name are numbered: no format of an export has two of them. Raises ``QueryError``
    for a type that Arrow lacks.
    """
    for name, sql_type in request.columns:
        if (lost := LOST_TYPES.search(sql_type)) is not None:
            raise QueryError(
                f"a column does not fit into {request.format}: {name[:80]!r} has the type "
                f"{lost[0]}; cast it in the query, as with ::VARCHAR"
            )
    comments: dict[str, str] = {}
    if request.table is not None:
        names = [name for name, _ in request.columns]
        of_corpus = _of_corpus(run, request.table, names)
        comments = column_comments(request.table, [n for n in names if n not in of_corpus])
    with_types = first_rows(run, request).limit(0).to_arrow_reader().schema
    fields = []
    for (name, _), field in zip(request.columns, with_types, strict=True):
        comment = {"doc": comments[name]} if name in comments else None
        fields.append(pa.field(name, field.type, metadata=comment))
    info = run.info
    origin = {key: info[key] for key in ("model", "layers", "measure", "config", "created_at")}
    metadata = {
        "afn.export": json.dumps(request.to_json()),
        "afn.columns": json.dumps(comments, ensure_ascii=False),
        "afn.run": json.dumps(origin, ensure_ascii=False),
        "afn.provenance": json.dumps(info.get("provenance", []), ensure_ascii=False),
    }
    return pa.schema(fields, metadata)
