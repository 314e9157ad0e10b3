"""Rows of the reduced tables: thresholds, histograms, types and shards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from afn_ray.classes import UNTAGGED
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
from afn_ray.reduce.language_uses import WordsOf
from afn_ray.reduce.stats import is_high, mean_and_variance, quantile_rank, wilson
from afn_ray.reduce.type_tags import TagShare
from afn_ray.schema import HISTOGRAM_SCHEMA, SHARDS_SCHEMA, VOCABULARY_SCHEMA
from afn_ray.store import checksums, layout
from afn_ray.store.commits import Commit
from afn_ray.token_rows import LabelThresholds

_OF_VOCABULARY = ("token_id", "n", "n_docs", "mean", "sd", "min", "q1", "q2", "q3", "max", "n_high")
STATISTICS_SCHEMA = pa.schema(
    [
        pa.field("special", pa.bool_(), nullable=False),
        pa.field("n_word_start", pa.int64(), nullable=False),
        pa.field("n_whole", pa.int64(), nullable=False),
        *(field for field in VOCABULARY_SCHEMA if field.name in _OF_VOCABULARY),
    ]
)
"""Schema of a type's statistics, before the vocabulary adds texts and classes."""


class Quartiles(TypedDict):
    """Quartiles of a histogram and the number of HIGH tokens by them; null without tokens."""

    q1: float | None
    q2: float | None
    q3: float | None
    n_high: int


class Moments(TypedDict):
    """Moments of a histogram; null without tokens."""

    n: int
    mean: float | None
    sd: float | None
    min: float | None
    max: float | None


class ThresholdRow(LabelThresholds, Quartiles, Moments):
    """A row of ``THRESHOLDS_SCHEMA``."""

    n_sinks: int
    n_special: int
    definition: str


class SignalRow(Moments):
    """A row of ``SIGNALS_SCHEMA``."""

    signal: str
    layer: int
    q1: float | None
    q2: float | None
    q3: float | None
    n_special: int


class TokenTexts(NamedTuple):
    """Texts of a vocabulary, both by token id."""

    pieces: Sequence[str]  # as the tokenizer writes them
    readable: Sequence[str]  # as people read them


def shards_table(measure_id: str, commits: Sequence[Commit], num_bytes: Sequence[int]) -> pa.Table:
    """The ``shards`` table: files of each shard and their numbers of rows, in plan order."""
    tables = [SHARDS_SCHEMA.empty_table()]
    rows: list[dict[str, object]] = []
    doc_offset = 0
    for ordinal, (commit, size) in enumerate(zip(commits, num_bytes, strict=True)):
        place = {"ordinal": ordinal, "doc_offset": doc_offset, "num_bytes": size}
        rows.append(place | _shard_counts(commit) | _shard_files(commit, measure_id))
        doc_offset += commit.counts["documents"]
        if len(rows) == checksums.AHEAD:
            tables.append(pa.Table.from_pylist(rows, SHARDS_SCHEMA))
            rows = []
    tables.append(pa.Table.from_pylist(rows, SHARDS_SCHEMA))
    return pa.concat_tables(tables).combine_chunks()


def _shard_counts(commit: Commit) -> dict[str, object]:
    """Columns of ``SHARDS_SCHEMA`` on what the shard holds and how long it took."""
    counts = commit.counts
    forward_tokens = max(1, counts["forward_tokens"])
    return {
        "shard": commit.shard,
        "n_documents": counts["documents"],
        "n_empty": counts["empty"],
        "n_quarantined": counts["quarantined"],
        "n_tokens": counts["tokens"],
        "n_windows": counts["windows"],
        "n_replaced": counts["replaced"],
        "lost_bytes": counts["lost_bytes"],
        "lost_documents": counts["lost_documents"],
        "lost_unknown": counts["lost_unknown"],
        "padding_share": max(0.0, 1 - counts["tokens"] / forward_tokens),
        "seconds": commit.seconds,
    }


def _shard_files(commit: Commit, measure_id: str) -> dict[str, object]:
    """Columns of ``SHARDS_SCHEMA`` on the shard's files: their bytes and their paths."""
    files = commit.files
    columns: dict[str, object] = {
        "token_bytes": files["tokens"]["bytes"],
        "document_bytes": files["documents"]["bytes"],
        "summary_bytes": files["summary"]["bytes"],
    }
    for table in layout.NEURON_TABLES:
        columns[f"{table}_bytes"] = files[table]["bytes"] if table in files else 0
    columns["vectors_bytes"] = files[layout.VECTORS]["bytes"] if layout.VECTORS in files else 0
    for table in (*layout.TABLES, "neurons"):
        if table in files:
            name = files[table]["name"]
            columns[f"{table}_file"] = f"shards/{measure_id}/{commit.shard}/{name}"
    columns["schema_version"] = commit.schema_version
    return columns


def histogram_table(layer: int, special: bool, histogram: Histogram) -> pa.Table:
    """Rows of ``HISTOGRAM_SCHEMA`` for one layer, of special or of normal tokens."""
    n = len(histogram.keys)
    columns = [
        pa.array(np.full(n, layer, np.int16)),
        pa.array(np.full(n, special)),
        pa.array(to_values(histogram.keys)),
        pa.array(histogram.counts),
    ]
    return pa.Table.from_arrays(columns, schema=HISTOGRAM_SCHEMA)


def threshold_rows(
    layer: int, histogram: Histogram, n_special: int, sink_factor: float
) -> list[ThresholdRow]:
    """Thresholds of one layer: one row for all normal tokens, one for those that are no sinks.

    A sink is a token above ``sink_factor`` times the median of all normal tokens. HIGH is at or
    above Q3 of the same population. ``histogram`` holds the normal tokens.
    """
    median = 0.0
    if histogram.n:
        key = histogram.quantile_key(1, 2)
        (median,) = to_values(np.array([key])).tolist()
    is_kept = to_values(histogram.keys).astype(np.float64) <= sink_factor * median
    without_sinks = Histogram(histogram.keys[is_kept], histogram.counts[is_kept])
    populations = {"tokens": histogram, "tokens_without_sinks": without_sinks}
    rows: list[ThresholdRow] = []
    for population, h in populations.items():
        rows.append(
            {
                "layer": layer,
                "population": population,
                **_moments(h),
                **_quartiles(h),
                "n_sinks": histogram.n - without_sinks.n,
                "n_special": n_special,
                "sink_factor": sink_factor,
                "definition": DEFINITION,
            }
        )
    return rows


def _quartiles(h: Histogram) -> Quartiles:
    if not h.n:
        return {"q1": None, "q2": None, "q3": None, "n_high": 0}
    keys = h.quartile_keys()
    q1, q2, q3 = to_values(keys).tolist()
    n_high = int(h.counts[h.keys >= keys[2]].sum())
    return {"q1": q1, "q2": q2, "q3": q3, "n_high": n_high}


def _moments(h: Histogram) -> Moments:
    if not h.n:
        return {"n": 0, "mean": None, "sd": None, "min": None, "max": None}
    values = to_values(h.keys).astype(np.float64)
    mean, variance = mean_and_variance(values, h.counts)
    return {"n": h.n, "mean": mean, "sd": math.sqrt(variance), "min": values[0], "max": values[-1]}


def rows_under_frozen(
    own: Sequence[ThresholdRow], histogram: Histogram, frozen: Sequence[LabelThresholds]
) -> list[ThresholdRow]:
    """``own`` rows of a layer with the quartiles of ``frozen``.

    The counts of HIGH tokens and sinks are those of this run's tokens under these quartiles.
    """
    taken = {row["population"]: row for row in frozen}
    values = to_values(histogram.keys).astype(np.float64)
    of_tokens = taken["tokens"]
    is_sink = np.zeros(len(values), bool)
    if of_tokens["q2"] is not None:
        is_sink = values > of_tokens["sink_factor"] * of_tokens["q2"]
    rows: list[ThresholdRow] = []
    for row in own:
        quartiles = taken[row["population"]]
        is_kept = np.ones(len(values), bool)
        if row["population"] == "tokens_without_sinks":
            is_kept = ~is_sink
        part = Histogram(histogram.keys[is_kept], histogram.counts[is_kept])
        is_high_here = is_high(values[is_kept], quartiles["q3"])
        rows.append(
            {
                **row,
                **_moments(part),
                **quartiles,
                "n_high": int(part.counts[is_high_here].sum()),
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
    first = starts(types)  # [n_types], as all sums by type
    if not len(first):
        return STATISTICS_SCHEMA.empty_table()
    last = np.append(first[1:], len(keys)) - 1
    values = to_values(keys & BIN_MASK)
    wide = values.astype(np.float64)
    n = np.add.reduceat(counts, first)
    mean = np.add.reduceat(wide * counts, first) / n
    deviations = wide - np.repeat(mean, last + 1 - first)
    variance = np.add.reduceat(deviations**2 * counts, first) / n
    high_counts = np.where(is_high(values, q3), counts, 0)
    cumulative = np.cumsum(counts)
    before = cumulative[first] - counts[first]

    def quartile(i: int) -> npt.NDArray[np.float32]:
        rank: npt.NDArray[np.int64] = before + quantile_rank(n, i, 4)
        return values[np.searchsorted(cumulative, rank)]

    columns = {
        "special": types[first] >= SPECIAL_KEY >> BIN_BITS,
        "token_id": types[first] % (SPECIAL_KEY >> BIN_BITS),
        "n": n,
        "n_docs": merged.docs.counts,
        "n_word_start": merged.word_starts.counts,
        "n_whole": merged.whole_words.counts,
        "mean": mean,
        "sd": np.sqrt(variance),
        "min": values[first],
        "q1": quartile(1),
        "q2": quartile(2),
        "q3": quartile(3),
        "max": values[last],
        "n_high": np.add.reduceat(high_counts, first),
    }
    return _table(columns, STATISTICS_SCHEMA)


def vocabulary_table(
    layer: int,
    statistics: pa.Table,
    n_docs: int,
    texts: TokenTexts,
    words_of: WordsOf,
    tags: Mapping[int, TagShare] | None = None,
) -> pa.Table:
    """The vocabulary of one layer: ``statistics`` with texts, classes and shares, ordered by id.

    ``statistics`` holds all types in any order. ``tags`` gives the most frequent tag of each type
    if the corpus is labelled; without it, classes are guessed by the words of each type.
    """
    statistics = statistics.sort_by([("special", "ascending"), ("token_id", "ascending")])
    columns: dict[str, npt.NDArray[Any]] = {
        name: statistics[name].to_numpy() for name in statistics.column_names
    }
    ids, n, n_high = columns["token_id"].tolist(), columns["n"], columns["n_high"]
    readable = [texts.readable[i] for i in ids]
    low, upper = wilson(n_high, n)
    guesses = _by_tag(columns, tags) if tags is not None else _guesses(columns, readable, words_of)
    described = {
        "layer": np.full(len(ids), layer),
        "token": [texts.pieces[i] for i in ids],
        "text": readable,
        "class": [guess.name for guess in guesses],
        "class_confidence": [guess.confidence for guess in guesses],
        "is_ambiguous": [guess.is_ambiguous for guess in guesses],
        "share_high": n_high / n,
        "share_high_low": low,
        "share_high_high": upper,
        "idf": np.log(n_docs / columns["n_docs"]),
    }
    return _table(columns | described, VOCABULARY_SCHEMA)


def _by_tag(
    columns: Mapping[str, npt.NDArray[Any]], tags: Mapping[int, TagShare]
) -> list[lexicon.Guess]:
    """The class of each type in a labelled corpus: its most frequent tag."""
    types = zip(columns["token_id"].tolist(), columns["special"].tolist(), strict=True)
    guesses = []
    for token_id, special in types:
        tag, share = ("special", 1.0) if special else tags.get(token_id, (UNTAGGED, 1.0))
        guesses.append(lexicon.Guess(tag, share, share <= 1 - lexicon.MANY))
    return guesses


def _guesses(
    columns: Mapping[str, npt.NDArray[Any]], readable: Sequence[str], words_of: WordsOf
) -> list[lexicon.Guess]:
    """The class of each type, guessed from its text and from how often it is a word."""
    ids, n_starts = columns["token_id"].tolist(), columns["n_word_start"]
    starts = n_starts / columns["n"]
    wholes = columns["n_whole"] / np.maximum(1, n_starts)
    shares = zip(columns["special"].tolist(), starts.tolist(), wholes.tolist(), strict=True)
    return [
        lexicon.classify(text, special=special, starts=start, whole=whole, words=words_of(token_id))
        for token_id, text, (special, start, whole) in zip(ids, readable, shares, strict=True)
    ]


def _table(columns: Mapping[str, Any], schema: pa.Schema) -> pa.Table:
    arrays = [pa.array(columns[field.name], field.type) for field in schema]
    return pa.Table.from_arrays(arrays, schema=schema)
