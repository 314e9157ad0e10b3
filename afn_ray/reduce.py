"""Shards' summaries in, a run's thresholds, histogram and vocabulary out. No record is read again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from afn_ray import lexicon, manifest, storage
from afn_ray.errors import StoreError
from afn_ray.schema import HISTOGRAM_SCHEMA, SHARDS_SCHEMA, THRESHOLDS_SCHEMA, VOCABULARY_SCHEMA
from afn_ray.thresholds import BIN_BITS, DEFINITION, SPECIAL_KEY, Histogram, LayerSummary, to_values

READ_AHEAD = 8
Z_95 = 1.959963984540054
"""Two-sided 95 % point of the normal distribution, for Wilson's interval."""

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def reduce_run(
    store: str, measure_id: str, commits: Sequence[manifest.Commit], layers: Sequence[int], *,
    pieces: Sequence[str], readable: Sequence[str], language: str, sink_factor: float, num_bytes: Sequence[int],
    on_layer: Callable[[int], None] | None = None,
) -> dict[str, pa.Table]:  # fmt: skip
    """The run's tables from its shards' summaries, one layer at a time.

    ``commits`` in plan order, ``num_bytes`` read for each; ``pieces`` and ``readable`` are the vocabulary's texts
    by token id. The result does not depend on how the corpus was cut into shards.
    """
    shards = shards_table(measure_id, commits, num_bytes)
    n_docs = sum(c.counts["documents"] - c.counts["empty"] - c.counts["quarantined"] for c in commits)
    thresholds: list[dict[str, Any]] = []
    histograms, vocabularies = [], []
    for at, layer in enumerate(layers):
        merged = LayerSummary.merge(_read_layer(store, measure_id, commits, at, layer))
        strengths = merged.strengths
        is_special = strengths.keys >= SPECIAL_KEY
        bins = strengths.keys & ((1 << BIN_BITS) - 1)
        normal = _by_bin(bins[~is_special], strengths.counts[~is_special])
        special = _by_bin(bins[is_special], strengths.counts[is_special])
        rows = threshold_rows(layer, normal, special.n, sink_factor)
        thresholds += rows
        histograms += [_histogram_table(layer, False, normal), _histogram_table(layer, True, special)]
        vocabularies.append(vocabulary_table(layer, merged, rows[0]["q3"], n_docs, pieces, readable, language))
        if on_layer is not None:
            on_layer(layer)
    return {
        "shards": shards,
        "thresholds": pa.Table.from_pylist(thresholds, THRESHOLDS_SCHEMA),
        "histogram": pa.concat_tables(histograms),
        "vocabulary": pa.concat_tables(vocabularies),
    }


def shards_table(measure_id: str, commits: Sequence[manifest.Commit], num_bytes: Sequence[int]) -> pa.Table:
    """Where the shards' files are and how many rows they hold, in plan order."""
    rows = []
    doc_offset = 0
    for ordinal, (commit, size) in enumerate(zip(commits, num_bytes, strict=True)):
        counts, files = commit.counts, commit.files
        folder = f"shards/{measure_id}/{commit.shard}"
        forward = max(1, counts["forward_tokens"])
        rows.append(
            {
                "ordinal": ordinal, "shard": commit.shard, "doc_offset": doc_offset, "n_documents": counts["documents"],
                "n_empty": counts["empty"], "n_quarantined": counts["quarantined"], "n_tokens": counts["tokens"],
                "n_windows": counts["windows"], "padding_share": max(0.0, 1 - counts["tokens"] / forward),
                "num_bytes": size, "token_bytes": files["tokens"]["bytes"],
                "document_bytes": files["documents"]["bytes"], "summary_bytes": files["summary"]["bytes"],
                "seconds": commit.seconds,
                **{f"{t}_file": f"{folder}/{files[t]['name']}" for t in manifest.TABLES},
            }
        )  # fmt: skip
        doc_offset += counts["documents"]
    return pa.Table.from_pylist(rows, SHARDS_SCHEMA)


def _read_layer(
    store: str, measure_id: str, commits: Sequence[manifest.Commit], at: int, layer: int
) -> Iterator[LayerSummary]:
    """Layer ``layer`` (row group ``at``) of every summary, a few files ahead."""

    def read(commit: manifest.Commit) -> LayerSummary | None:
        entry = commit.files["summary"]
        uri = storage.join(manifest.shard_uri(store, measure_id, commit.shard), str(entry["name"]))
        data = storage.read_bytes(uri)
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise StoreError(
                f"{uri} is damaged: its checksum is not the one in commit.json; delete its folder and run again"
            )
        if not entry["rows"]:
            return None  # a shard without tokens
        table = pq.ParquetFile(pa.BufferReader(data)).read_row_group(at)
        if table["layer"][0].as_py() != layer:
            raise StoreError(f"{uri}: row group {at} holds layer {table['layer'][0]}, expected {layer}")
        return LayerSummary.from_table(table)

    with ThreadPoolExecutor(READ_AHEAD) as pool:
        for begin in range(0, len(commits), READ_AHEAD):
            for part in pool.map(read, commits[begin : begin + READ_AHEAD]):
                if part is not None:
                    yield part


def _by_bin(bins: Ints, counts: Ints) -> Histogram:
    order = np.argsort(bins, kind="stable")
    bins, counts = bins[order], counts[order]
    first = np.flatnonzero(np.diff(bins, prepend=-1))
    return Histogram(bins[first], np.add.reduceat(counts, first) if len(first) else counts)


def _histogram_table(layer: int, special: bool, histogram: Histogram) -> pa.Table:
    n = len(histogram.keys)
    columns = [np.full(n, layer, np.int16), np.full(n, special), to_values(histogram.keys), histogram.counts]
    return pa.Table.from_arrays([pa.array(c) for c in columns], schema=HISTOGRAM_SCHEMA)


def threshold_rows(layer: int, histogram: Histogram, n_special: int, sink_factor: float) -> list[dict[str, Any]]:
    """Thresholds of one layer over all tokens but the special ones, and again without the sinks.

    A sink is a token over ``sink_factor`` times the median of all. HIGH is at or above Q3 of the same population.
    """
    median = to_values(np.array([histogram.quantile_key(1, 2)]))[0] if histogram.n else np.float32(0)
    kept = to_values(histogram.keys).astype(np.float64) <= sink_factor * float(median)
    without = Histogram(histogram.keys[kept], histogram.counts[kept])
    rows = []
    for population, h in (("tokens", histogram), ("tokens_without_sinks", without)):
        row: dict[str, Any] = {
            "layer": layer, "population": population, "n": h.n, "n_high": 0, "n_sinks": histogram.n - without.n,
            "n_special": n_special, "sink_factor": sink_factor, "definition": DEFINITION,
        }  # fmt: skip
        if h.n:
            values = to_values(h.keys).astype(np.float64)
            mean = float(values @ h.counts / h.n)
            keys = [h.quantile_key(i, 4) for i in (1, 2, 3)]
            q1, q2, q3 = (float(v) for v in to_values(np.array(keys)))
            row |= {
                "mean": mean, "sd": float(np.sqrt(((values - mean) ** 2) @ h.counts / h.n)),
                "min": values[0], "q1": q1, "q2": q2, "q3": q3, "max": values[-1],
                "n_high": int(h.counts[h.keys >= keys[2]].sum()),
            }  # fmt: skip
        rows.append(row)
    return [{name: row.get(name) for name in THRESHOLDS_SCHEMA.names} for row in rows]


def vocabulary_table(
    layer: int, merged: LayerSummary, q3: float | None, n_docs: int, pieces: Sequence[str], readable: Sequence[str],
    language: str,
) -> pa.Table:  # fmt: skip
    """Statistics of every type that occurs, read exactly off its histogram; ``q3`` is the layer's threshold."""
    keys, counts = merged.strengths.keys, merged.strengths.counts
    types = keys >> BIN_BITS
    first = np.flatnonzero(np.diff(types, prepend=-1))
    if not len(first):
        return VOCABULARY_SCHEMA.empty_table()
    values = to_values(keys & ((1 << BIN_BITS) - 1))
    n = np.add.reduceat(counts, first)
    wide = values.astype(np.float64)
    mean = np.add.reduceat(wide * counts, first) / n
    spread = wide - np.repeat(mean, np.diff(np.append(first, len(keys))))
    sd = np.sqrt(np.add.reduceat(spread**2 * counts, first) / n)
    cumulative = np.cumsum(counts)
    before = cumulative[first] - counts[first]
    quartile = {i: values[np.searchsorted(cumulative, before + np.maximum(1, (i * n + 3) // 4))] for i in (1, 2, 3)}
    high = values >= np.float32(np.inf if q3 is None else q3)
    n_high = np.add.reduceat(np.where(high, counts, 0), first)
    low, upper = wilson(n_high, n)
    ids = types[first] % (SPECIAL_KEY >> BIN_BITS)
    special = types[first] >= SPECIAL_KEY >> BIN_BITS
    starts = merged.word_starts.counts
    texts = [readable[i] for i in ids.tolist()]
    classes = [
        lexicon.classify(text, special=bool(s), starts_word=bool(2 * w >= c), language=language)
        for text, s, w, c in zip(texts, special, starts, n, strict=True)
    ]
    docs = merged.docs.counts
    columns: dict[str, Any] = {
        "layer": np.full(len(first), layer), "token_id": ids, "token": [pieces[i] for i in ids.tolist()], "text": texts,
        "class": classes, "n": n, "n_docs": docs, "mean": mean, "sd": sd, "min": values[first], "q1": quartile[1],
        "q2": quartile[2], "q3": quartile[3], "max": values[np.append(first[1:], len(keys)) - 1], "n_high": n_high,
        "share_high": n_high / n, "share_high_low": low, "share_high_high": upper, "idf": np.log(n_docs / docs),
    }  # fmt: skip
    return pa.Table.from_arrays(
        [pa.array(columns[f.name], f.type) for f in VOCABULARY_SCHEMA], schema=VOCABULARY_SCHEMA
    )


def wilson(k: Ints | int, n: Ints | int) -> tuple[Floats, Floats]:
    """Wilson's 95 % interval of the share ``k / n``, n > 0 (E. B. Wilson, 1927)."""
    k, n = np.asarray(k, np.float64), np.asarray(n, np.float64)
    p, z2 = k / n, Z_95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 / (1 + z2 / n) * np.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return np.where(k == 0, 0.0, np.maximum(0, centre - half)), np.where(k == n, 1.0, np.minimum(1, centre + half))
