"""Judge one run and its comparison with a baseline by a policy."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from afn_ray.analysis.policy import (
    DISTANCE_LIMITS,
    DRIFT_LIMITS,
    RUN_LIMITS,
    SOURCE_LIMITS,
    Policy,
)
from afn_ray.errors import ConfigError
from afn_ray.reduce import compare, losses
from afn_ray.reduce.compare import Comparison
from afn_ray.reduce.losses import Losses
from afn_ray.store.manifest import RunFolder
from afn_ray.text import count

SHOWN_SOURCES = 5
"""Largest number of sources that a note names."""
OF_SOURCES = ("max_new_sources", "max_vanished_sources")


@dataclass(frozen=True, slots=True)
class Rule:
    """One limit and the value compared with it."""

    key: str  # name in the policy; source.psi for psi in [source]
    limit: float
    value: float | None  # None: infinite, or unknown because nothing could be compared
    passed: bool | None  # None: not judged
    where: str | None  # source, class, files or layer that the value belongs to
    meaning: str


def judge(
    policy: Policy,
    run: RunFolder,
    comparison: Comparison | None,
    lost: Losses,
    sources: Collection[str],
) -> Iterator[Rule]:
    """Compare ``run`` and ``comparison`` with each limit of ``policy``, in the policy's order.

    ``lost`` is what the run lost. ``sources`` are the sources that it read, with tokens or
    without. Rules that need a comparison are not judged without one, nor rules on sources where the
    baseline has no table of sources. Raises ``ConfigError`` for limits that this run's layers or
    tables can never be compared with.
    """
    layer = _judged_layer(policy, run, comparison)
    limits_sources = policy.source_limits or policy.limits.keys() & set(OF_SOURCES)
    if limits_sources and "sources" not in run.info["tables"]:
        raise ConfigError(
            f"the policy limits sources, but run {run.uri} has no table of them: run it with its "
            "screening (--screen)"
        )
    measured = dict(_of_run(run, lost))
    if comparison is not None:
        measured = dict(_of_comparison(comparison, layer)) | measured
    meanings = RUN_LIMITS | DRIFT_LIMITS
    for key, limit in policy.limits.items():
        value, where = measured.get(key, (None, None))
        yield _rule(key, limit, value, where, meanings[key])
    for key, limit in policy.source_limits.items():
        value, where = None, None
        if comparison is not None:
            value, where = _worst_source(policy, key, comparison, layer, sources)
        yield _rule(f"source.{key}", limit, value, where, SOURCE_LIMITS[key])


def _worst_source(
    policy: Policy, key: str, comparison: Comparison, layer: int, sources: Collection[str]
) -> tuple[float | None, str | None]:
    """The worst value of a ``SOURCE_LIMITS`` key, and its source; None where no source is judged."""
    if key == "min_tokens_ratio":
        rows = _shrinkable(comparison, layer, policy.min_tokens, sources)
        ratios = [(row["n_b"] / row["n_a"], row["source"]) for row in rows]
        return min(ratios, default=(None, None))
    rows = _judged_sources(comparison, layer, policy.min_tokens)
    distances = [(_distance(row, key), row["source"]) for row in rows]
    return max(distances, default=(None, None))


def unjudged_sources(
    policy: Policy, run: RunFolder, comparison: Comparison, sources: Collection[str]
) -> Iterator[str]:
    """Notes on the sources that no limit in ``[source]`` was compared with; ``sources`` as above."""
    layer = _judged_layer(policy, run, comparison)
    rows = _judged_sources(comparison, layer, policy.min_tokens)
    if "min_tokens_ratio" in policy.source_limits:
        rows += _shrinkable(comparison, layer, policy.min_tokens, sources)
    judged = {row["source"] for row in rows}
    unjudged = [row for row in _sources_at(comparison, layer) if row["source"] not in judged]
    gone = [row for row in unjudged if not row["n_b"]]
    in_run = [row for row in unjudged if row["n_b"]]
    new = [row for row in in_run if not row["n_a"]]
    if new:
        yield (
            f"[source] judged nothing of {count(len(new), 'new source')}, which have nothing to be "
            f"held against: {_named(new, 'n_b')}; max_new_sources limits them."
        )
    if gone:
        yield (
            f"[source] judged nothing of {count(len(gone), 'source')} of the baseline without a "
            f"token in this run: {_named(gone, 'n_a')}; max_vanished_sources limits them."
        )
    if small := len(in_run) - len(new):
        yield (
            f"[source] judged nothing of {count(small, 'source')} under min_tokens, "
            f"{policy.min_tokens:,}."
        )


def _named(rows: Sequence[Mapping[str, Any]], tokens: str) -> str:
    """The first sources of ``rows`` by name, with their tokens; ``tokens`` is the column."""
    shown = rows[:SHOWN_SOURCES]
    names = ", ".join(f"{row['source']} ({count(row[tokens], 'token')})" for row in shown)
    if len(rows) > SHOWN_SOURCES:
        names += f" and {len(rows) - SHOWN_SOURCES:,} more"
    return names


def _judged_layer(policy: Policy, run: RunFolder, comparison: Comparison | None) -> int:
    layers = run.info["layers"]
    if comparison is not None:
        layers = comparison.drift["layer"].unique().to_pylist()
    if policy.layer is not None and policy.layer not in layers:
        raise ConfigError(
            f"the policy judges layer {policy.layer}, which was not recorded; there are {layers}"
        )
    return max(layers) if policy.layer is None else policy.layer


def _rule(key: str, limit: float, value: float | None, where: str | None, meaning: str) -> Rule:
    if value is None:
        return Rule(key, limit, None, None, where, meaning)
    passed = value >= limit if is_minimum(key) else value <= limit
    finite = value if math.isfinite(value) else None
    return Rule(key, limit, finite, passed, where, meaning)


def is_minimum(key: str) -> bool:
    return key.removeprefix("source.").startswith("min_")


LimitValues = tuple[str, tuple[float | None, str | None]]


def _of_run(run: RunFolder, lost: Losses) -> Iterator[LimitValues]:
    """Values of ``RUN_LIMITS``; losses come with the worst files."""
    counts = run.info["counts"]
    num_documents = max(1, counts["documents"])
    num_quarantined = len(run.info["quarantined"])
    num_shards = max(1, counts["shards"] + num_quarantined)
    yield "quarantined_documents", (counts["quarantined"] / num_documents, None)
    yield "quarantined_shards", (num_quarantined / num_shards, None)
    yield "empty_documents", (counts["empty"] / num_documents, None)
    files = losses.worst_files(lost) or None
    yield "lost_bytes", (lost.lost_bytes, files)
    yield "lost_share", (lost.share, files)
    documents = None if files is None else f"{losses.documents_text(lost)}: {files}"
    lost_documents = math.inf if lost.lost_unknown else lost.lost_documents
    yield "lost_documents", (lost_documents, documents)
    replaced_files = losses.replaced_files(lost) or None
    replaced_share = min(1.0, lost.replaced / max(1, counts["chars"]))
    yield "replaced_characters", (lost.replaced, replaced_files)
    yield "replaced_share", (replaced_share, replaced_files)


def _of_comparison(comparison: Comparison, layer: int) -> Iterator[LimitValues]:
    """Values of ``DRIFT_LIMITS`` at ``layer``; of sources only where both runs have their table."""
    drift = _at(comparison.drift, layer).to_pylist()
    whole = next(row for row in drift if row["source"] is None)
    if whole["n_a"] and whole["n_b"]:
        for key in DISTANCE_LIMITS:
            yield key, (_distance(whole, key), None)
    ratio = _ratio(whole["n_b"], whole["n_a"])
    yield "min_tokens_ratio", (ratio, None)
    yield "max_tokens_ratio", (ratio, None)
    yield from _of_classes(_at(comparison.classes, layer).to_pylist())
    movers = _at(comparison.movers, layer)
    yield "max_moved_types", (compare.num_moved(movers), None)
    for status in ("new", "vanished"):
        num_types = pc.sum(pc.equal(movers["status"], status)).as_py()
        yield f"max_{status}_types", (num_types or 0, None)
    if sources := _sources_at(comparison, layer):
        yield "max_new_sources", (sum(not row["n_a"] for row in sources), None)
        yield "max_vanished_sources", (sum(not row["n_b"] for row in sources), None)


def _of_classes(rows: Sequence[Mapping[str, Any]]) -> Iterator[LimitValues]:
    """Largest shifts over classes, from rows of ``CLASS_DRIFT_SCHEMA``."""
    shares, high_shares = [], []
    for row in rows:
        shares.append((abs(row["share_b"] - row["share_a"]), row["class"]))
        if row["n_a"] and row["n_b"]:
            high_shares.append((abs(row["share_high_b"] - row["share_high_a"]), row["class"]))
    yield "class_share_shift", max(shares, default=(0.0, None))
    yield "class_high_shift", max(high_shares, default=(0.0, None))


def _at(table: pa.Table, layer: int) -> pa.Table:
    return table.filter(pc.equal(table["layer"], layer))


def _sources_at(comparison: Comparison, layer: int) -> list[dict[str, Any]]:
    """Rows of ``DRIFT_SCHEMA`` of all sources at ``layer``."""
    rows = _at(comparison.drift, layer).to_pylist()
    return [row for row in rows if row["source"] is not None]


def _judged_sources(comparison: Comparison, layer: int, min_tokens: int) -> list[dict[str, Any]]:
    """Sources with ``min_tokens`` in both runs."""
    least = max(1, min_tokens)
    rows = _sources_at(comparison, layer)
    return [row for row in rows if min(row["n_a"], row["n_b"]) >= least]


def _shrinkable(
    comparison: Comparison, layer: int, min_tokens: int, sources: Collection[str]
) -> list[dict[str, Any]]:
    """Sources with ``min_tokens`` in the baseline that this run read, even without a token."""
    read = [f"{name}/" for name in sources]
    found = []
    for row in _sources_at(comparison, layer):
        prefix = f"{row['source']}/"
        was_read = row["n_b"] or any(name.startswith(prefix) for name in read)
        if was_read and row["n_a"] >= max(1, min_tokens):
            found.append(row)
    return found


def _distance(row: dict[str, Any], key: str) -> float:
    """Value of a ``DISTANCE_LIMITS`` key in a ``DRIFT_SCHEMA`` row with tokens in both runs."""
    if key == "share_high_shift":
        return float(abs(row["share_high_b"] - row["share_high_a"]))
    if key in row:
        return float(row[key])
    quartile = key.removesuffix("_shift")
    return abs(_ratio(row[f"{quartile}_b"], row[f"{quartile}_a"]) - 1)


def _ratio(a: float, b: float) -> float:
    if b:
        return a / b
    return math.inf if a else 1.0
