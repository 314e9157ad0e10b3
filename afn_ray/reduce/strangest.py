"""Rank documents by how far their features are from those of their source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from afn_ray.reduce.histogram import (
    BIN_BITS,
    BIN_MASK,
    Histogram,
    by_index,
    to_values,
)
from afn_ray.reduce.sources import Sources
from afn_ray.reduce.stats import Float64s, Ints, is_high, mean_and_variance, quantile_index
from afn_ray.schema import FEATURES, SCREENED_SCHEMA, SOURCES_SCHEMA, STRANGE_SCHEMA

LEAST_DOCS = 20
"""Smallest number of documents in a source that is compared with itself."""
MAD_TO_SD = 1.4826
"""Ratio of the standard deviation to the MAD in a normal distribution."""
LEAST_SCALE = 1e-9
"""Smallest divisor of a z, for a source whose documents are all equal."""
STRANGE_SCORE = 4.0
"""Score from which a document counts as strange: of clean text, few do.

Of 5,867 texts of King James verses 19 reach it (7 because they are repeated, 12 with 0.14 % of the
tokens). All of 51 junk texts planted among them do, and all of 31 among 1,040 others
(``tests/bench/screen.py``; MiniLM, layer 4). The value was chosen with these; the guide's page on
audits has figures of other texts.
"""
REASON_Z = 3.0
"""Absolute z from which a feature is named among the reasons."""


class Spread(NamedTuple):
    """Statistics of each source; the last column is all sources together."""

    median: Float64s  # of the features, [n_features, n_sources + 1]
    mad: Float64s  # of the features, [n_features, n_sources + 1]
    variance: Float64s  # of the tokens' strengths, [n_sources + 1]
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
    """Spread of each source, and the ``sources`` table.

    ``sums`` are those of ``features.scan``. ``read`` is the result of ``sums_by_source``.
    """
    num_layers, num_sources = len(layers), len(names)
    num_sums = num_layers + len(FEATURES)
    features = sums[num_layers:num_sums]
    documents = sums[num_sums]
    strengths = sums[:num_layers]
    spread = _spread(strengths[-1], features, num_sources)
    n_documents = np.zeros(num_sources, np.int64)
    n_documents[documents.keys] = documents.counts
    q3 = {r["layer"]: r["q3"] for r in labels.to_pylist() if r["population"] == "tokens"}
    rows = []
    for layer, histogram in zip(layers, strengths, strict=True):
        for at, of_source in enumerate(by_index(histogram, num_sources, BIN_BITS)):
            high = is_high(to_values(of_source.keys), q3[layer])
            rows.append(
                {
                    **read[names[at]],
                    "layer": layer,
                    "source": names[at],
                    "n_documents": int(n_documents[at]),
                    "n_docs": int(spread.n_docs[at]),
                    "n": of_source.n,
                    "n_high": int(of_source.counts[high].sum()),
                    "bins": of_source.keys,
                    "counts": of_source.counts,
                }
            )
    return spread, pa.Table.from_pylist(rows, SOURCES_SCHEMA)


def _spread(strengths: Histogram, features: Sequence[Histogram], num_sources: int) -> Spread:
    """Spread of each source; ``strengths`` are those of the deepest layer."""
    of_features = [_by_source_and_all(histogram, num_sources) for histogram in features]
    of_strengths = _by_source_and_all(strengths, num_sources)
    return Spread(
        median=np.array([[_median_of(one) for one in row] for row in of_features]),
        mad=np.array([[_mad(one) for one in row] for row in of_features]),
        variance=np.array([_variance(one) for one in of_strengths]),
        n_docs=np.array([one.n for one in of_features[0]]),
    )


def _by_source_and_all(histogram: Histogram, num_sources: int) -> list[Histogram]:
    """The histogram of each source, and that of all sources together."""
    together = Histogram.of(histogram.keys & BIN_MASK, histogram.counts)
    return [*by_index(histogram, num_sources, BIN_BITS), together]


def _median_of(h: Histogram) -> float:
    """Median (inverse CDF); nan if there are no values."""
    return _median(to_values(h.keys), h.counts)


def _median(values: npt.NDArray[Any], counts: Ints) -> float:
    """Median (inverse CDF) of ``values`` in ascending order; nan if there are none."""
    if not len(values):
        return float("nan")
    return float(values[quantile_index(counts, 1, 2)])


def _mad(h: Histogram) -> float:
    """Median absolute deviation from the median; nan if there are no values."""
    values = to_values(h.keys).astype(np.float64)
    deviations = np.abs(values - _median(values, h.counts))
    order = np.argsort(deviations, kind="stable")
    return _median(deviations[order], h.counts[order])


def _variance(h: Histogram) -> float:
    """Population variance; nan if there are no values."""
    if not h.n:
        return float("nan")
    values = to_values(h.keys).astype(np.float64)
    _, variance = mean_and_variance(values, h.counts)
    return variance


def rank(
    layer: int,
    worst: int,
    documents: pa.Table,
    sources: Sources,
    spread: Spread,
    *repeated: Histogram,
) -> list[Any]:
    """The ``worst`` strangest of ``documents``, as in ``RANKED``, and sums over all strange ones.

    The sums are histograms by cell (``groups.Cells``): strange documents, and their tokens.
    """
    if not len(documents):
        return [RANKED.empty_table(), (Histogram.empty(), Histogram.empty())]
    n = documents["n_tokens"].to_numpy().astype(np.float64)
    hashes = documents["hash"].to_numpy()
    distances = _Distances.of(documents, n, sources, spread)
    copies = _copies(hashes, repeated)
    z_of_copies = np.log2(copies) * np.log2(n) / 2
    score = np.maximum(np.abs(distances.z).max(axis=0), z_of_copies)
    cells = documents["cell"].to_numpy()[score >= STRANGE_SCORE]
    tokens = documents["n_tokens"].to_numpy()[score >= STRANGE_SCORE].astype(np.int64)
    strange = Histogram.of(cells), Histogram.of(cells, tokens)
    chosen = _first_of_each_text(score, documents["doc"].to_numpy(), hashes)[:worst]
    reasons = []
    for at in chosen.tolist():
        found = distances.reasons(at)
        if copies[at] > 1:
            found.append((z_of_copies[at], f"{copies[at]:,} documents have this text"))
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
    return [table.select(RANKED.names).cast(RANKED), strange]


def strange_table(
    sources: Sequence[str], groups: Sequence[str | None], strange: tuple[Histogram, Histogram]
) -> pa.Table:
    """The sums of ``rank`` as ``STRANGE_SCHEMA``; ``groups`` are (None,) for a run without them."""
    documents, tokens = strange
    rows = []
    for cell, n_docs in zip(documents.keys.tolist(), documents.counts.tolist(), strict=True):
        source, group = divmod(cell, len(groups))
        (n,) = tokens.counts_of(np.array([cell])).tolist()
        row = {"source": sources[source], "group": groups[group], "n_docs": n_docs, "n": n}
        rows.append(row)
    return pa.Table.from_pylist(rows, STRANGE_SCHEMA)


class _Distances(NamedTuple):
    """Distances of documents from their source, or from the corpus if it is small."""

    values: Float64s  # of the features, [n_features, n_docs]
    median: Float64s  # of the features in the source compared with, [n_features, n_docs]
    z: Float64s  # distances in robust standard deviations, [n_features, n_docs]
    with_corpus: npt.NDArray[np.bool_]  # compared with all sources together, [n_docs]

    @classmethod
    def of(cls, documents: pa.Table, n: Float64s, sources: Sources, spread: Spread) -> _Distances:
        """Distances of ``documents`` with ``n`` [n_docs] tokens each."""
        own = sources.index_of(documents["source"].combine_chunks())
        with_corpus = spread.n_docs[own] < LEAST_DOCS
        all_sources = len(sources.names)  # index of all sources together
        against = np.where(with_corpus, all_sources, own)
        values = np.array([documents[name].to_numpy() for name in FEATURES], np.float64)
        median = spread.median[:, against]
        sd = MAD_TO_SD * spread.mad[:, against]
        variance = spread.variance[against]
        noise = [_noise(name, median[at], variance, n) for at, name in enumerate(FEATURES)]
        scale = np.sqrt(sd**2 + np.array(noise))
        z = (values - median) / np.maximum(scale, LEAST_SCALE)
        return cls(values, median, z, with_corpus)

    def reasons(self, at: int) -> list[tuple[float, str]]:
        """The absolute z of each feature of the document ``at``, and a sentence on it."""
        source = "the corpus" if self.with_corpus[at] else "its source"
        reasons = []
        for feature, name in enumerate(FEATURES):
            value = self.values[feature, at]
            median = self.median[feature, at]
            z = self.z[feature, at]
            text = f"{name} {value:.4g}, median of {source} {median:.4g} (z {z:+.1f})"
            reasons.append((float(abs(z)), text))
        return reasons


def _copies(hashes: Ints, repeated: Sequence[Histogram]) -> Ints:
    """Number of documents with each text; ``repeated`` counts the hashes that occur twice."""
    copies = np.ones(len(hashes), np.int64)
    for part in repeated:
        copies = np.maximum(copies, part.counts_of(hashes))
    return copies


def _first_of_each_text(score: Float64s, docs: Ints, hashes: Ints) -> Ints:
    """Rows by descending ``score``; of documents with the same text, only the first."""
    first = np.lexsort((docs, -score))
    _, distinct = np.unique(hashes[first], return_index=True)
    return np.asarray(first[np.sort(distinct)])


def _noise(feature: str, median: Float64s, variance: Float64s, n: Float64s) -> Float64s:
    """Squared noise of a feature, as in the table of ``reduce.screen``."""
    if feature == "mean_strength":
        return variance / n
    if feature == "share_distinct":
        p = np.clip(n ** (median - 1), 1 / (n + 2), 1 - 1 / (n + 2))
        log_n = np.log(np.maximum(n, 2))
        return np.asarray(p * (1 - p) / n / log_n**2)
    p = (median * n + 1) / (n + 2)
    return np.asarray(p * (1 - p) / n)


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
