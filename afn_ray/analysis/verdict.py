"""Judge one run and its comparison with a baseline by a policy."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from afn_ray.analysis import scalars
from afn_ray.analysis.baselines import Baseline
from afn_ray.analysis.policy import DRIFT_LIMITS, RUN_LIMITS, SOURCE_LIMITS, WHOLE, Policy
from afn_ray.errors import ConfigError
from afn_ray.reduce import compare, losses
from afn_ray.reduce.compare import Comparison
from afn_ray.reduce.losses import Losses
from afn_ray.store.manifest import RunFolder
from afn_ray.text import count

SHOWN_SOURCES = 5
"""Largest number of sources that a note names."""
OF_SOURCES = ("max_new_sources", "max_vanished_sources")
OF_SCALARS = ("q1_shift", "q2_shift", "q3_shift", "share_high_shift", "class_share_shift",
              "class_high_shift", "min_tokens_ratio", "max_tokens_ratio")  # fmt: skip
"""Limits on scalar figures, which may be held against medians of several nights."""
HELD, BROKEN, NOT_JUDGED = "held", "broken", "not judged"
"""States of a limit and of a night."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One limit and the value compared with it."""

    key: str  # name in the policy; source.psi for psi in [source]
    limit: float
    value: float | None  # None: infinite, or unknown because nothing could be compared
    passed: bool | None  # None: not judged
    where: str | None  # source, class, files or layer that the value belongs to
    meaning: str
    reason: str | None = None  # why it was not judged

    @property
    def state(self) -> str:
        return {True: HELD, False: BROKEN, None: NOT_JUDGED}[self.passed]


class Found(NamedTuple):
    """A value to hold against a limit, or the reason why there is none."""

    value: float | None
    where: str | None = None  # source, class or files that it belongs to
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Evidence:
    """The run and the baseline that a policy judges."""

    run: RunFolder
    lost: Losses  # what the run lost
    sources: Collection[
        str
    ]  # that the run read, with tokens or without; named as in ``comparison``
    comparison: Comparison | None
    baseline: Baseline


def judge(policy: Policy, evidence: Evidence) -> Iterator[Rule]:
    """Compare ``evidence`` with each limit of ``policy``, in the policy's order.

    What cannot be compared is not judged, with the reason. Raises ``ConfigError`` for limits that
    this run's layers or tables can never be compared with.
    """
    run, comparison = evidence.run, evidence.comparison
    layer = judged_layer(policy, run, comparison)
    limits_sources = policy.source_limits or policy.limits.keys() & set(OF_SOURCES)
    if limits_sources and "sources" not in run.info["tables"]:
        raise ConfigError(
            f"the policy limits sources, but run {run.uri} has no table of them: run it with its "
            "screening (--screen)"
        )
    measured = dict(_of_run(run, evidence.lost))
    if comparison is not None:
        measured |= _of_comparison(comparison, layer)
        measured |= _of_scalars_of(evidence, comparison, layer)
    nothing = Found(None, reason=evidence.baseline.lacking)
    meanings = RUN_LIMITS | DRIFT_LIMITS
    for key, limit in policy.limits.items():
        yield _rule(key, limit, measured.get(key, nothing), meanings[key])
    for key, limit in policy.source_limits.items():
        found = nothing
        if comparison is not None:
            found = _worst_source(policy, key, comparison, layer, evidence.sources)
        yield _rule(f"source.{key}", limit, found, SOURCE_LIMITS[key])


def state_of(rules: Sequence[Rule], unjudged: str | None, excused: str | None) -> str:
    """The state of a night with ``rules``.

    ``unjudged`` is the policy's: what a limit counts as that was not judged. Limits that were not
    judged for the reason ``excused`` do not count.
    """
    if any(rule.passed is False for rule in rules):
        return BROKEN
    open_rules = [rule for rule in rules if rule.passed is None]
    if excused is not None:
        open_rules = [rule for rule in open_rules if rule.reason != excused]
    if not open_rules:
        return HELD
    return {"pass": HELD, "fail": BROKEN, None: NOT_JUDGED}[unjudged]


def reasons(rules: Sequence[Rule]) -> Iterator[str]:
    """The limits that were not judged, as text: a line for each reason."""
    by_reason: dict[str, list[str]] = {}
    for rule in rules:
        if rule.reason is not None:
            by_reason.setdefault(rule.reason, []).append(rule.key)
    for reason, keys in by_reason.items():
        yield f"{', '.join(keys)}: {reason}"


def _worst_source(
    policy: Policy, key: str, comparison: Comparison, layer: int, sources: Collection[str]
) -> Found:
    """The worst value of a ``SOURCE_LIMITS`` key, and its source."""
    least = f"{policy.min_tokens:,} tokens"
    if not _sources_at(comparison, layer):
        return _WITHOUT_SOURCES
    if key == "min_tokens_ratio":
        rows = _shrinkable(comparison, layer, policy.min_tokens, sources)
        ratios = [(row["n_b"] / row["n_a"], row["source"]) for row in rows]
        if ratios:
            return Found(*min(ratios))
        return Found(None, reason=f"no source that was read has {least} in the baseline")
    rows = _judged_sources(comparison, layer, policy.min_tokens)
    distances = [(_distance(row, key), row["source"]) for row in rows]
    if distances:
        return Found(*max(distances))
    return Found(None, reason=f"no source has {least} in both runs")


def value_text(rule: Rule) -> str:
    """The value of ``rule``; empty if it was not judged."""
    if rule.passed is None:
        return ""
    if rule.value is None:
        return "unknown" if rule.key == "lost_documents" else "infinite"
    return f"{rule.value:,}" if rule.key in WHOLE else f"{rule.value:.5g}"


def limit_text(rule: Rule) -> str:
    """The limit of ``rule``, with its sign."""
    sign = ">=" if is_minimum(rule.key) else "<="
    return f"{sign} {rule.limit:,}" if rule.key in WHOLE else f"{sign} {rule.limit:g}"


def unjudged_sources(
    policy: Policy, run: RunFolder, comparison: Comparison, sources: Collection[str]
) -> Iterator[str]:
    """Notes on the sources that no limit in ``[source]`` was compared with; ``sources`` as above."""
    layer = judged_layer(policy, run, comparison)
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


def judged_layer(policy: Policy, run: RunFolder, comparison: Comparison | None) -> int:
    layers = run.info["layers"]
    if comparison is not None:
        layers = comparison.drift["layer"].unique().to_pylist()
    if policy.layer is not None and policy.layer not in layers:
        raise ConfigError(
            f"the policy judges layer {policy.layer}, which was not recorded; there are {layers}"
        )
    return max(layers) if policy.layer is None else policy.layer


def _rule(key: str, limit: float, found: Found, meaning: str) -> Rule:
    value, where, reason = found
    if value is None:
        return Rule(key, limit, None, None, where, meaning, reason)
    passed = value >= limit if is_minimum(key) else value <= limit
    finite = value if math.isfinite(value) else None
    return Rule(key, limit, finite, passed, where, meaning)


def is_minimum(key: str) -> bool:
    return key.removeprefix("source.").startswith("min_")


LimitValues = tuple[str, Found]
_WITHOUT_SOURCES = Found(None, reason="the baseline has no table of sources")


def _of_run(run: RunFolder, lost: Losses) -> Iterator[LimitValues]:
    """Values of ``RUN_LIMITS``; losses come with the worst files."""
    counts = run.info["counts"]
    num_documents = max(1, counts["documents"])
    num_quarantined = len(run.info["quarantined"])
    num_shards = max(1, counts["shards"] + num_quarantined)
    yield "quarantined_documents", Found(counts["quarantined"] / num_documents)
    yield "quarantined_shards", Found(num_quarantined / num_shards)
    yield "empty_documents", Found(counts["empty"] / num_documents)
    files = losses.worst_files(lost) or None
    yield "lost_bytes", Found(lost.lost_bytes, files)
    yield "lost_share", Found(lost.share, files)
    documents = None if files is None else f"{losses.documents_text(lost)}: {files}"
    lost_documents = math.inf if lost.lost_unknown else lost.lost_documents
    yield "lost_documents", Found(lost_documents, documents)
    replaced_files = losses.replaced_files(lost) or None
    replaced_share = min(1.0, lost.replaced / max(1, counts["chars"]))
    yield "replaced_characters", Found(lost.replaced, replaced_files)
    yield "replaced_share", Found(replaced_share, replaced_files)


def _of_comparison(comparison: Comparison, layer: int) -> Iterator[LimitValues]:
    """Values of ``DRIFT_LIMITS`` at ``layer`` that are not among ``OF_SCALARS``."""
    whole = scalars.of_comparison(comparison, layer).whole
    for key in ("psi", "ks", "js"):
        yield key, _of_whole(whole, key)
    movers = _at(comparison.movers, layer)
    num_of = Counter(movers["status"].to_pylist())
    no_type = Found(None, reason="no type is in both runs")
    moved = Found(compare.num_moved(movers)) if num_of["both"] else no_type
    yield "max_moved_types", moved
    for status in ("new", "vanished"):
        yield f"max_{status}_types", Found(num_of[status])
    sources = _sources_at(comparison, layer)
    new, vanished = _WITHOUT_SOURCES, _WITHOUT_SOURCES
    if sources:
        new = Found(sum(not row["n_a"] for row in sources))
        vanished = Found(sum(not row["n_b"] for row in sources))
    yield "max_new_sources", new
    yield "max_vanished_sources", vanished


def _of_scalars_of(evidence: Evidence, comparison: Comparison, layer: int) -> Iterator[LimitValues]:
    """Values of ``OF_SCALARS``: against the baseline, or against medians of several nights."""
    baseline = evidence.baseline
    if baseline.is_median and not baseline.median_of:
        for key in OF_SCALARS:
            yield key, Found(None, reason=baseline.lacking)
        return
    figures = scalars.of_comparison(comparison, layer)
    if baseline.is_median:
        figures = scalars.of_medians(comparison, baseline.median_of, layer)
    for key in ("q1_shift", "q2_shift", "q3_shift", "share_high_shift"):
        yield key, _of_whole(figures.whole, key)
    ratio = Found(None, reason="the baseline has no token")
    if figures.whole["n_a"]:
        ratio = Found(figures.whole["n_b"] / figures.whole["n_a"])
    yield "min_tokens_ratio", ratio
    yield "max_tokens_ratio", ratio
    yield from _of_classes(figures.classes)


def _of_whole(whole: Mapping[str, Any], key: str) -> Found:
    """Value of a ``DISTANCE_LIMITS`` key of the whole run."""
    for name, run in (("n_b", "this run"), ("n_a", "the baseline")):
        if not whole[name]:
            return Found(None, reason=f"{run} has no token")
    return Found(_distance(whole, key))


def _of_classes(rows: Sequence[Mapping[str, Any]]) -> Iterator[LimitValues]:
    """Largest shifts over classes, from rows of ``CLASS_DRIFT_SCHEMA``."""
    shares, high_shares = [], []
    for row in rows:
        shares.append((abs(row["share_b"] - row["share_a"]), row["class"]))
        if row["n_a"] and row["n_b"]:
            high_shares.append((abs(row["share_high_b"] - row["share_high_a"]), row["class"]))
    of_shares = Found(*max(shares)) if shares else Found(None, reason="neither run has a class")
    no_class = Found(None, reason="no class is in both runs")
    yield "class_share_shift", of_shares
    yield "class_high_shift", Found(*max(high_shares)) if high_shares else no_class


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


def _distance(row: Mapping[str, Any], key: str) -> float:
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
