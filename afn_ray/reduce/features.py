"""Features of each document, from one scan of the tokens of some shards."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from afn_ray.reduce.histogram import (
    BIN_BITS,
    COMPACT_KEYS,
    Histogram,
    round_strengths,
    to_bins,
)
from afn_ray.reduce.shards import CommittedFile
from afn_ray.reduce.sources import Sources
from afn_ray.reduce.stats import Floats, Ints, is_high
from afn_ray.schema import (
    FEATURES,
    SPECIAL,
    WORD_START,
    strength_column,
)
from afn_ray.store import parquet, records

Sums = tuple[Histogram, ...]
"""Histograms that are added one by one."""


class Place(NamedTuple):
    """Files of a shard's tokens and documents."""

    shard: str
    doc_offset: int  # run-wide number of the shard's first document
    tokens: CommittedFile
    documents: CommittedFile


class Limits(NamedTuple):
    """Limits for HIGH, sink and rare tokens at the screened layer."""

    q3: float  # HIGH: at or above
    sink: float  # sink: above
    rare: npt.NDArray[np.bool_]  # by token id


def read_columns(file: CommittedFile, columns: Sequence[str]) -> pa.Table:
    return parquet.read(file.read(), columns, use_threads=False).combine_chunks()


def scan(
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
    scanned = [_scan_shard(place, sources, layers, limits) for place in places]
    table = pa.concat_tables([table for _, table in scanned]).unify_dictionaries()
    keys = table["hash"].to_numpy()
    return [
        add(*(sums for sums, _ in scanned))[0],
        table,
        *((Histogram.of(keys[keys % num_parts == part]),) for part in range(num_parts)),
    ]


def _scan_shard(
    place: Place, sources: Sources, layers: Sequence[int], limits: Limits
) -> tuple[Sums, pa.Table]:
    """Sums by source, and the features of the shard's documents with tokens."""
    documents = read_columns(place.documents, ["source", "n_tokens", "text_sha256"])
    uris = documents["source"].combine_chunks()
    source = sources.index_of(uris)
    n = np.zeros(len(source), np.int64)
    features = [np.zeros(len(source), np.float32) for _ in FEATURES]
    pieces: list[Sums] = [tuple(Histogram.empty() for _ in layers)]
    file = parquet.open_file(place.tokens.read())
    ends = np.cumsum(documents["n_tokens"].to_numpy().astype(np.int64))
    columns = ["token_id", "flags", *map(strength_column, layers)]
    for _, tokens in records.whole_documents(file, ends, columns):
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
        prefix = source[docs] << BIN_BITS
        pieces.append(tuple(Histogram.of(prefix + to_bins(values)) for values in by_layer))
        if _num_keys(pieces[1:]) > COMPACT_KEYS:
            pieces = add(*pieces)
    has_tokens = np.flatnonzero(n)
    prefix = source[has_tokens] << BIN_BITS
    of_features = [Histogram.of(prefix + to_bins(values[has_tokens])) for values in features]
    sums = (*add(*pieces)[0], *of_features, Histogram.of(source))
    in_one_shard = np.zeros(len(has_tokens), np.int32)
    table = pa.table(
        {
            "doc": has_tokens + place.doc_offset,
            "in_shard": has_tokens.astype(np.int32),
            "shard": pa.DictionaryArray.from_arrays(in_one_shard, [place.shard]),
            "source": uris.take(has_tokens),
            "n_tokens": n[has_tokens].astype(np.int32),
            "hash": _hashes(documents["text_sha256"])[has_tokens],
            **{name: x[has_tokens] for name, x in zip(FEATURES, features, strict=True)},
        }
    )
    return sums, table


def _num_keys(sums: Sequence[Sums]) -> int:
    return sum(len(histogram.keys) for histogram in itertools.chain(*sums))


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
        share(is_high(strengths, limits.q3)),
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


def add(*sums: Sums) -> list[Sums]:
    return [tuple(Histogram.merge(part) for part in zip(*sums, strict=True))]
