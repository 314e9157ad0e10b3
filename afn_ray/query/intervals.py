"""Check that Arrow can hold the INTERVALs of a result."""

from __future__ import annotations

from typing import Any

import duckdb

FARTHEST_INTERVAL_H = 2_562_047
"""Smallest number of hours in an INTERVAL, beside months and days, that Arrow cannot hold.

Arrow has 64 bits for nanoseconds.
"""


def check_intervals(relation: duckdb.DuckDBPyRelation) -> duckdb.DuckDBPyRelation:
    """``relation`` with a check that raises an error for an INTERVAL that Arrow cannot hold.

    Without the check DuckDB would return a wrong value.
    """
    checks = [_beyond_arrow(f"#{at}", kind) for at, kind in enumerate(relation.types, 1)]
    if not any(checks):
        return relation
    columns = []
    for at, (name, check) in enumerate(zip(relation.columns, checks, strict=True), 1):
        quoted = name.replace('"', '""')
        value = f"#{at}"
        if check:
            value = f"CASE WHEN {check} THEN error('{BEYOND_ARROW}') ELSE {value} END"
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
