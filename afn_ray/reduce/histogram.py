"""Lossless histograms of strengths: rounding, exact mergeable statistics, exact quantiles.

Recorded strengths keep 15 bits of mantissa. Non-negative floats sort like their bit patterns. So
the upper 24 bits of a strength are an ordered integer *bin* that equals the recorded value. A
histogram of bins loses nothing, can be added in any order, and gives every quantile as an exact
order statistic.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from afn_ray.reduce.stats import quantile_index
from afn_ray.schema import SPECIAL, SUMMARY_SCHEMA, TAGGED_SUMMARY_SCHEMA, WORD_START, Series

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

DEFINITION = "inverse CDF: the smallest recorded value with at least q*n values at or below it"
"""Definition of a quantile: numpy.quantile(method="inverted_cdf"), DuckDB's quantile_disc."""

BIN_BITS = 24
"""Bits of a bin in a key."""
TYPE_BITS = 31
"""Bits of a token id in a key, above those of the bin."""
SPECIAL_KEY = 1 << (BIN_BITS + TYPE_BITS)
"""Bit of a key that marks a special token."""
COUNTED_IDS = 1 << 18
"""Number of token ids up to which types are counted in an array, however few the tokens are."""
COMPACT_KEYS = 1 << 22
"""Number of keys in unmerged chunks after which they are merged."""
MERGE_KEYS = 1 << 18
"""Number of keys that a merge sorts at a time.

They fit into a core's cache and need little memory beside the sum.
"""


def round_strengths(values: Floats) -> Floats:
    """``values`` rounded to 15 bits of mantissa, half to even.

    The relative error is at most 2^-16. -0 becomes +0; values that are not finite stay the same.
    """
    bits = np.asarray(values, np.float32).view(np.uint32)
    finite = np.isfinite(values)
    rounded = (bits + np.uint32(0x7F) + ((bits >> 8) & 1)) & np.uint32(0xFFFFFF00)
    # Adding 0 turns -0 into +0.
    return np.where(finite, rounded, bits).astype(np.uint32).view(np.float32) + np.float32(0)


def to_bins(values: Floats) -> Ints:
    """Bins of rounded, finite, non-negative strengths."""
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 8).astype(np.int64)


def to_values(bins: Ints) -> Floats:
    """Strengths of bins; the inverse of ``to_bins``."""
    return (bins.astype(np.uint32) << 8).view(np.float32)


def starts(keys: Ints) -> Ints:
    """Index at which each run of equal ``keys`` begins."""
    first = np.ones(len(keys), bool)
    np.not_equal(keys[1:], keys[:-1], out=first[1:])
    return np.flatnonzero(first)


@dataclass(frozen=True, slots=True)
class Histogram:
    """Sorted distinct integer keys and the count of each, both int64 [n]."""

    keys: Ints
    counts: Ints

    @classmethod
    def of(cls, keys: Ints, counts: Ints | None = None) -> Histogram:
        """The histogram of ``keys`` in any order; ``counts`` are their weights, 1 by default."""
        if counts is None:
            keys = np.sort(keys)
            first = starts(keys)
            return cls(keys[first], np.diff(first, append=len(keys)))
        order = np.argsort(keys, kind="stable")
        keys, counts = keys[order], counts[order]
        first = starts(keys)
        return cls(keys[first], np.add.reduceat(counts, first) if len(first) else counts)

    @classmethod
    def of_types(cls, types: Ints, size: int) -> Histogram:
        """The histogram of ``types`` as keys; a special type is its token id plus ``size``.

        Token ids are below ``size``.
        """
        if size > max(COUNTED_IDS, len(types)):  # few tokens of large ids: an array would be sparse
            return cls.of(_type_keys(types, size))
        counts = np.bincount(types, minlength=1)
        there = np.flatnonzero(counts)
        return cls(_type_keys(there, size), counts[there])

    @classmethod
    def merge(cls, parts: Iterable[Histogram]) -> Histogram:
        """The sum of ``parts``.

        It is made one range of keys at a time, so it needs little memory beside parts and sum.
        """
        parts = [p for p in parts if len(p.keys)] or [cls.of(np.empty(0, np.int64))]
        if len(parts) == 1:
            return parts[0]
        longest = max((p.keys for p in parts), key=len)
        step = max(1, MERGE_KEYS * len(longest) // sum(len(p.keys) for p in parts))
        ends = [np.append(np.searchsorted(p.keys, longest[step::step]), len(p.keys)) for p in parts]
        begins = [np.append(0, e[:-1]) for e in ends]
        sums = []
        for at in range(len(ends[0])):
            ranges = [slice(b[at], e[at]) for b, e in zip(begins, ends, strict=True)]
            keys = np.concatenate([p.keys[r] for p, r in zip(parts, ranges, strict=True)])
            counts = np.concatenate([p.counts[r] for p, r in zip(parts, ranges, strict=True)])
            sums.append(cls.of(keys, counts))
        return cls(np.concatenate([s.keys for s in sums]), np.concatenate([s.counts for s in sums]))

    @property
    def n(self) -> int:
        """Sum of the counts."""
        return int(self.counts.sum())

    def quantile_key(self, numerator: int, denominator: int) -> int:
        """The exact key at the quantile ``numerator/denominator`` (inverse CDF).

        The histogram must not be empty.
        """
        return int(self.keys[quantile_index(self.counts, numerator, denominator)])


def _type_keys(types: Ints, size: int) -> Ints:
    """Keys of ``types`` with bin 0; special types are from ``size`` on."""
    is_special = types >= size
    keys: Ints = (types - size * is_special << BIN_BITS) + is_special * SPECIAL_KEY
    return keys


class Summary:
    """Statistics of one shard, collected chunk by chunk.

    Memory is bounded by the number of types times occupied bins. With ``tagged``, tokens have tags,
    and the summary also counts how often each type has each tag.
    """

    def __init__(self, series: Sequence[Series], tagged: bool = False) -> None:
        self._values: dict[Series, list[Histogram]] = {s: [] for s in series}
        self._docs: list[Histogram] = []
        self._word_starts: list[Histogram] = []
        self._whole_words: list[Histogram] = []
        self._tags = (
            [TypeTags.of(np.empty(0, np.int32), pa.array([], pa.string()))] if tagged else None
        )

    def add(
        self,
        docs: npt.NDArray[np.int32],
        token_ids: npt.NDArray[np.int32],
        flags: npt.NDArray[np.uint8],
        values: Mapping[Series, Floats],
        tags: pa.Array | None = None,
    ) -> None:
        """Add the tokens of whole documents.

        ``values`` are [n] for each series; they must be rounded, finite and not negative. ``tags``
        are strings, null for a token without a tag.
        """
        size = int(token_ids.max(initial=0)) + 1
        types = token_ids + size * (flags & SPECIAL).astype(np.int64)
        # Documents come one after the other, and a stable sort is fast on keys in such an order.
        in_docs = np.sort(docs.astype(np.int64) * (2 * size) + types, kind="stable")
        in_docs = in_docs[starts(in_docs)]
        self._docs.append(Histogram.of_types(in_docs % (2 * size), size))
        self._word_starts.append(Histogram.of_types(types[(flags & WORD_START) > 0], size))
        self._whole_words.append(Histogram.of_types(types[whole_words(docs, flags)], size))
        keys = _type_keys(types, size)
        for series, parts in self._values.items():
            parts.append(Histogram.of(keys + to_bins(values[series])))
            if sum(len(p.keys) for p in parts[1:]) > COMPACT_KEYS:
                parts[:] = [Histogram.merge(parts)]
        if self._tags is not None:
            self._tags.append(TypeTags.of(token_ids, tags))
            if sum(len(part.table) for part in self._tags[1:]) > COMPACT_KEYS:
                self._tags[:] = [TypeTags.merge(self._tags)]

    def tables(self) -> Iterable[pa.Table]:
        """One table per series, as in ``SUMMARY_SCHEMA``.

        With tags the schema is ``TAGGED_SUMMARY_SCHEMA``, and the table of the tags comes last.
        """
        counts = (self._docs, self._word_starts, self._whole_words)
        docs, starts, wholes = (Histogram.merge(parts) for parts in counts)
        for series, parts in self._values.items():
            table = SeriesSummary(Histogram.merge(parts), docs, starts, wholes).to_table(series)
            yield (
                table
                if self._tags is None
                else table.append_column(
                    TAGGED_SUMMARY_SCHEMA.field("tag"), pa.nulls(len(table), pa.string())
                )
            )
        if self._tags is not None:
            yield TypeTags.merge(self._tags).to_table()


@dataclass(frozen=True, slots=True)
class TypeTags:
    """Counts of the tags of each type in a labelled corpus; their sums are exact in any order."""

    table: pa.Table  # token_id, tag, n; distinct pairs in order

    @classmethod
    def of(cls, token_ids: npt.NDArray[np.int32], tags: pa.Array | None) -> TypeTags:
        """Counts of tokens; tokens whose tag is null are left out."""
        return cls._sum(
            pa.table({"token_id": token_ids, "tag": tags, "n": np.ones(len(token_ids), np.int64)})
        )

    @classmethod
    def merge(cls, parts: Iterable[TypeTags]) -> TypeTags:
        """The sum of ``parts``; at least one is required."""
        return cls._sum(pa.concat_tables([part.table for part in parts]))

    @classmethod
    def _sum(cls, table: pa.Table) -> TypeTags:
        sums = (
            table.filter(pc.is_valid(table["tag"]))
            .group_by(["token_id", "tag"])
            .aggregate([("n", "sum")])
        )
        order = [("token_id", "ascending"), ("tag", "ascending")]
        return cls(
            sums.select(["token_id", "tag", "n_sum"])
            .rename_columns(["token_id", "tag", "n"])
            .sort_by(order)
        )

    @classmethod
    def from_table(cls, table: pa.Table) -> TypeTags:
        """From the tag rows of ``TAGGED_SUMMARY_SCHEMA``."""
        n = table["counts"].combine_chunks().flatten()
        return cls(pa.table({"token_id": table["token_id"], "tag": table["tag"], "n": n}))

    def to_table(self) -> pa.Table:
        """Rows of ``TAGGED_SUMMARY_SCHEMA`` for this summary; the inverse of ``from_table``.

        Beside the type and the tag, only ``counts`` has a meaning; the other numbers are 0.
        """
        zeros, ends = (
            np.zeros(len(self.table), np.int64),
            np.arange(len(self.table) + 1, dtype=np.int32),
        )
        columns = {
            "signal": pa.array(["tag"] * len(zeros), pa.string()),
            "layer": zeros,
            "special": zeros,
            "n_docs": zeros,
            "n_word_start": zeros,
            "n_whole": zeros,
            "bins": pa.ListArray.from_arrays(ends, zeros),
            "counts": pa.ListArray.from_arrays(ends, self.table["n"].combine_chunks()),
            "token_id": self.table["token_id"],
            "tag": self.table["tag"],
        }
        return pa.table(
            [columns[name] for name in TAGGED_SUMMARY_SCHEMA.names], TAGGED_SUMMARY_SCHEMA.names
        ).cast(TAGGED_SUMMARY_SCHEMA)

    def most_frequent(self) -> dict[int, str]:
        """The most frequent tag of each type; for equal counts, the first by name."""
        best: dict[int, tuple[int, str]] = {}
        for token_id, tag, n in zip(
            *(self.table[c].to_pylist() for c in ("token_id", "tag", "n")), strict=True
        ):
            if n > best.get(token_id, (0, ""))[0]:
                best[token_id] = (n, tag)
        return {token_id: tag for token_id, (_, tag) in best.items()}


def whole_words(docs: npt.NDArray[np.int32], flags: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Whether each token is a whole word, bool [n].

    A whole word starts a word, and the next token of the document does not continue it. ``docs``
    and ``flags`` [n] belong to the tokens of whole documents.
    """
    goes_on = np.zeros(len(flags), np.bool_)
    goes_on[:-1] = (flags[1:] & (SPECIAL | WORD_START) == 0) & (docs[1:] == docs[:-1])
    is_whole: npt.NDArray[np.bool_] = ((flags & WORD_START) != 0) & ~goes_on
    return is_whole


def _look_up(histogram: Histogram, keys: Ints) -> Ints:
    """Counts of ``keys``; 0 for keys that do not occur."""
    if not len(histogram.keys):
        return np.zeros(len(keys), np.int64)
    at = np.minimum(np.searchsorted(histogram.keys, keys), len(histogram.keys) - 1)
    return np.where(histogram.keys[at] == keys, histogram.counts[at], 0)


@dataclass(frozen=True, slots=True)
class SeriesSummary:
    """Summary of one series over one shard or many.

    It counts values, and for each type documents, word starts and whole words.
    """

    values: Histogram  # keys: special bit, type, bin
    docs: Histogram  # keys: special bit, type, 0; as in the next two
    word_starts: Histogram
    whole_words: Histogram

    @classmethod
    def from_table(cls, table: pa.Table) -> SeriesSummary:
        """From the rows of one series in ``SUMMARY_SCHEMA``."""
        table = table.combine_chunks()
        types = table["special"].to_numpy().astype(np.int64) * SPECIAL_KEY
        types += table["token_id"].to_numpy().astype(np.int64) << BIN_BITS
        if not len(types):
            empty = Histogram(np.empty(0, np.int64), np.empty(0, np.int64))
            return cls(empty, empty, empty, empty)
        lists = table["bins"].chunk(0)
        lengths = np.diff(lists.offsets.to_numpy())
        bins = lists.flatten().to_numpy().astype(np.int64)
        counts = table["counts"].chunk(0).flatten().to_numpy()
        return cls(
            Histogram(np.repeat(types, lengths) + bins, counts),
            Histogram(types, table["n_docs"].to_numpy()),
            Histogram(types, table["n_word_start"].to_numpy()),
            Histogram(types, table["n_whole"].to_numpy()),
        )

    def to_table(self, series: Series) -> pa.Table:
        """Rows of ``SUMMARY_SCHEMA`` for this summary; the inverse of ``from_table``.

        There is one row for each type; special types come last.
        """
        types = self.values.keys >> BIN_BITS
        first = starts(types)
        keys = types[first] << BIN_BITS
        ends = pa.array(np.append(first, len(types)).astype(np.int32))
        bins = pa.array((self.values.keys & ((1 << BIN_BITS) - 1)).astype(np.int32))
        columns = [
            pa.array([series.signal] * len(first), pa.string()),
            pa.array(np.full(len(first), series.layer, np.int16)),
            pa.array(keys >= SPECIAL_KEY),
            pa.array(((keys % SPECIAL_KEY) >> BIN_BITS).astype(np.int32)),
            pa.array(_look_up(self.docs, keys)),
            pa.array(_look_up(self.word_starts, keys)),
            pa.array(_look_up(self.whole_words, keys)),
            pa.ListArray.from_arrays(ends, bins, type=SUMMARY_SCHEMA.field("bins").type),
            pa.ListArray.from_arrays(
                ends, pa.array(self.values.counts), type=SUMMARY_SCHEMA.field("counts").type
            ),
        ]
        return pa.Table.from_arrays(columns, schema=SUMMARY_SCHEMA)

    @classmethod
    def merge(cls, parts: Iterable[SeriesSummary]) -> SeriesSummary:
        """The sum of ``parts``, read one by one; the same for any order and grouping.

        Parts are collected until they are as large as the sum so far. So n parts cost n log n and
        not n squared. Peak memory is four times the result: 64 bytes for each distinct pair of a
        type and a strength.
        """
        total, waiting, num_keys = cls._add([]), [], 0
        for part in parts:
            waiting.append(part)
            num_keys += len(part.values.keys)
            if num_keys > max(MERGE_KEYS, len(total.values.keys)):
                total, waiting, num_keys = cls._add([total, *waiting]), [], 0
        return cls._add([total, *waiting])

    @classmethod
    def _add(cls, parts: list[SeriesSummary]) -> SeriesSummary:
        return cls(
            Histogram.merge(p.values for p in parts),
            Histogram.merge(p.docs for p in parts),
            Histogram.merge(p.word_starts for p in parts),
            Histogram.merge(p.whole_words for p in parts),
        )
