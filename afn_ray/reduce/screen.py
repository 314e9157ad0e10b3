"""Screen a run's documents: one more scan of its tokens for strengths by source and outliers.

All steps are pure functions under ``reduce.tree.Tasks``, so order, grouping and place do not change
a bit::

    scan    tokens and documents of some shards -> sums by source, features of each document,
                                                   hashes of their texts
    add     up to FAN_IN sums or hash counts    -> their sum
    rank    features of some shards             -> the strangest documents among them
    worst   up to FAN_IN lists of documents     -> the strangest of all

A document is strange if one of its features is far from the median of its source. Features
(``FEATURES``) are taken at the deepest recorded layer, without special tokens. The distance is in
robust standard deviations: z = (x - median) / sqrt((1.4826 MAD)^2 + noise^2). ``noise`` is the
standard deviation of x in a document of the same length whose tokens are drawn from the source. So
a document is not strange only because it is short. A source of fewer than ``LEAST_DOCS`` documents
is compared with the whole corpus.

In this table n is the number of tokens of the document, and m is the median of its source:

===============  ================================================  ==============================
feature          value for a document                              noise squared
===============  ================================================  ==============================
mean_strength    mean of the strengths                             variance of the source's
                                                                   tokens / n
share_high       share of tokens at or above the Q3 that labels    p (1 - p) / n,
                 use                                               p = (m n + 1) / (n + 2)
share_rare       share of tokens of types that occur in at most    as for share_high
                 ``RARE`` of the documents
share_sinks      share of tokens above the sink limit              as for share_high
share_fragments  share of tokens that continue a word              as for share_high
share_distinct   log(distinct types) / log(n): Herdan's C          p (1 - p) / n / ln(n)^2,
                                                                   p = n^(m - 1)
===============  ================================================  ==============================

A text that several documents share is strange too. log2(copies) log2(n) / 2 counts as a z, because
the chance that independent texts agree falls with their length.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from afn_ray.reduce import losses
from afn_ray.reduce.histogram import (
    BIN_BITS,
    COMPACT_KEYS,
    Histogram,
    round_strengths,
    to_bins,
    to_values,
)
from afn_ray.reduce.shards import CommittedFile, CommittedShards
from afn_ray.reduce.stats import Floats, Ints, mean_and_variance, quantile_index
from afn_ray.reduce.tree import FAN_IN, Inline, Tasks
from afn_ray.schema import (
    FEATURES,
    SCREENED_SCHEMA,
    SOURCES_SCHEMA,
    SPECIAL,
    WORD_START,
    strength_column,
)
from afn_ray.store import parquet, records

MAX_SOURCES = 1000
"""Largest number of sources.

If a run has more files, its sources are folders, as deep as this limit allows.
"""
LEAST_DOCS = 20
"""Smallest number of documents in a source that is compared with itself."""
RARE = 0.01
"""Largest share of a run's documents in which a rare type occurs."""
READ_BYTES = 64 << 20
"""Bytes of token files that one call reads; a larger shard has a call of its own."""
PART_DOCS = 2_000_000
"""Number of documents for each part in which text hashes are counted."""
MAD_TO_SD = 1.4826
"""Ratio of the standard deviation to the MAD in a normal distribution."""
LEAST_SCALE = 1e-9
"""Smallest divisor of a z, for a source whose documents are all equal."""
TOLD = 3.0
"""Absolute z from which a feature is named among the reasons."""
TEXT_CHARS = 300
"""Longest beginning of a text in the ``screened`` table, in characters."""

BIN_MASK = (1 << BIN_BITS) - 1
"""Mask of the bin in a key of a source and a bin."""


class Place(NamedTuple):
    """Files of a shard's tokens and documents."""

    shard: str
    doc_offset: int  # run-wide number of the shard's first document
    tokens: CommittedFile
    documents: CommittedFile


class Sources(NamedTuple):
    """The sources of a run: its files, or their folders where there are too many."""

    names: tuple[str, ...]  # in ascending order
    depth: int | None  # number of URI parts that name a source; None if each file is one

    @classmethod
    def of(cls, uris: Collection[str]) -> Sources:
        """The sources of the files ``uris``."""
        depth = source_depth(uris)
        return cls(tuple(sorted({source_of(uri, depth) for uri in uris})), depth)

    def index_of(self, uris: pa.DictionaryArray) -> Ints:
        """Index of the source of each file in ``uris``."""
        index = {name: at for at, name in enumerate(self.names)}
        names = [source_of(uri, self.depth) for uri in uris.dictionary.to_pylist()]
        of_uri = np.array([index[name] for name in names], np.int64)
        return of_uri[uris.indices.to_numpy()] if len(of_uri) else np.empty(0, np.int64)


class Limits(NamedTuple):
    """Limits for HIGH, sink and rare tokens at the screened layer."""

    q3: float  # HIGH: at or above
    sink: float  # sink: above
    rare: npt.NDArray[np.bool_]  # by token id


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


def scan_run(
    shards: CommittedShards,
    layers: Sequence[int],
    reduced: Mapping[str, pa.Table],
    readable: Sequence[str],
    worst: int,
    tasks: Tasks | None = None,
) -> dict[str, pa.Table]:
    """The run's ``sources`` and ``screened`` tables, made by ``tasks`` or in this process.

    ``reduced`` are the run's other tables by name; its ``files`` define the sources. ``readable``
    has the tokenizer's texts by token id. ``screened`` has at most ``worst`` documents. Of
    documents with the same text it has the strangest, or the first of several equally strange ones.
    Raises ``StoreError`` for a file that differs from its commit.
    """
    tasks = tasks or Inline()
    labels = reduced["frozen" if "frozen" in reduced else "thresholds"]
    files = reduced["files"].filter(pc.invert(reduced["files"]["is_skipped"]))
    sources = Sources.of(files["source"].to_pylist())
    layer = layers[-1]
    n_docs = shards.n_docs
    limits = _limits(layer, labels, reduced["vocabulary"], n_docs)
    num_parts = 1 + n_docs // PART_DOCS
    places = list(_places(shards))
    scanned = [
        tasks.submit(_scan, group, sources, layers, limits, num_parts, num_results=2 + num_parts)
        for group in _groups(places)
    ]
    sums, *parts = (
        _tree(tasks, _add, [s[at] for s in scanned]) for at in (0, *range(2, 2 + num_parts))
    )
    repeated = [tasks.submit(_repeated, part)[0] for part in parts]
    spread, described = tasks.submit(
        _describe, sources.names, layers, labels, sums, _by_name(files, sources), num_results=2
    )
    ranked = [
        tasks.submit(_rank, layer, worst, s[1], sources, spread, *repeated)[0] for s in scanned
    ]
    table = tasks.result(_tree(tasks, _worst, ranked, worst))
    return {
        "sources": tasks.result(described),
        "screened": _with_texts(places, table, readable, tasks),
    }


def source_depth(uris: Collection[str]) -> int | None:
    """Number of URI parts that name a source; None if each file is a source."""
    if len(uris) <= MAX_SOURCES:
        return None
    parts = [uri.split("/")[:-1] for uri in uris]
    for depth in range(max(map(len, parts)), 0, -1):
        if len({tuple(p[:depth]) for p in parts}) <= MAX_SOURCES:
            return depth
    return 1


def source_of(uri: str, depth: int | None) -> str:
    """The source of the file ``uri``: the file itself, or the folder of its first parts."""
    return uri if depth is None else "/".join(uri.split("/")[:-1][:depth])


def _by_name(files: pa.Table, sources: Sources) -> dict[str, dict[str, Any]]:
    """Sums over ``files`` for each source, as columns of ``SOURCES_SCHEMA``."""
    names = [source_of(uri, sources.depth) for uri in files["source"].to_pylist()]
    named = files.set_column(0, "source", pa.array(names, pa.string()))
    return {row.pop("source"): row for row in losses.add_files(named).to_pylist()}


def _tree(
    tasks: Tasks, merge: Callable[..., Sequence[Any]], handles: list[Any], *first: Any
) -> Any:
    """Handle of ``merge(*first, *values)`` over all ``handles``, ``FAN_IN`` at a time."""
    while True:
        handles = [
            tasks.submit(merge, *first, *handles[begin : begin + FAN_IN])[0]
            for begin in range(0, len(handles), FAN_IN)
        ]
        if len(handles) == 1:
            return handles[0]


def _places(shards: CommittedShards) -> Iterator[Place]:
    doc_offset = 0
    for commit in shards.commits:
        tokens, documents = (shards.file(commit, table) for table in ("tokens", "documents"))
        yield Place(commit.shard, doc_offset, tokens, documents)
        doc_offset += commit.counts["documents"]


def _groups(places: Sequence[Place]) -> Iterator[list[Place]]:
    """``places`` in order, in groups of at most ``FAN_IN`` shards and about ``READ_BYTES``."""
    group: list[Place] = []
    size = 0
    for place in places:
        if group and (len(group) == FAN_IN or size + place.tokens.num_bytes > READ_BYTES):
            yield group
            group, size = [], 0
        group.append(place)
        size += place.tokens.num_bytes
    yield group


def _limits(layer: int, labels: pa.Table, vocabulary: pa.Table, n_docs: int) -> Limits:
    """Limits at ``layer``; infinite if the run has no normal tokens."""
    (row,) = (r for r in labels.to_pylist() if r["layer"] == layer and r["population"] == "tokens")
    here = vocabulary.filter(pc.equal(vocabulary["layer"], layer))
    ids, in_docs = here["token_id"].to_numpy(), here["n_docs"].to_numpy()
    rare = np.zeros(int(ids.max(initial=0)) + 1, bool)
    rare[ids[in_docs <= max(1, RARE * n_docs)]] = True
    if row["q3"] is None:
        return Limits(np.inf, np.inf, rare)
    return Limits(row["q3"], row["sink_factor"] * row["q2"], rare)


# --- scan ---


def _read(file: CommittedFile, columns: Sequence[str]) -> pa.Table:
    return parquet.read(file.read(), columns, use_threads=False).combine_chunks()


def _scan(
    places: Sequence[Place],
    sources: Sources,
    layers: Sequence[int],
    limits: Limits,
    num_parts: int,
) -> list[Any]:
    """Sums by source, a table of the documents' features, and text hashes in ``num_parts`` parts.

    The sums are histograms: strengths of each layer, each feature, and documents. Their keys hold
    the index of the source above the bin.
    """
    sums: list[tuple[Histogram, ...]] = []
    tables, hashes = [], []
    for place in places:
        documents = _read(place.documents, ["source", "n_tokens", "text_sha256"])
        uris = documents["source"].combine_chunks()
        source = sources.index_of(uris)
        n = np.zeros(len(source), np.int64)
        features = [np.zeros(len(source), np.float32) for _ in FEATURES]
        pieces: list[tuple[Histogram, ...]] = [
            tuple(Histogram.of(np.empty(0, np.int64)) for _ in layers)
        ]
        file = parquet.open_file(place.tokens.read())
        ends = np.cumsum(documents["n_tokens"].to_numpy().astype(np.int64))
        for _, tokens in records.whole_documents(
            file, ends, ["token_id", "flags", *map(strength_column, layers)]
        ):
            flags, rows = tokens["flags"].to_numpy(), tokens["doc"].to_numpy()
            normal = flags & SPECIAL == 0
            docs = rows[normal]
            by_layer = [tokens[strength_column(k)].to_numpy()[normal] for k in layers]
            piece = slice(int(rows[0]), int(rows[-1]) + 1)
            n[piece], some = _features(
                docs - rows[0],
                tokens["token_id"].to_numpy()[normal],
                flags[normal],
                by_layer[-1],
                piece.stop - piece.start,
                limits,
            )
            for feature, values in zip(features, some, strict=True):
                feature[piece] = values
            at = source[docs] << BIN_BITS
            pieces.append(tuple(Histogram.of(at + to_bins(values)) for values in by_layer))
            if sum(len(h.keys) for h in itertools.chain(*pieces[1:])) > COMPACT_KEYS:
                pieces = _add(*pieces)
        here = np.flatnonzero(n)  # documents with tokens
        of_docs = [Histogram.of((source[here] << BIN_BITS) + to_bins(x[here])) for x in features]
        sums.append((*_add(*pieces)[0], *of_docs, Histogram.of(source)))
        keys = _hashes(documents["text_sha256"])[here]
        hashes.append(keys)
        tables.append(
            pa.table(
                {
                    "doc": here + place.doc_offset,
                    "in_shard": here.astype(np.int32),
                    "shard": pa.DictionaryArray.from_arrays(
                        np.zeros(len(here), np.int32), [place.shard]
                    ),
                    "source": uris.take(here),
                    "n_tokens": n[here].astype(np.int32),
                    "hash": keys,
                    **{name: x[here] for name, x in zip(FEATURES, features, strict=True)},
                }
            )
        )
    keys = np.concatenate(hashes)
    return [
        _add(*sums)[0],
        pa.concat_tables(tables).unify_dictionaries(),
        *((Histogram.of(keys[keys % num_parts == part]),) for part in range(num_parts)),
    ]


def _features(
    docs: Ints,
    types: Ints,
    flags: npt.NDArray[np.uint8],
    strengths: npt.NDArray[np.float32],
    num_docs: int,
    limits: Limits,
) -> tuple[Ints, list[npt.NDArray[np.float32]]]:
    """Number of tokens of each document, and its ``FEATURES``, rounded as strengths are.

    Both are 0 for a document without tokens. Special tokens are left out by the caller.
    """
    n = np.bincount(docs, minlength=num_docs)
    least = np.maximum(n, 1)
    wide = strengths.astype(np.float64)

    def share(which: npt.NDArray[np.bool_]) -> Floats:
        return np.asarray(np.bincount(docs[which], minlength=num_docs) / least)

    pairs = np.unique((docs.astype(np.int64) << 32) + types)
    distinct = np.maximum(np.bincount(pairs >> 32, minlength=num_docs), 1)
    logs = np.log(np.maximum(n, 2))
    features = [
        np.bincount(docs, wide, num_docs) / least,
        share(strengths >= np.float32(limits.q3)),
        share(limits.rare[types]),
        share(wide > limits.sink),
        share(flags & WORD_START == 0),
        np.where(n > 1, np.log(distinct) / logs, np.minimum(n, 1)),
    ]
    return n, [round_strengths(x.astype(np.float32)) for x in features]


def _hashes(column: pa.ChunkedArray) -> Ints:
    """63 bits of each text's SHA-256; 0 for a document without a hash, which has no tokens."""
    values = pc.fill_null(column.combine_chunks(), bytes(32))
    raw = np.frombuffer(values.buffers()[1], np.uint8).reshape(-1, 32)[
        values.offset : values.offset + len(values)
    ]
    return (np.ascontiguousarray(raw[:, :8]).view(">u8").ravel() >> np.uint64(1)).astype(np.int64)


def _add(*sums: tuple[Histogram, ...]) -> list[tuple[Histogram, ...]]:
    return [tuple(Histogram.merge(part) for part in zip(*sums, strict=True))]


def _repeated(part: tuple[Histogram]) -> list[Histogram]:
    """Hashes that occur in more than one document."""
    (all_of,) = part
    more = all_of.counts > 1
    return [Histogram(all_of.keys[more], all_of.counts[more])]


# --- sources ---


def _describe(
    names: Sequence[str],
    layers: Sequence[int],
    labels: pa.Table,
    sums: tuple[Histogram, ...],
    read: Mapping[str, Mapping[str, Any]],
) -> tuple[Spread, pa.Table]:
    """Spread of each source, and the ``sources`` table; ``read`` is the result of ``_by_name``."""
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
            high = to_values(h.keys) >= np.float32(np.inf if q3[layer] is None else q3[layer])
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


# --- documents ---


def _rank(
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
    noise = np.array(
        [_noise(name, median[at], spread.variance[against], n) for at, name in enumerate(FEATURES)]
    )
    scale = np.sqrt((MAD_TO_SD * spread.mad[:, against]) ** 2 + noise)
    z = (values - median) / np.maximum(scale, LEAST_SCALE)
    hashes = documents["hash"].to_numpy()
    copies = np.ones(len(hashes), np.int64)
    for part in repeated:
        if len(part.keys):
            at = np.minimum(np.searchsorted(part.keys, hashes), len(part.keys) - 1)
            copies = np.where(part.keys[at] == hashes, part.counts[at], copies)
    shared = np.log2(copies) * np.log2(n) / 2
    score = np.maximum(np.abs(z).max(axis=0), shared) if len(n) else np.empty(0)
    first = np.lexsort((documents["doc"].to_numpy(), -score))
    # Of documents with the same text, keep the first.
    _, distinct = np.unique(hashes[first], return_index=True)
    chosen = first[np.sort(distinct)[:worst]]
    table = documents.take(chosen).append_column(
        "layer", pa.array(np.full(len(chosen), layer, np.int16))
    )
    reasons = [
        _reason(
            z[:, at],
            values[:, at],
            median[:, at],
            int(copies[at]),
            shared[at],
            against[at] == corpus,
        )
        for at in chosen.tolist()
    ]
    table = table.append_column("n_copies", pa.array(copies[chosen])).append_column(
        "score", pa.array(score[chosen])
    )
    return [
        table.append_column("reason", pa.array(reasons, pa.string()))
        .select(RANKED.names)
        .cast(RANKED)
    ]


def _noise(feature: str, median: Floats, variance: Floats, n: Floats) -> Floats:
    """Squared noise of a feature, as in the table of this module's docstring."""
    if feature == "mean_strength":
        return variance / n
    if feature == "share_distinct":
        p = np.clip(n ** (median - 1), 1 / (n + 2), 1 - 1 / (n + 2))
        return np.asarray(p * (1 - p) / n / np.log(np.maximum(n, 2)) ** 2)
    p = (median * n + 1) / (n + 2)
    return np.asarray(p * (1 - p) / n)


def _reason(
    z: Floats, values: Floats, medians: Floats, copies: int, shared: float, of_all: bool
) -> str:
    """Up to three reasons why a document is strange, the strongest first; at least one."""
    told = [
        (
            abs(z[at]),
            f"{name} {values[at]:.4g}, median of {'the corpus' if of_all else 'its source'} "
            f"{medians[at]:.4g} "
            f"(z {z[at]:+.1f})",
        )
        for at, name in enumerate(FEATURES)
    ]
    if copies > 1:
        told.append((shared, f"{copies:,} documents have this text"))
    told.sort(key=lambda t: -t[0])
    return "; ".join([text for at, (size, text) in enumerate(told) if not at or size >= TOLD][:3])


def _worst(worst: int, *tables: pa.Table) -> list[pa.Table]:
    """The ``worst`` strangest documents of ``tables``."""
    table = pa.concat_tables(tables)
    first = np.lexsort((table["doc"].to_numpy(), -table["score"].to_numpy()))
    _, distinct = np.unique(table["hash"].to_numpy()[first], return_index=True)
    return [table.take(first[np.sort(distinct)[:worst]])]


def _with_texts(
    places: Sequence[Place], table: pa.Table, readable: Sequence[str], tasks: Tasks
) -> pa.Table:
    """``table`` with ranks and the beginnings of the texts, as in ``SCREENED_SCHEMA``."""
    wanted: dict[str, list[int]] = {}
    for row in table.select(["shard", "in_shard"]).to_pylist():
        wanted.setdefault(row["shard"], []).append(row["in_shard"])
    handles = {
        place.shard: tasks.submit(_texts, place.tokens, wanted[place.shard], readable)[0]
        for place in places
        if place.shard in wanted
    }
    found = {shard: tasks.result(handle) for shard, handle in handles.items()}
    texts = [
        found[row["shard"]][row["in_shard"]]
        for row in table.select(["shard", "in_shard"]).to_pylist()
    ]
    table = table.append_column("text", pa.array(texts, pa.string()))
    table = table.append_column("rank", pa.array(np.arange(1, len(table) + 1, dtype=np.int32)))
    return table.select(SCREENED_SCHEMA.names).cast(SCREENED_SCHEMA)


def _texts(
    file: CommittedFile, docs: Sequence[int], readable: Sequence[str]
) -> list[dict[int, str]]:
    """Beginnings of the texts of ``docs``, joined from the tokens in ``file``.

    Words are as written in the corpus, with one space between them.
    """
    tokens = _read(file, ["doc", "token_id", "flags", "surface"])
    column = tokens["doc"].to_numpy()
    texts = {}
    for doc in docs:
        begin, end = np.searchsorted(column, [doc, doc + 1])
        # Nearly every token has at least one character.
        rows = tokens.slice(begin, min(end - begin, TEXT_CHARS))
        pieces: list[str] = []
        written = False  # the whole current word is already in ``pieces``
        for token, flags, surface in zip(
            rows["token_id"].to_pylist(),
            rows["flags"].to_pylist(),
            rows["surface"].to_pylist(),
            strict=True,
        ):
            if flags & SPECIAL:
                continue
            if flags & WORD_START:
                pieces.append(" " + (readable[token] if surface is None else surface))
                written = surface is not None
            elif not written:
                pieces.append(readable[token])
        text = "".join(pieces).strip()
        texts[doc] = text if len(text) <= TEXT_CHARS else text[: TEXT_CHARS - 3] + "..."
    return [texts]
