"""The history of a series: the figures of each of its runs, from the runs' own tables.

Distances from the baseline are those that the audit of the run kept (``store.verdicts``). A run
without a verdict is compared with the night before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from datetime import date, datetime

import pyarrow as pa
import pyarrow.compute as pc

from afn_ray import notebook
from afn_ray.errors import ConfigError
from afn_ray.fingerprints import fingerprint
from afn_ray.measure import base_of
from afn_ray.reduce.drift import (
    SourceStrengths,
    drift_row,
    histogram_of,
    histograms_by_source,
    table_by_layer,
    without_special,
)
from afn_ray.reduce.group_drift import grouped_by
from afn_ray.reduce.histogram import Histogram
from afn_ray.schema import HISTORY_SCHEMA
from afn_ray.store import checksums, manifest, series_runs, verdicts
from afn_ray.store.layout import STAMP
from afn_ray.store.manifest import RunFolder
from afn_ray.store.series import selection_of_run
from afn_ray.store.verdicts import Distance, StoredVerdict
from afn_ray.text import nearest

RUNS_AT_ONCE = 4
"""Number of runs whose tables are read at the same time."""
MOST_NAMES = 20
"""Number of series that an error names."""
SHOWN = (
    "began_at",
    "partition",
    "layer",
    "n_tokens",
    "n_documents",
    "n_quarantined",
    "q3",
    "share_high",
    "psi",
    "ks",
    "state",
)
"""Columns of ``HISTORY_SCHEMA`` that a notebook shows."""
Place = tuple[int, str | None, str | None]
"""A row of a run: its layer, how the run is grouped (None: all tokens), and the group."""


@dataclass(frozen=True, slots=True)
class History:
    """The nights of one series.

    ``table`` (``HISTORY_SCHEMA``) has one row for each run and layer, in the order of the nights;
    ``group_by`` is null there. For a run by groups it has one more for each group at each layer.
    """

    series: str
    table: pa.Table
    num_runs: int  # complete runs of the series, shown or not
    others: tuple[str, ...]  # names of the other series of the store

    __repr__ = notebook.short

    def _repr_html_(self) -> str:
        nights = self.table.filter(pc.is_null(self.table["group_by"])).select(list(SHOWN))
        newest_first = nights.take(list(range(nights.num_rows))[::-1])
        return notebook.table(f"Series {self.series}, the newest first", newest_first)


@series_runs.read_once()
def of_store(store: str, series: str | None = None, last: int | None = None) -> History:
    """The ``last`` runs, or all, of a series of ``store``; by default that of its latest run.

    A first look is passed over where the store is named and a run over a whole corpus is there.
    Distances from a run's baseline (``psi``, ``ks``, ``js``) are those that its audit kept; those
    of a run without a verdict are from the night before it. Raises ``StoreError`` for a store
    without a complete run, and ``ConfigError`` for a series that it does not have.
    """
    latest = manifest.find_run(store)
    by_series: dict[str, list[RunFolder]] = {}
    every = list(series_runs.complete_runs(latest.store))
    for run in every:
        by_series.setdefault(series_runs.series_of(run), []).append(run)
    if not manifest.is_named_by(latest, store):
        whole = (run for run in every if not selection_of_run(run.info))
        latest = next(whole, latest)
    name = series_runs.series_of(latest) if series is None else series
    if name not in by_series:
        some = ", ".join(sorted(by_series)[:MOST_NAMES])
        raise ConfigError(
            f"{latest.store} has no series {name!r}{nearest([name], list(by_series))}; it has "
            f"{len(by_series):,}: {some}"
        )
    runs = by_series.pop(name)
    return History(name, _table(runs, last, {}), len(runs), tuple(sorted(by_series)))


@series_runs.read_once()
def of_run(
    run: RunFolder, tonight: StoredVerdict | None = None, last: int | None = None
) -> History:
    """The history of the series of the complete ``run``, as ``of_store``.

    ``last`` counts back from ``run``. ``tonight`` is the verdict on ``run``, if it is not kept yet.
    """
    name = series_runs.series_of(run)
    every = list(series_runs.complete_runs(run.store))
    runs = [other for other in every if series_runs.series_of(other) == name]
    if last is not None:
        runs = [other for other in runs if _night(other) <= _night(run)]
    given = {} if tonight is None else {run.id: tonight}
    others = {series_runs.series_of(other) for other in every} - {name}
    return History(name, _table(runs, last, given), len(runs), tuple(sorted(others)))


def _night(run: RunFolder) -> tuple[date, str]:
    """The place of ``run`` in its series: by the day of its partition, else by when it began."""
    return series_runs.day_of(run) or began_at(run).date(), run.id


def began_at(run: RunFolder) -> datetime:
    """Time at which ``run`` began, UTC, without a time zone."""
    return datetime.strptime(run.id.partition("-")[0], STAMP)


def _table(
    runs: Sequence[RunFolder], last: int | None, given: Mapping[str, StoredVerdict]
) -> pa.Table:
    """Rows of the ``last`` of ``runs``, which are newest first; ``given`` are verdicts by run."""
    in_order = sorted(runs, key=_night)
    shown = in_order if last is None else in_order[-last:]

    def table_of(run: RunFolder) -> pa.Table:
        with checksums.named_damage(run.uri):
            verdict = given.get(run.id) or verdicts.read_verdict(run)
            return pa.Table.from_pylist(list(_rows(run, verdict, runs)), HISTORY_SCHEMA)

    contexts = [copy_context() for _ in shown]  # each thread knows the runs that were read
    with ThreadPoolExecutor(RUNS_AT_ONCE) as pool:
        tables = pool.map(lambda context, run: context.run(table_of, run), contexts, shown)
        return pa.concat_tables([HISTORY_SCHEMA.empty_table(), *tables])


def _rows(
    run: RunFolder, verdict: StoredVerdict | None, runs: Sequence[RunFolder]
) -> Iterator[dict[str, object]]:
    """Rows of ``run``; ``runs`` are those of its series, newest first."""
    if verdict is not None:
        baseline, found = verdict.baseline, verdict.distances
    else:
        before = night_before(run, runs)
        baseline = None if before is None else before.uri
        found = tuple(distances(before, run))
    acceptance = verdicts.acceptance_of(run, () if verdict is None else verdict.broken)
    of_night: dict[str, object] = {
        "run": run.id,
        "measure": run.info["measure"]["id"],
        "base": fingerprint(base_of(run.info["measure"])),
        "began_at": began_at(run),
        "partition": series_runs.day_of(run),
        "baseline": None if baseline is None else baseline.rpartition("/")[2],
        "state": None if verdict is None else verdict.state,
        "broken": [] if verdict is None else list(verdict.broken),
        "warned": [] if verdict is None else list(verdict.warned),
        "accepted": None if acceptance is None else acceptance.why,
    }
    by_place = {(row.layer, row.group_by, row.group): row for row in found}
    for place, figures in _figures(run):
        layer, group_by, group = place
        row = of_night | {"layer": layer, "group_by": group_by, "group": group} | figures
        if (distance := by_place.get(place)) is not None:
            row |= {"psi": distance.psi, "ks": distance.ks, "js": distance.js}
        yield row


def night_before(run: RunFolder, runs: Sequence[RunFolder]) -> RunFolder | None:
    """The comparable night before ``run`` among ``runs``, which are newest first.

    It is that of the partition before, or of the run before where the corpus has no date.
    """
    comparable = [
        other
        for other in runs
        if series_runs.is_comparable(run, other)
        and series_runs.selects_alike(run, other.info["config"])
    ]
    if series_runs.day_of(run) is not None:
        return next(series_runs.partitions_before(run, comparable), None)
    return next(series_runs.nights_before(run, comparable), None)


def _figures(run: RunFolder) -> Iterator[tuple[Place, dict[str, object]]]:
    """Figures of ``run`` at each layer, and of its groups there, from its tables."""
    thresholds = {}
    for row in manifest.read_table(run, "thresholds").to_pylist():
        if row["population"] == "tokens":
            thresholds[row["layer"]] = row
    vocabulary, counts = table_by_layer(run, "vocabulary"), run.info["counts"]
    by = grouped_by(run)
    of_groups = [
        table_by_layer(run, name) if by is not None else {} for name in ("groups", "group_classes")
    ]
    for layer in run.info["layers"]:
        types = without_special(vocabulary[layer])
        n, n_high = (pc.sum(types[name]).as_py() or 0 for name in ("n", "n_high"))
        yield (
            (layer, None, None),
            {
                "n_tokens": n,
                "n_documents": counts["documents"],
                "n_quarantined": counts.get("quarantined"),
                **{name: thresholds[layer][name] for name in ("q1", "q2", "q3")},
                "share_high": n_high / n if n else None,
                "classes": _classes(types, n),
            },
        )
        for group, figures in _of_groups(*(table.get(layer) for table in of_groups)):
            yield (layer, by, group), figures


def _classes(types: pa.Table, n_tokens: int) -> list[dict[str, object]]:
    """The classes of a layer's ``types`` as ``classes`` of ``HISTORY_SCHEMA``, by name."""
    sums = types.group_by("class").aggregate([("n", "sum"), ("n_high", "sum")])
    rows = []
    for row in sums.sort_by("class").to_pylist():
        if n := row["n_sum"]:
            share_high = row["n_high_sum"] / n
            rows.append({"class": row["class"], "share": n / n_tokens, "share_high": share_high})
    return rows


def _of_groups(
    groups: pa.Table | None, classes: pa.Table | None
) -> Iterator[tuple[str | None, dict[str, object]]]:
    """Figures of each group, from rows of ``GROUPS_SCHEMA`` and ``GROUP_CLASSES_SCHEMA``."""
    if groups is None or classes is None:
        return
    of_group: dict[str | None, list[dict[str, object]]] = {}
    for row in classes.select(["group", "class", "share", "share_high"]).to_pylist():
        of_group.setdefault(row.pop("group"), []).append(row)
    for row in groups.drop_columns(["bins", "counts"]).to_pylist():
        group, n = row["group"], row["n"]
        yield (
            group,
            {
                "n_tokens": n,
                "n_documents": row["n_documents"],
                **{name: row[name] for name in ("q1", "q2", "q3")},
                "share_high": row["n_high"] / n if n else None,
                "classes": sorted(of_group.get(group, []), key=lambda row: str(row["class"])),
            },
        )


def distances(before: RunFolder | None, run: RunFolder) -> Iterator[Distance]:
    """Distances of ``run`` from ``before``, whole and by group, from their histograms alone.

    There are none without ``before``, and none for runs that have no histograms.
    """
    if before is None:
        return
    sides = [table_by_layer(side, "histogram") for side in (before, run)]
    by = grouped_by(run)
    is_grouped = by is not None and by == grouped_by(before)
    groups = [table_by_layer(side, "groups") if is_grouped else {} for side in (before, run)]
    for layer in run.info["layers"]:
        a, b = (side.get(layer) for side in sides)
        if a is None or b is None:
            continue
        whole = [SourceStrengths(histogram_of(table), 0) for table in (a, b)]
        yield _distance(layer, None, None, whole[0], whole[1])
        in_a, in_b = (
            histograms_by_source(side[layer], "group") if layer in side else {} for side in groups
        )
        nothing = SourceStrengths(Histogram.empty(), 0)
        for group in in_b:
            yield _distance(layer, by, group, in_a.get(group, nothing), in_b[group])


def _distance(
    layer: int, by: str | None, group: str | None, a: SourceStrengths, b: SourceStrengths
) -> Distance:
    row = drift_row(layer, group, a, b, ranks_only=False)
    return Distance(layer, by, group, row.get("psi"), row.get("ks"), row.get("js"))
