"""Features of each document, from one scan of the tokens of some shards."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from afn_ray.reduce.controls import ControlCounter, Controls, places_of
from afn_ray.reduce.copied import add_copies, count_copies
from afn_ray.reduce.groups import Cells, Grouping, StrengthCounter, TypeCounter
from afn_ray.reduce.histogram import (
    BIN_BITS,
    COMPACT_KEYS,
    Histogram,
    round_strengths,
    starts,
    to_bins,
    values_by_type,
)
from afn_ray.reduce.shards import CommittedFile
from afn_ray.reduce.sources import Sources
from afn_ray.reduce.stats import Float64s, Int32s, Ints, is_high
from afn_ray.reduce.word_sums import WordCounter, WordRules, WordTokens
from afn_ray.schema import FEATURES, LANGUAGE, SPECIAL, WORD_START, strength_column
from afn_ray.store import parquet, records
from afn_ray.store.shard_tables import DOC, ShardTable

Float32s = npt.NDArray[np.float32]
Histograms = tuple[Histogram, ...]
"""Histograms that are added one by one."""
MOST_HELD = 1 << 18
"""Largest number of strengths that wait to be counted together: a sort of many costs less a token.

Waiting and sorting take about 60 bytes a strength.
"""


class ShardTables(NamedTuple):
    """Files of a shard's tokens and documents."""

    shard: str
    doc_offset: int  # run-wide number of the shard's first document
    tokens: CommittedFile
    documents: CommittedFile
    left_out: Ints  # documents that count nowhere, as numbers in the shard
    copies: Ints  # documents with the text of an earlier one, as numbers in the shard


class FeatureLimits(NamedTuple):
    """Limits for HIGH, sink and rare tokens at the screened layer."""

    q3: float  # HIGH: at or above
    sink: float  # sink: above
    rare: npt.NDArray[np.bool_]  # by token id
    controls: Controls


class GroupCounters(NamedTuple):
    """Counters of the groups over some shards."""

    grouping: Grouping
    strengths: StrengthCounter
    types: TypeCounter
    documents: list[Histogram]  # by group, of each shard
    with_tokens: list[Histogram]  # as ``documents``, without those that have no token

    @classmethod
    def of(cls, grouping: Grouping) -> GroupCounters:
        return cls(grouping, StrengthCounter(grouping), TypeCounter(grouping, grouping.q3), [], [])

    def sums(self) -> Histograms:
        """Strengths of each layer, documents, those with tokens, and types, all by group."""
        documents = (Histogram.merge(parts) for parts in (self.documents, self.with_tokens))
        return (*self.strengths.sums(), *documents, *self.types.sums())


def read_columns(file: CommittedFile, columns: Sequence[str]) -> pa.Table:
    return parquet.read(file.read(), columns, use_threads=False).combine_chunks()


class AlsoCounted(NamedTuple):
    """Rules of the counts that a scan makes beside features and sources."""

    num_parts: int  # parts of the text hashes
    words: WordRules | None  # None: words are not counted
    grouping: Grouping | None = None


class TokenCounters(NamedTuple):
    """Counters that the tokens of several shards go through."""

    words: WordCounter | None  # None: words are not counted
    of_groups: GroupCounters | None  # None: the run has no groups
    controls: ControlCounter

    def add(self, groups: Ints, lengths: Ints, tokens: NormalTokens) -> None:
        """Count ``tokens`` of a shard, whose documents have ``groups`` and
        ``lengths`` in tokens.
        """
        _, docs, positions, types, flags, by_layer, surface, tag = tokens
        places = places_of(positions, lengths[docs])
        if self.words is not None:
            assert surface is not None, "asked for with the tokens"
            self.words.add(WordTokens(docs, types, flags, by_layer, surface, tag, places))
        if self.of_groups is not None:
            self.of_groups.strengths.add(groups[docs], by_layer)
            self.of_groups.types.add(groups[docs], types, by_layer)
        self.controls.add(docs, types, places, by_layer)


def scan(
    places: Sequence[ShardTables],
    sources: Sources,
    layers: Sequence[int],
    limits: FeatureLimits,
    counted: AlsoCounted,
) -> list[Any]:
    """Sums by source, features of the documents, ``COPIED_SCHEMA``, control sums, hashes and words.

    The control sums are a flat ``ControlSums``. The hashes of texts and then the ``WordSums`` are
    in parts; without rules of words there are no ``WordSums``.

    The sums are histograms: strengths of each layer, each feature, and documents. Their keys hold
    the index of the source above the bin. With ``grouping`` follow the sums of ``GroupCounters``.
    """
    num_parts, words, grouping = counted
    of_groups = None if grouping is None else GroupCounters.of(grouping)
    of_words = None if words is None else WordCounter(words)
    counters = TokenCounters(of_words, of_groups, ControlCounter(limits.controls))
    scanned = [_scan_shard(place, sources, layers, limits, counters) for place in places]
    of_shards, tables, copied = zip(*scanned, strict=True)
    (sums,) = add(*of_shards)
    if of_groups is not None:
        sums = (*sums, *of_groups.sums())
    table = pa.concat_tables(tables).unify_dictionaries()
    hashes = table["hash"].to_numpy()
    part_of = hashes % num_parts
    parts = [(Histogram.of(hashes[part_of == part]),) for part in range(num_parts)]
    controlled = counters.controls.sums().flat()
    word_parts = [] if of_words is None else of_words.sums()
    return [sums, table, *add_copies(*copied), controlled, *parts, *word_parts]


def _scan_shard(
    place: ShardTables,
    sources: Sources,
    layers: Sequence[int],
    limits: FeatureLimits,
    counters: TokenCounters,
) -> tuple[Histograms, pa.Table, pa.Table]:
    """Sums of ``scan`` by source, features of the documents with tokens, and their copies.

    ``counters`` count the shard too.
    """
    of_groups = counters.of_groups
    grouping = None if of_groups is None else of_groups.grouping
    for_groups = [] if grouping is None else grouping.columns
    words = counters.words
    for_words = [LANGUAGE] if words is not None and words.by_language else []
    names = ["source", "n_tokens", "text_sha256", *for_groups, *for_words]
    columns_read = list(dict.fromkeys(names))
    documents = read_columns(place.documents, columns_read)
    uris = documents["source"].combine_chunks()
    source = sources.index_of(uris)
    cells = Cells.of(source, documents, grouping)
    n, features, strengths = _scan_tokens(
        place, documents, source, cells.group, layers, limits, counters
    )
    has_tokens = np.flatnonzero(n)
    hashes = _hashes(documents["text_sha256"])
    counts = np.ones(len(documents), bool)
    counts[place.left_out] = False
    in_one_shard = np.zeros(len(has_tokens), np.int32)
    columns = {
        "doc": has_tokens + place.doc_offset,
        "in_shard": has_tokens.astype(np.int32),
        "shard": pa.DictionaryArray.from_arrays(in_one_shard, [place.shard]),
        "source": uris.take(has_tokens),
        "n_tokens": n[has_tokens].astype(np.int32),
        "hash": hashes[has_tokens],
        "cell": cells.cell[has_tokens],
    }
    prefix = source[has_tokens] << BIN_BITS
    of_features = []
    for name, values in zip(FEATURES, features, strict=True):
        columns[name] = values[has_tokens]
        of_features.append(Histogram.of(prefix + to_bins(values[has_tokens])))
    of_sources = (*of_features, Histogram.of(source[counts]))
    copied = count_copies(documents, place.copies, sources, grouping)
    if of_groups is not None:
        of_groups.documents.append(Histogram.of(cells.group[counts]))
        of_groups.with_tokens.append(Histogram.of(cells.group[has_tokens]))
    return (*strengths, *of_sources), pa.table(columns), copied


def _scan_tokens(
    place: ShardTables,
    documents: pa.Table,
    source: Ints,
    group: Ints,
    layers: Sequence[int],
    limits: FeatureLimits,
    counters: TokenCounters,
) -> tuple[Ints, list[Float32s], Histograms]:
    """One pass over the shard's normal tokens, which ``counters`` count too.

    ``source`` and ``group`` are the indices of those of each document. Returns the number of tokens
    of each document, its ``FEATURES``, and the strengths of each layer by source.
    """
    n = np.zeros(len(documents), np.int64)
    features = [np.zeros(len(documents), np.float32) for _ in FEATURES]
    sums: list[Histograms] = [tuple(Histogram.empty() for _ in layers)]
    present, ranks = np.unique(source, return_inverse=True)
    keys = present << BIN_BITS
    held = list[_Held]()
    num_held = 0
    lengths = documents["n_tokens"].to_numpy().astype(np.int64)
    columns: dict[str, bool] = {}
    if (words := counters.words) is not None:
        columns = {"with_words": True, "tagged": words.tagged, "spoken": words.by_language}
    for tokens in normal_tokens(place, documents, layers, **columns):
        n[tokens.whole], found = _features(tokens, limits)
        for feature, values in zip(features, found, strict=True):
            feature[tokens.whole] = values
        held.append((ranks[tokens.docs], *tokens.by_layer))
        num_held += len(tokens.docs) * len(layers)
        if num_held > MOST_HELD:
            sums.append(_by_source(keys, held))
            held, num_held = [], 0
        counters.add(group, lengths, tokens)
        if _num_keys(sums[1:]) > COMPACT_KEYS:
            sums = add(*sums)
    if held:
        sums.append(_by_source(keys, held))
    (total,) = add(*sums)
    return n, features, total


_Held = tuple[npt.NDArray[Any], ...]
"""Tokens that are not counted yet: the index of each one's source, then
its strength at each layer.
"""


def _by_source(keys: Ints, held: Sequence[_Held]) -> Histograms:
    """The strengths of each layer by source; ``keys`` are those of the sources with bin 0."""
    ranks, *by_layer = (np.concatenate(columns) for columns in zip(*held, strict=True))
    return tuple(values_by_type(keys, ranks, values) for values in by_layer)


class NormalTokens(NamedTuple):
    """Tokens of some whole documents of a shard that are not special, all [n]."""

    whole: slice  # the documents, in the shard
    docs: Int32s  # document of each token, in the shard
    positions: Ints  # in the document, special tokens counted too
    types: Int32s
    flags: npt.NDArray[np.uint8]
    by_layer: list[Float32s]  # strengths at each layer
    surface: pa.DictionaryArray | None  # None: not asked for, as the next
    tag: pa.DictionaryArray | None


def normal_tokens(
    place: ShardTables,
    documents: pa.Table,
    layers: Sequence[int],
    *,
    with_words: bool = False,
    tagged: bool = False,
    spoken: bool = False,
) -> Iterator[NormalTokens]:
    """The tokens of the shard with ``documents`` that are not special and count, in order.

    ``spoken``: without tags of the corpus, the languages of ``documents`` stand for them.
    """
    file = ShardTable(place.tokens.read())
    ends = np.cumsum(documents["n_tokens"].to_numpy().astype(np.int64))
    texts = [*(["surface"] if with_words else []), *(["tag"] if tagged else [])]
    columns = ["token_id", "flags", *map(strength_column, layers), *texts]
    begins = ends - documents["n_tokens"].to_numpy()
    for first, tokens in records.whole_documents(file, ends, columns):
        docs, flags, types = (tokens[name].to_numpy() for name in (DOC, "flags", "token_id"))
        is_normal = flags & SPECIAL == 0
        if len(place.left_out):
            is_normal &= ~np.isin(docs, place.left_out)
        by_layer = [tokens[strength_column(k)].to_numpy()[is_normal] for k in layers]
        positions = (first + np.arange(len(docs)) - begins[docs])[is_normal]
        whole = slice(int(docs[0]), int(docs[-1]) + 1)
        written: dict[str, pa.DictionaryArray] = {}
        if spoken:
            languages = documents[LANGUAGE].combine_chunks()
            written["tag"] = languages.take(pa.array(docs[is_normal]))
        for name in texts:
            column = tokens[name].filter(pa.array(is_normal)).unify_dictionaries()
            written[name] = column.combine_chunks()
        yield NormalTokens(
            whole,
            docs[is_normal],
            positions,
            types[is_normal],
            flags[is_normal],
            by_layer,
            written.get("surface"),
            written.get("tag"),
        )


def _num_keys(sums: Sequence[Histograms]) -> int:
    return sum(len(histogram.keys) for histogram in itertools.chain(*sums))


def _features(tokens: NormalTokens, limits: FeatureLimits) -> tuple[Ints, list[Float32s]]:
    """Number of tokens of each document, and its ``FEATURES``, rounded as strengths are.

    Both are 0 for a document without tokens. The strengths are those of the last layer.
    """
    _, docs, _, types, flags, (*_, strengths), *_ = tokens
    num_docs = tokens.whole.stop - tokens.whole.start
    docs = docs - tokens.whole.start
    n = np.bincount(docs, minlength=num_docs)
    least = np.maximum(n, 1)
    wide = strengths.astype(np.float64)

    def share(which: npt.NDArray[np.bool_]) -> Float64s:
        return np.asarray(np.bincount(docs[which], minlength=num_docs) / least)

    # numpy's unique hashes, which takes six times as long as this sort of keys nearly in order.
    pairs = np.sort((docs.astype(np.int64) << 32) + types, kind="stable")
    pairs = pairs[starts(pairs)]
    num_types = np.maximum(np.bincount(pairs >> 32, minlength=num_docs), 1)
    herdan = np.log(num_types) / np.log(np.maximum(n, 2))
    features = {
        "mean_strength": np.bincount(docs, wide, num_docs) / least,
        "share_high": share(is_high(strengths, limits.q3)),
        "share_rare": share(limits.rare[types]),
        "share_sinks": share(wide > limits.sink),
        "share_fragments": share(flags & WORD_START == 0),
        "share_distinct": np.where(n > 1, herdan, np.minimum(n, 1)),
    }
    return n, [round_strengths(features[name].astype(np.float32)) for name in FEATURES]


def _hashes(column: pa.ChunkedArray) -> Ints:
    """63 bits of each text's SHA-256; 0 for a document without a hash, which has no tokens."""
    values = pc.fill_null(column.combine_chunks(), bytes(32))
    all_bytes = np.frombuffer(values.buffers()[1], np.uint8).reshape(-1, 32)
    digests = all_bytes[values.offset : values.offset + len(values)]
    first_64_bits = np.ascontiguousarray(digests[:, :8]).view(">u8").ravel()
    return (first_64_bits >> np.uint64(1)).astype(np.int64)


def add(*sums: Histograms) -> list[Histograms]:
    of_part = zip(*sums, strict=True)
    return [tuple(Histogram.merge(parts) for parts in of_part)]
