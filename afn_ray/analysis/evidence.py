"""Evidence that a policy judges, and the figures of a whole run and its
comparison for each limit.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from afn_ray.analysis import own_parts, scalars
from afn_ray.analysis.baselines import Baseline
from afn_ray.analysis.own_parts import OwnParts
from afn_ray.reduce import compare, duplicates, losses, near_duplicates
from afn_ray.reduce.compare import Comparison
from afn_ray.reduce.group_drift import grouped_by
from afn_ray.reduce.losses import Losses
from afn_ray.store.manifest import RunFolder

OF_SCALARS = (
    "q1_shift",
    "q2_shift",
    "q3_shift",
    "share_high_shift",
    "class_share_shift",
    "class_high_shift",
    "min_tokens_ratio",
    "max_tokens_ratio",
)
"""Limits on scalar figures, which may be held against medians of several nights."""


class Found(NamedTuple):
    """A value to hold against a limit, or the reason why there is none.

    A value with a reason is a bound: it may show that the limit is broken, not that it holds.
    """

    value: float | None
    where: str | None = None  # source, class or files that it belongs to
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Evidence:
    """The run and the baseline that a policy judges."""

    run: RunFolder
    lost: Losses  # what the run lost
    sources: Collection[str]  # that the run read, with tokens or not, named as in ``comparison``
    comparison: Comparison | None
    baseline: Baseline
    layer: int  # that is judged
    is_first: bool = False  # ``Night.first_night``
    own: OwnParts = field(init=False, compare=False, repr=False)  # figures of the run's parts

    def __post_init__(self) -> None:
        object.__setattr__(self, "own", OwnParts(self.run))

    @property
    def groups_lacking(self) -> str | None:
        """Reason why the groups cannot be held against the baseline: it has others; None if they
        can.
        """
        if self.comparison is None or self.comparison.groups.by is not None:
            return None
        if (by := grouped_by(self.run)) is None:
            return None
        if self.is_first:
            return f"first night of groups by {by}: the baseline is not grouped by it"
        return f"the baseline is not grouped by {by}; --first-night excuses the first such night"


LimitValues = tuple[str, Found]
WITHOUT_SOURCES = Found(None, reason="the baseline has no table of sources")


def figures(evidence: Evidence) -> dict[str, Found]:
    """The figure for each limit on the whole run; without a baseline, those of the run alone."""
    found = dict(_of_run(evidence.run, evidence.lost))
    found["junk_share"] = _junk(evidence.run)
    if evidence.comparison is not None:
        found |= _of_comparison(evidence.comparison, evidence.layer)
        found |= _of_scalars_of(evidence, evidence.comparison)
    return found


def _junk(run: RunFolder) -> Found:
    """The share of strange documents, with the source that has most of their tokens."""
    if (lacking := own_parts.lacking(run, "junk_share")) is not None:
        return Found(None, reason=lacking)
    return Found(own_parts.junk_of_run(run), own_parts.most_junk(run))


def _of_run(run: RunFolder, lost: Losses) -> Iterator[LimitValues]:
    """Values of ``RUN_LIMITS``; losses come with the worst files."""
    counts = run.info["counts"]
    num_documents = max(1, _num_read(run))
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
    yield from _of_copies(run)


def _num_read(run: RunFolder) -> int:
    """The number of documents that ``run`` read, with the copies that it does not count."""
    num: int = run.info["counts"]["documents"]
    found = duplicates.figures_of(run.info)
    if found is None or duplicates.choice_of(run.info) == duplicates.KEEP:
        return num
    return num + found.documents


def _of_copies(run: RunFolder) -> Iterator[LimitValues]:
    """Values of the limits on copies, near-copies and repeated ids, with numbers and examples."""
    near = near_duplicates.share_of(run.info)
    reason = near_duplicates.NOT_LOOKED_FOR if near is None else None
    sentence = near_duplicates.describe(run.info) or None
    yield "near_duplicate_share", Found(near, sentence, reason)
    found = duplicates.figures_of(run.info)
    if found is None:
        unknown = Found(None, reason=duplicates.NOT_COUNTED)
        yield from (("duplicate_share", unknown), ("repeated_ids", unknown))
        return
    copies, ids = duplicates.describe(found, duplicates.choice_of(run.info))
    share = duplicates.duplicate_share(run.info, found)
    yield "duplicate_share", Found(share, copies or None)
    yield "repeated_ids", Found(found.repeated_ids, ids or None)


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
    sources = sources_at(comparison, layer)
    new, vanished = WITHOUT_SOURCES, WITHOUT_SOURCES
    if sources:
        new = Found(sum(not source.n_a for source in sources))
        vanished = Found(sum(not source.n_b for source in sources))
    yield "max_new_sources", new
    yield "max_vanished_sources", vanished


def _of_scalars_of(evidence: Evidence, comparison: Comparison) -> Iterator[LimitValues]:
    """Values of ``OF_SCALARS``: against the baseline, or against medians of several nights."""
    baseline, layer = evidence.baseline, evidence.layer
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
    return Found(distance(whole, key))


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


class ComparedPart(NamedTuple):
    """A source or a group of either run, with its tokens in both."""

    name: str
    n_a: int
    n_b: int
    drift: Mapping[
        str, Any
    ]  # row of ``DRIFT_SCHEMA`` or ``GROUP_DRIFT_SCHEMA``; limits name its columns

    @classmethod
    def of(cls, name: str, drift: Mapping[str, Any]) -> ComparedPart:
        return cls(name, drift["n_a"], drift["n_b"], drift)


def sources_at(comparison: Comparison, layer: int) -> list[ComparedPart]:
    """All sources at ``layer``."""
    rows = _at(comparison.drift, layer).to_pylist()
    return [ComparedPart.of(row["source"], row) for row in rows if row["source"] is not None]


def distance(row: Mapping[str, Any], key: str) -> float:
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
