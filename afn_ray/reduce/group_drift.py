"""Compare the groups of two runs: their strengths, classes and types."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from afn_ray.kept import NAME, KeptColumn, parse
from afn_ray.reduce.drift import (
    SourceStrengths,
    class_rows,
    drift_row,
    histograms_by_source,
    movers_table,
    table_by_layer,
)
from afn_ray.reduce.group_tables import classes_of
from afn_ray.reduce.histogram import Histogram
from afn_ray.schema import (
    GROUP_CLASS_DRIFT_SCHEMA,
    GROUP_DRIFT_SCHEMA,
    GROUP_MOVERS_SCHEMA,
    LANGUAGE,
)
from afn_ray.store.manifest import RunFolder

MOST_MOVERS = 50
"""Largest number of types in both runs, new and vanished types each, of a group at a layer."""


class GroupDrift(NamedTuple):
    """The differences between the groups of two runs; empty unless both have the same groups."""

    by: str | None  # how both are grouped
    drift: pa.Table  # ``GROUP_DRIFT_SCHEMA``
    classes: pa.Table  # ``GROUP_CLASS_DRIFT_SCHEMA``
    movers: pa.Table  # ``GROUP_MOVERS_SCHEMA``


NO_GROUPS = GroupDrift(
    None,
    GROUP_DRIFT_SCHEMA.empty_table(),
    GROUP_CLASS_DRIFT_SCHEMA.empty_table(),
    GROUP_MOVERS_SCHEMA.empty_table(),
)
"""Differences of two runs without the same groups."""


class _Side(NamedTuple):
    """Tables of the groups of one run, by layer."""

    groups: dict[int, pa.Table]
    group_types: dict[int, pa.Table]
    vocabulary: dict[int, pa.Table]
    by_language: bool

    @classmethod
    def of(cls, run: RunFolder, labels: str) -> _Side:
        """The tables of ``run``, whose HIGH tokens are those that the column ``labels`` counts."""
        groups = _tables_labelled_by(labels, table_by_layer(run, "groups"))
        types = _tables_labelled_by(labels, table_by_layer(run, "group_types"))
        by_language = grouped_by_language(run) and run.info["measure"].get("labels") is None
        return cls(groups, types, table_by_layer(run, "vocabulary"), by_language)

    def types(self, layer: int, group: str | None) -> pa.Table:
        """The types of ``group`` as ``movers_table`` takes them; their medians are not known."""
        table = self.group_types[layer]
        names = table["group"].cast(pa.string())
        is_here = pc.is_null(names) if group is None else pc.equal(names, group)
        here = table.filter(is_here)
        types = classes_of(here, self.vocabulary[layer], by_language=self.by_language)
        unknown = np.zeros(len(types), np.float32)
        return types.append_column("q2", pa.array(unknown))


def group_drift(
    a: RunFolder, b: RunFolder, layers: list[int], *, by_id: bool, ranks_only: bool
) -> GroupDrift:
    """Compare the groups of ``b`` with those of ``a``, matched by name.

    Tokens are HIGH by their group's own Q3 if both runs have such labels, otherwise by the run's.
    ``by_id`` and ``ranks_only`` are as in ``movers_table``.
    """
    by = grouped_by(a)
    if by is None or by != grouped_by(b):
        return NO_GROUPS
    drift: list[dict[str, object]] = []
    classes: list[dict[str, object]] = []
    movers = [GROUP_MOVERS_SCHEMA.empty_table()]
    nothing = SourceStrengths(Histogram.empty(), 0)
    labels = "n_high_own" if labels_by_group(a) and labels_by_group(b) else "n_high"
    sides = _Side.of(a, labels), _Side.of(b, labels)
    for layer in layers:
        in_a, in_b = (histograms_by_source(side.groups[layer], "group") for side in sides)
        for group in sorted({*in_a, *in_b}, key=lambda name: (name is None, name or "")):
            of_two = in_a.get(group, nothing), in_b.get(group, nothing)
            row = drift_row(layer, group, *of_two, ranks_only=ranks_only)
            drift.append({"group": row.pop("source"), **row})
            types = [side.types(layer, group) for side in sides]
            classes += ({"group": group, **row} for row in class_rows(layer, *types))
            moved = movers_table(layer, types[0], types[1], by_id=by_id, ranks_only=True)
            movers += _first_of(moved, group)
    return GroupDrift(
        by,
        pa.Table.from_pylist(drift, GROUP_DRIFT_SCHEMA),
        pa.Table.from_pylist(classes, GROUP_CLASS_DRIFT_SCHEMA),
        pa.concat_tables(movers),
    )


def _first_of(movers: pa.Table, group: str | None) -> Iterator[pa.Table]:
    """The first ``MOST_MOVERS`` of each status in ``movers``, as rows of
    ``GROUP_MOVERS_SCHEMA``.
    """
    for status in ("both", "new", "vanished"):
        first = movers.filter(pc.equal(movers["status"], status)).slice(0, MOST_MOVERS)
        names = pa.array([group] * len(first), pa.string())
        yield first.append_column("group", names).select(GROUP_MOVERS_SCHEMA.names)


def _tables_labelled_by(labels: str, tables: Mapping[int, pa.Table]) -> dict[int, pa.Table]:
    return {layer: _labelled_by(labels, table) for layer, table in tables.items()}


def _labelled_by(labels: str, table: pa.Table) -> pa.Table:
    """``table`` with the column ``labels`` as ``n_high``."""
    names = [name for name in table.column_names if name != "n_high_own"]
    at, field = names.index("n_high"), table.schema.field("n_high")
    return table.select(names).set_column(at, field, table[labels])


def labels_by_group(run: RunFolder) -> bool:
    """True if the tokens of ``run`` are labelled by their group's own Q3 too."""
    return run.info["config"].get("thresholds_by") == "group" and "groups" in run.info["tables"]


def grouping_column(run: RunFolder) -> KeptColumn | None:
    """The column of ``documents`` that makes the groups of ``run``, if one does."""
    if grouped_by_language(run):
        return KeptColumn(LANGUAGE, "string")
    by = grouped_by(run)
    columns = parse(run.info["config"].get("keep_columns") or "")
    return next((column for column in columns if column.name == by), None)


def grouped_by_language(run: RunFolder) -> bool:
    """True if detected languages make the groups of ``run``.

    An older run may have a kept column, or a key of the path, of their name.
    """
    return grouped_by(run) == LANGUAGE and run.info["measure"].get("languages") is not None


def grouped_by(run: RunFolder) -> str | None:
    """Key that groups the documents of ``run``; None: they are not grouped."""
    by = run.info["config"].get("group_by")
    # run.json may have been edited, and titles have this name.
    is_name = isinstance(by, str) and NAME.fullmatch(by) is not None
    return by if is_name and "groups" in run.info["tables"] else None
