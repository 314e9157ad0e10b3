"""Rank documents by how far their features are from those of their source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from afn_ray.reduce.features import BIN_MASK
from afn_ray.reduce.histogram import (
    BIN_BITS,
    Histogram,
    to_values,
)
from afn_ray.reduce.sources import Sources
from afn_ray.reduce.stats import Floats, Ints, is_high, mean_and_variance, quantile_index
from afn_ray.schema import (
    FEATURES,
    SCREENED_SCHEMA,
    SOURCES_SCHEMA,
)

LEAST_DOCS = 20
"""Smallest number of documents in a source that is compared with itself."""
MAD_TO_SD = 1.4826
"""Ratio of the standard deviation to the MAD in a normal distribution."""
LEAST_SCALE = 1e-9
"""Smallest divisor of a z, for a source whose documents are all equal."""
REASON_Z = 3.0
"""Absolute z from which a feature is named among the reasons."""


class Spread(NamedTuple):
    """Statistics of each source; the last column is all sources together."""

    median: Floats  # of the features, [n_features, n_sources + 1]
    mad: Floats  # of the features, [n_features, n_sources + 1]
    variance: Floats  # of the tokens' strengths, [n_sources + 1]
    n_docs: Ints  # [n_sources + 1]


RANKED = pa.schema(
    [f for f in SCREENED_SCHEMA if f.name not in ("rank", "text")]
    + [
        pa.field("shard", pa.string()),
        pa.field("in_shard", pa.int32()),
        pa.field("hash", pa.int64()),
    ]
)
"""Schema of strange documents before their texts are read."""


def describe(
    names: Sequence[str],
    layers: Sequence[int],
    labels: pa.Table,
    sums: tuple[Histogram, ...],
    read: Mapping[str, Mapping[str, Any]],
) -> tuple[Spread, pa.Table]:
    """Spread of each source, and the ``sources`` table; ``read`` is the result of ``sums_by_source``."""
    strengths, of_docs, documents = sums[: len(layers)], sums[len(layers) : -1], sums[-1]
    n_documents = np.zeros(len(names), np.int64)
    n_documents[documents.keys] = documents.counts
    spreads = [
        [*_by_source(h, len(names)), Histogram.of(h.keys & BIN_MASK, h.counts)] for h in of_docs
    ]
    deepest = [*_by_source(strengths[-1], len(names))]
    deepest.append(Histogram.of(strengths[-1].keys & BIN_MASK, strengths[-1].counts))
    spread = Spread(
        np.array([[_median(to_values(h.keys), h.counts) for h in row] for row in spreads]),
        np.array([[_mad(h) for h in row] for row in spreads]),
        np.array([_variance(h) for h in deepest]),
        np.array([h.n for h in spreads[0]]),
    )
    q3 = {r["layer"]: r["q3"] for r in labels.to_pylist() if r["population"] == "tokens"}
    rows = []
    for layer, histogram in zip(layers, strengths, strict=True):
        for at, h in enumerate(_by_source(histogram, len(names))):
            high = is_high(to_values(h.keys), q3[layer])
            rows.append(
                {
                    **read[names[at]],
                    "layer": layer,
                    "source": names[at],
                    "n_documents": int(n_documents[at]),
                    "n_docs": int(spread.n_docs[at]),
                    "n": h.n,
                    "n_high": int(h.counts[high].sum()),
                    "bins": h.keys,
                    "counts": h.counts,
                }
            )
    return spread, pa.Table.from_pylist(rows, SOURCES_SCHEMA)


def _by_source(histogram: Histogram, num_sources: int) -> Iterator[Histogram]:
    """The histogram of each source, from keys of a source and a bin."""
    ends = np.searchsorted(histogram.keys, np.arange(num_sources + 1) << BIN_BITS)
    for begin, end in pairwise(ends.tolist()):
        yield Histogram(histogram.keys[begin:end] & BIN_MASK, histogram.counts[begin:end])


def _median(values: npt.NDArray[Any], counts: Ints) -> float:
    """Median (inverse CDF) of ``values`` in ascending order; nan if there are none."""
    if not len(values):
        return float("nan")
    return float(values[quantile_index(counts, 1, 2)])


def _mad(h: Histogram) -> float:
    """Median absolute deviation from the median; nan if there are no values."""
    values = to_values(h.keys).astype(np.float64)
    away = np.abs(values - _median(values, h.counts))
    order = np.argsort(away, kind="stable")
    return _median(away[order], h.counts[order])


def _variance(h: Histogram) -> float:
    """Population variance; nan if there are no values."""
    if not h.n:
        return float("nan")
    return mean_and_variance(to_values(h.keys).astype(np.float64), h.counts)[1]


def rank(
    layer: int,
    worst: int,
    documents: pa.Table,
    sources: Sources,
    spread: Spread,
    *repeated: Histogram,
) -> list[pa.Table]:
    """The ``worst`` strangest of ``documents``, as in ``RANKED``."""
    own = sources.index_of(documents["source"].combine_chunks())
    corpus = len(sources.names)  # index of all sources together
    against = np.where(spread.n_docs[own] < LEAST_DOCS, corpus, own)
    n = documents["n_tokens"].to_numpy().astype(np.float64)
    values = np.array([documents[name].to_numpy() for name in FEATURES], np.float64)
    median = spread.median[:, against]
    z = _z(values, median, spread, against, n)
    hashes = documents["hash"].to_numpy()
    copies = _copies(hashes, repeated)
    shared = np.log2(copies) * np.log2(n) / 2
    score = np.maximum(np.abs(z).max(axis=0), shared) if len(n) else np.empty(0)
    chosen = _first_of_each_text(score, documents["doc"].to_numpy(), hashes)[:worst]
    reasons = []
    for at in chosen.tolist():
        of = "the corpus" if against[at] == corpus else "its source"
        found = _reasons_by_feature(z[:, at], values[:, at], median[:, at], of)
        if copies[at] > 1:
            found.append((shared[at], f"{copies[at]:,} documents have this text"))
        reasons.append(_strongest(found))
    columns = {
        "layer": pa.array(np.full(len(chosen), layer, np.int16)),
        "n_copies": pa.array(copies[chosen]),
        "score": pa.array(score[chosen]),
        "reason": pa.array(reasons, pa.string()),
    }
    table = documents.take(chosen)
    for name, column in columns.items():
        table = table.append_column(name, column)
    return [table.select(RANKED.names).cast(RANKED)]


def _z(values: Floats, median: Floats, spread: Spread, against: Ints, n: Floats) -> Floats:
    """Distance of each feature from its ``median``, in robust standard deviations.

    ``values`` and ``median`` are [n_features, n_docs], ``against`` (the source compared with) and
    ``n`` (tokens) [n_docs].
    """
    variance = spread.variance[against]
    noise = np.array([_noise(name, median[at], variance, n) for at, name in enumerate(FEATURES)])
    scale = np.sqrt((MAD_TO_SD * spread.mad[:, against]) ** 2 + noise)
    return np.asarray((values - median) / np.maximum(scale, LEAST_SCALE))


def _copies(hashes: Ints, repeated: Sequence[Histogram]) -> Ints:
    """Number of documents with each text; ``repeated`` counts the hashes that occur twice."""
    copies = np.ones(len(hashes), np.int64)
    for part in repeated:
        if len(part.keys):
            at = np.minimum(np.searchsorted(part.keys, hashes), len(part.keys) - 1)
            copies = np.where(part.keys[at] == hashes, part.counts[at], copies)
    return copies


def _first_of_each_text(score: Floats, docs: Ints, hashes: Ints) -> Ints:
    """Rows by descending ``score``; of documents with the same text, only the first."""
    first = np.lexsort((docs, -score))
    _, distinct = np.unique(hashes[first], return_index=True)
    return np.asarray(first[np.sort(distinct)])


def _noise(feature: str, median: Floats, variance: Floats, n: Floats) -> Floats:
    """Squared noise of a feature, as in the table of ``reduce.screen``."""
    if feature == "mean_strength":
        return variance / n
    if feature == "share_distinct":
        p = np.clip(n ** (median - 1), 1 / (n + 2), 1 - 1 / (n + 2))
        return np.asarray(p * (1 - p) / n / np.log(np.maximum(n, 2)) ** 2)
    p = (median * n + 1) / (n + 2)
    return np.asarray(p * (1 - p) / n)


def _reasons_by_feature(
    z: Floats, values: Floats, medians: Floats, of: str
) -> list[tuple[float, str]]:
    """The distance of each feature of a document, and a sentence on it."""
    reasons = []
    for at, name in enumerate(FEATURES):
        text = f"{name} {values[at]:.4g}, median of {of} {medians[at]:.4g} (z {z[at]:+.1f})"
        reasons.append((float(abs(z[at])), text))
    return reasons


def _strongest(reasons: list[tuple[float, str]]) -> str:
    """Up to three reasons why a document is strange, the strongest first; at least one."""
    first, *others = sorted(reasons, key=lambda reason: -reason[0])
    others = [reason for reason in others if reason[0] >= REASON_Z]
    return "; ".join(text for _, text in (first, *others[:2]))


def strangest_of(worst: int, *tables: pa.Table) -> list[pa.Table]:
    """The ``worst`` strangest documents of ``tables``."""
    table = pa.concat_tables(tables)
    score, docs, hashes = (table[name].to_numpy() for name in ("score", "doc", "hash"))
    return [table.take(_first_of_each_text(score, docs, hashes)[:worst])]
