"""Thresholds that a run labels by: its own, or frozen ones of an earlier run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace

import pyarrow as pa

from afn_ray.config import RunConfig
from afn_ray.errors import ConfigError
from afn_ray.measure import Measure, StoredMeasure
from afn_ray.store import manifest, series
from afn_ray.store.checksums import short
from afn_ray.text import printable
from afn_ray.token_rows import LabelThresholds

BESIDE_STRENGTH = frozenset(
    {
        "id",
        "signals",
        "series",
        "offsets",
        "outliers",
        "neuron_layers",
        "top_neurons",
        "neurons_above",
        "labels",
        "languages",
        "mean_types",
        "means",
    }
)
"""Keys of a measure that change no strength, so that thresholds stay comparable."""
FROZEN = tuple(LabelThresholds.__annotations__)
"""Columns that a run takes from the thresholds of another run."""


def resolved(config: RunConfig) -> RunConfig:
    """``config`` with the run that its ``thresholds`` mean in place of a store.

    What is recorded thus names that run, whatever runs the store gets later. Raises ``StoreError``
    if there is no such run, and ``ConfigError`` for a first look, as ``find_frozen`` does.
    """
    if config.thresholds is None:
        return config
    run = manifest.find_run(config.thresholds)
    selected = series.selection_of_run(run.info)
    is_other = selected not in ("", series.selection_of(asdict(config)))
    if is_other and not manifest.is_named_by(run, config.thresholds):
        raise ConfigError(
            f"thresholds is {config.thresholds}, a store, whose latest run {run.uri} measured "
            f"{short(printable(selected))} alone: name the run whose thresholds are meant"
        )
    return replace(config, thresholds=run.uri)


def find_frozen(config: RunConfig, measure: Measure) -> list[LabelThresholds]:
    """The thresholds that ``config`` names for labels, as rows of ``FROZEN``.

    The list is empty if the run labels by its own thresholds. They are the thresholds that the
    named run itself labels by, so that each nightly run can name the previous one. Raises
    ``StoreError`` if there is no such run, ``ConfigError`` if it has another measure, or if it is a
    first look that only happens to be the latest run of the named store.
    """
    config = resolved(config)
    if config.thresholds is None:
        return []
    run = manifest.find_run(config.thresholds)
    theirs = _strength_keys(run.info["measure"])
    ours = _strength_keys(measure.as_dict())
    recorded = run.info["measure"]["layers"]
    if {*measure.layers} <= {*recorded}:  # the thresholds of some of its layers
        theirs["layers"] = ours["layers"]
    if theirs != ours:
        raise ConfigError(
            f"thresholds of {run.uri} are of another measure and cannot be used here: "
            f"{measure_differences(theirs, ours, 'it')}"
        )
    return [row for row in frozen_rows(run) if row["layer"] in measure.layers]


def _strength_keys(measure: StoredMeasure) -> dict[str, object]:
    """The part of ``measure`` that changes strengths."""
    return {key: value for key, value in measure.items() if key not in BESIDE_STRENGTH}


def frozen_rows(run: manifest.RunFolder) -> list[LabelThresholds]:
    """The thresholds that the complete ``run`` labels by, as rows of ``FROZEN``."""
    rows: list[LabelThresholds] = labels(run).select(list(FROZEN)).to_pylist()
    return rows


def labels_name(run: manifest.RunFolder) -> str:
    """Name of the table with the thresholds that the complete ``run`` labels by."""
    return "frozen" if "frozen" in run.info["tables"] else "thresholds"


def labels(run: manifest.RunFolder) -> pa.Table:
    """The thresholds that the complete ``run`` labels by, as in ``THRESHOLDS_SCHEMA``.

    They are frozen ones or the run's own.
    """
    return manifest.read_table(run, labels_name(run))


def measure_differences(
    theirs: Mapping[str, object], ours: Mapping[str, object], who: str = "the store"
) -> str:
    """The differences of two measures as text; ``who`` is the owner of ``theirs``."""
    differences = []
    for key in sorted({*theirs, *ours} - {"id"}):
        their_value, our_value = theirs.get(key), ours.get(key)
        if their_value == our_value:
            continue
        if isinstance(their_value, dict) and isinstance(our_value, dict):
            their_value, our_value = _apart(their_value, our_value), _apart(our_value, their_value)
        differences.append(
            f"{key}: {who} has {short(their_value)}, this run asks for {short(our_value)}"
        )
    return "; ".join(differences)


def _apart(value: dict[str, object], other: dict[str, object]) -> dict[str, object]:
    """The entries of ``value`` that differ in ``other``: of a model's files, say."""
    return {key: found for key, found in value.items() if other.get(key) != found}
