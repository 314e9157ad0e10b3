"""Labels of tokens by their group's own Q3, in SQL: which group each document is in, and its Q3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from afn_ray.query.expressions import quoted
from afn_ray.reduce.group_drift import grouped_by, grouping_column
from afn_ray.reduce.groups import OTHERS, Grouping
from afn_ray.reduce.sources import Sources
from afn_ray.store.manifest import RunFolder

SQL_KINDS = {
    "string": "VARCHAR",
    "int64": "BIGINT",
    "double": "DOUBLE",
    "bool": "BOOLEAN",
    "date": "DATE",
    "timestamp": "TIMESTAMP",
}
"""Types of kept columns in SQL, by those in Arrow (``kept.KINDS``)."""


def own_tables(folder: RunFolder, small: Mapping[str, pa.Table]) -> dict[str, pa.Table]:
    """Tables that ``own_q3`` needs, from the run's ``small`` ones, by name.

    ``internal.own_q3`` has ``group`` and ``q3_<k>`` for each layer. ``internal.groups_of`` has the
    ``group`` of each ``value``: of a kept column, or of the URI of a file.
    """
    groups = small["groups"]
    columns: dict[str, pa.Array] = {}
    for layer in folder.info["layers"]:
        here = groups.filter(pc.equal(groups["layer"], layer))
        columns |= {"group": here["group"], f"q3_{layer}": here["q3"]}
    own = pa.table(columns)
    names = [name for name in own["group"].to_pylist() if name is not None]
    pairs = [(name, name) for name in names if name != OTHERS]
    if (grouping := _by_file(folder, small["files"])) is not None:
        files = small["files"]["source"].unique().to_pylist()
        pairs = [(uri, grouping.of_uri(uri)) for uri in files]
    rows = [
        {"value": value, "group": group if group is None or group in names else OTHERS}
        for value, group in pairs
    ]
    schema = pa.schema({"value": pa.string(), "group": pa.string()})
    return {"internal.own_q3": own, "internal.groups_of": pa.Table.from_pylist(rows, schema)}


def own_q3(folder: RunFolder, documents: str, layers: Sequence[int]) -> str:
    """SQL of ``doc`` and ``q3_<k>``, the Q3 of its group, for each row of ``documents``."""
    by, kind = "source", "VARCHAR"
    if (column := grouping_column(folder)) is not None:
        by = quoted(column.name)
        kind = SQL_KINDS[column.kind]
    columns = ", ".join(f"q3_{k}" for k in layers)
    # Texts are cast, not values: the text of a number or a time is another one in DuckDB.
    in_group = f"""
        SELECT doc, CASE WHEN documents.{by} IS NULL OR of.value IS NOT NULL
            THEN of."group" ELSE '{OTHERS}' END AS "group"
        FROM {documents} AS documents LEFT JOIN internal.groups_of AS of
        ON documents.{by} = TRY_CAST(of.value AS {kind})"""  # noqa: S608
    return f"""
        (SELECT doc, {columns} FROM ({in_group}) AS found LEFT JOIN internal.own_q3 AS own
        ON found."group" IS NOT DISTINCT FROM own."group")"""  # noqa: S608


def _by_file(folder: RunFolder, files: pa.Table) -> Grouping | None:
    """Grouping of the run's documents by their file; None if a column decides."""
    by = grouped_by(folder)
    if by is None or grouping_column(folder) is not None:
        return None
    read = files.filter(pc.invert(files["is_skipped"]))
    return Grouping(by, False, Sources.of(read["source"].to_pylist()))
