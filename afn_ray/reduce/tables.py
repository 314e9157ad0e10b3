"""Rows of the reduced tables: thresholds, histograms, types and shards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from afn_ray.reduce import lexicon
from afn_ray.reduce.histogram import (
    BIN_BITS,
    BIN_MASK,
    DEFINITION,
    SPECIAL_KEY,
    Histogram,
    SeriesSummary,
    starts,
    to_values,
)
from afn_ray.reduce.stats import is_high, mean_and_variance, quantile_rank, wilson
from afn_ray.schema import (
    HISTOGRAM_SCHEMA,
    SHARDS_SCHEMA,
    THRESHOLDS_SCHEMA,
    UNTAGGED,
    VOCABULARY_SCHEMA,
)
from afn_ray.store import checksums, layout
from afn_ray.store.commits import Commit

STATISTICS_SCHEMA = pa.schema(
    [pa.field("special", pa.bool_(), nullable=False)]
    + [pa.field(name, pa.int64(), nullable=False) for name in ("n_word_start", "n_whole")]
    + [f for f in VOCABULARY_SCHEMA if f.name in
       ("token_id", "n", "n_docs", "mean", "sd", "min", "q1", "q2", "q3", "max", "n_high")]
)  # fmt: skip
"""Schema of a type's statistics, before the vocabulary adds texts and classes."""


class Texts(NamedTuple):
    """Texts of a vocabulary, both by token id."""

    pieces: Sequence[str]  # as the tokenizer writes them
    readable: Sequence[str]  # as people read them


def shards_table(measure_id: str, commits: Sequence[Commit], num_bytes: Sequence[int]) -> pa.Table:
    """The ``shards`` table: files of each shard and their numbers of rows, in plan order."""
    tables = [SHARDS_SCHEMA.empty_table()]
    rows: list[dict[str, Any]] = []
    doc_offset = 0
    for ordinal, (commit, size) in enumerate(zip(commits, num_bytes, strict=True)):
        counts, files = commit.counts, commit.files
        folder = f"shards/{measure_id}/{commit.shard}"
        forward = max(1, counts["forward_tokens"])
        rows.append(
            {
                "ordinal": ordinal,
                "shard": commit.shard,
                "doc_offset": doc_offset,
                "n_documents": counts["documents"],
                "n_empty": counts["empty"],
                "n_quarantined": counts["quarantined"],
                "n_tokens": counts["tokens"],
                "n_windows": counts["windows"],
                "n_replaced": counts["replaced"],
                **{name: counts[name] for name in ("lost_bytes", "lost_documents", "lost_unknown")},
                "padding_share": max(0.0, 1 - counts["tokens"] / forward),
                "num_bytes": size,
                "token_bytes": files["tokens"]["bytes"],
                "document_bytes": files["documents"]["bytes"],
                "summary_bytes": files["summary"]["bytes"],
                **{
                    f"{t}_bytes": files[t]["bytes"] if t in files else 0
                    for t in layout.NEURON_TABLES
                },
                "seconds": commit.seconds,
                **{
                    f"{t}_file": f"{folder}/{files[t]['name']}"
                    for t in (*layout.TABLES, "neurons")
                    if t in files
                },
            }
        )
        doc_offset += counts["documents"]
        if len(rows) == checksums.AHEAD:
            tables.append(pa.Table.from_pylist(rows, SHARDS_SCHEMA))
            rows = []
    return pa.concat_tables([*tables, pa.Table.from_pylist(rows, SHARDS_SCHEMA)]).combine_chunks()


def histogram_table(layer: int, special: bool, histogram: Histogram) -> pa.Table:
    """Rows of ``HISTOGRAM_SCHEMA`` for one layer, of special or of normal tokens."""
    n = len(histogram.keys)
    columns = [
        np.full(n, layer, np.int16),
        np.full(n, special),
        to_values(histogram.keys),
        histogram.counts,
    ]
    return pa.Table.from_arrays([pa.array(c) for c in columns], schema=HISTOGRAM_SCHEMA)


def threshold_rows(
    layer: int, histogram: Histogram, n_special: int, sink_factor: float
) -> list[dict[str, Any]]:
    """Thresholds of one layer: one row for all normal tokens, one for those that are no sinks.

    A sink is a token above ``sink_factor`` times the median of all normal tokens. HIGH is at or
    above Q3 of the same population. ``histogram`` holds the normal tokens.
    """
    median = (
        to_values(np.array([histogram.quantile_key(1, 2)]))[0] if histogram.n else np.float32(0)
    )
    kept = to_values(histogram.keys).astype(np.float64) <= sink_factor * float(median)
    without = Histogram(histogram.keys[kept], histogram.counts[kept])
    rows = []
    for population, h in (("tokens", histogram), ("tokens_without_sinks", without)):
        row: dict[str, Any] = {
            "layer": layer,
            "population": population,
            "n": h.n,
            "n_high": 0,
            "n_sinks": histogram.n - without.n,
            "n_special": n_special,
            "sink_factor": sink_factor,
            "definition": DEFINITION,
        }
        if h.n:
            keys = [h.quantile_key(i, 4) for i in (1, 2, 3)]
            q1, q2, q3 = (float(v) for v in to_values(np.array(keys)))
            row |= {"q1": q1, "q2": q2, "q3": q3, "n_high": int(h.counts[h.keys >= keys[2]].sum())}
        rows.append(row | _moments(h))
    return [{name: row.get(name) for name in THRESHOLDS_SCHEMA.names} for row in rows]


def _moments(h: Histogram) -> dict[str, Any]:
    """Count, mean, standard deviation, minimum and maximum; null for an empty histogram."""
    if not h.n:
        return {"n": 0, "mean": None, "sd": None, "min": None, "max": None}
    values = to_values(h.keys).astype(np.float64)
    mean, variance = mean_and_variance(values, h.counts)
    return {"n": h.n, "mean": mean, "sd": math.sqrt(variance), "min": values[0], "max": values[-1]}


def frozen_rows(
    own: Sequence[dict[str, Any]], histogram: Histogram, frozen: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """``own`` rows of a layer with the quartiles of ``frozen``.

    The counts of HIGH tokens and sinks are those of this run's tokens under these quartiles.
    """
    taken = {row["population"]: row for row in frozen}
    values = to_values(histogram.keys).astype(np.float64)
    limit = (
        taken["tokens"]["sink_factor"] * taken["tokens"]["q2"]
        if taken["tokens"]["q2"] is not None
        else np.inf
    )
    is_sink = values > limit
    rows = []
    for row in own:
        theirs = taken[row["population"]]
        which = (
            ~is_sink if row["population"] == "tokens_without_sinks" else np.full(len(values), True)
        )
        part = Histogram(histogram.keys[which], histogram.counts[which])
        high = is_high(values[which], theirs["q3"])
        rows.append(
            row
            | _moments(part)
            | theirs
            | {
                "n_high": int(part.counts[high].sum()),
                "n_sinks": int(histogram.counts[is_sink].sum()),
                "definition": f"taken from another run; there: {DEFINITION}",
            }
        )
    return rows


def type_statistics(merged: SeriesSummary, q3: float | None) -> pa.Table:
    """Statistics of every type that occurs, as in ``STATISTICS_SCHEMA``.

    ``q3`` is the layer's threshold for HIGH; None means that no token is HIGH.
    """
    keys, counts = merged.values.keys, merged.values.counts
    types = keys >> BIN_BITS
    first = starts(types)
    if not len(first):
        return STATISTICS_SCHEMA.empty_table()
    values = to_values(keys & BIN_MASK)
    n = np.add.reduceat(counts, first)
    wide = values.astype(np.float64)
    mean = np.add.reduceat(wide * counts, first) / n
    spread = wide - np.repeat(mean, np.diff(np.append(first, len(keys))))
    sd = np.sqrt(np.add.reduceat(spread**2 * counts, first) / n)
    cumulative = np.cumsum(counts)
    before = cumulative[first] - counts[first]
    quartile = {
        i: values[np.searchsorted(cumulative, before + quantile_rank(n, i, 4))] for i in (1, 2, 3)
    }
    high = is_high(values, q3)
    columns: dict[str, Any] = {
        "special": types[first] >= SPECIAL_KEY >> BIN_BITS,
        "token_id": types[first] % (SPECIAL_KEY >> BIN_BITS),
        "n": n,
        "n_docs": merged.docs.counts,
        "n_word_start": merged.word_starts.counts,
        "n_whole": merged.whole_words.counts,
        "mean": mean,
        "sd": sd,
        "min": values[first],
        "q1": quartile[1],
        "q2": quartile[2],
        "q3": quartile[3],
        "max": values[np.append(first[1:], len(keys)) - 1],
        "n_high": np.add.reduceat(np.where(high, counts, 0), first),
    }
    return _table(columns, STATISTICS_SCHEMA)


def vocabulary_table(
    layer: int,
    statistics: pa.Table,
    n_docs: int,
    texts: Texts,
    language: str,
    tags: Mapping[int, str] | None = None,
) -> pa.Table:
    """The vocabulary of one layer: ``statistics`` with texts, classes and shares, ordered by id.

    ``statistics`` holds all types in any order. ``tags`` gives the classes of types if the corpus
    is labelled; without it, classes are guessed by the words of ``language``.
    """
    statistics = statistics.sort_by([("special", "ascending"), ("token_id", "ascending")])
    columns: dict[str, Any] = {
        name: statistics[name].to_numpy() for name in statistics.column_names
    }
    ids, n, n_high = columns["token_id"].tolist(), columns["n"], columns["n_high"]
    readable = [texts.readable[i] for i in ids]
    if tags is not None:
        is_special = columns["special"].tolist()
        classes = [
            "special" if s else tags.get(i, UNTAGGED) for i, s in zip(ids, is_special, strict=True)
        ]
    else:
        kinds = [columns[name].tolist() for name in ("special", "n", "n_word_start", "n_whole")]
        classes = [
            lexicon.classify(
                text,
                special=s,
                starts_word=2 * starts >= count,
                is_whole=2 * whole >= starts,
                language=language,
            )
            for text, s, count, starts, whole in zip(readable, *kinds, strict=True)
        ]
    low, upper = wilson(n_high, n)
    columns |= {
        "layer": np.full(len(ids), layer),
        "token": [texts.pieces[i] for i in ids],
        "text": readable,
        "class": classes,
        "share_high": n_high / n,
        "share_high_low": low,
        "share_high_high": upper,
        "idf": np.log(n_docs / columns["n_docs"]),
    }
    return _table(columns, VOCABULARY_SCHEMA)


def _table(columns: dict[str, Any], schema: pa.Schema) -> pa.Table:
    return pa.Table.from_arrays([pa.array(columns[f.name], f.type) for f in schema], schema=schema)
