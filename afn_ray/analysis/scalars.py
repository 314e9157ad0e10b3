"""Scalar figures of a night beside those that they are held against: a run's, or medians."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import pyarrow.compute as pc

from afn_ray.reduce.compare import Comparison
from afn_ray.reduce.drift import (
    SourceStrengths,
    class_rows,
    drift_row,
    histogram_of,
    table_by_layer,
    without_special,
)
from afn_ray.reduce.histogram import Histogram
from afn_ray.store.manifest import RunFolder

WHOLE = ("n_a", "q1_a", "q2_a", "q3_a", "share_high_a")
"""Figures of a whole run that have a median over nights."""


@dataclass(frozen=True, slots=True)
class Scalars:
    """Figures of a layer: those of the night end with _b, the others with _a."""

    whole: Mapping[str, Any]  # a row of ``DRIFT_SCHEMA``
    classes: Sequence[Mapping[str, Any]]  # rows of ``CLASS_DRIFT_SCHEMA``


def of_comparison(comparison: Comparison, layer: int) -> Scalars:
    """The figures of both runs of ``comparison`` at ``layer``."""
    drift = comparison.drift.filter(pc.equal(comparison.drift["layer"], layer)).to_pylist()
    whole = next(row for row in drift if row["source"] is None)
    of_layer = pc.equal(comparison.classes["layer"], layer)
    return Scalars(whole, comparison.classes.filter(of_layer).to_pylist())


def of_medians(comparison: Comparison, nights: Sequence[RunFolder], layer: int) -> Scalars:
    """The figures of the night of ``comparison``, and the medians of those of ``nights``.

    A class without tokens in a night has a share of 0 there; its HIGH share is the median over the
    nights that have it. An even number of values has the mean of the two in the middle as median.
    """
    here = of_comparison(comparison, layer)
    earlier = [_of_run(night, layer) for night in nights]
    whole = dict(here.whole)
    for name in WHOLE:
        values = [night.whole[name] for night in earlier if night.whole.get(name) is not None]
        whole[name] = median(values) if values else None
    by_class = [{row["class"]: row for row in night.classes} for night in earlier]
    rows = {row["class"]: dict(row) for row in here.classes}
    earlier_names: set[str] = set()
    for night in by_class:
        earlier_names |= night.keys()
    for name in earlier_names - rows.keys():
        rows[name] = {"class": name, "n_b": 0, "share_b": 0.0, "share_high_b": 0.0}
    for name, row in rows.items():
        found = [night[name] for night in by_class if name in night and night[name]["n_a"]]
        absent = [0.0] * (len(earlier) - len(found))
        row["share_a"] = median([*(other["share_a"] for other in found), *absent])
        row["n_a"] = sum(other["n_a"] for other in found)
        if found:
            row["share_high_a"] = median(other["share_high_a"] for other in found)
    return Scalars(whole, list(rows.values()))


def _of_run(run: RunFolder, layer: int) -> Scalars:
    """The figures of ``run`` at ``layer``, as those of a baseline."""
    types = without_special(table_by_layer(run, "vocabulary")[layer])
    histogram = histogram_of(table_by_layer(run, "histogram")[layer])
    n_high = pc.sum(types["n_high"]).as_py() or 0
    strengths = SourceStrengths(histogram, int(n_high))
    nothing = SourceStrengths(Histogram.empty(), 0)
    whole = drift_row(layer, None, strengths, nothing, ranks_only=False)
    return Scalars(whole, list(class_rows(layer, types, types)))
