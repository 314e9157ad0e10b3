"""Lossless histograms of strengths: rounding, exact mergeable statistics, exact quantiles.

Recorded strengths keep 15 bits of mantissa. Non-negative floats sort like their bit patterns. So
the upper 24 bits of a strength are an ordered integer *bin* that equals the recorded value. A
histogram of bins loses nothing, can be added in any order, and gives every quantile as an exact
order statistic.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from afn_ray.reduce.stats import quantile_index
from afn_ray.schema import SUMMARY_SCHEMA, Series

Float32s = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

DEFINITION = "inverse CDF: the smallest recorded value with at least q*n values at or below it"
"""Definition of a quantile: numpy.quantile(method="inverted_cdf"), DuckDB's quantile_disc."""

BIN_BITS = 24
"""Bits of a bin in a key."""
BIN_MASK = (1 << BIN_BITS) - 1
"""Mask of the bin in a key."""
TYPE_BITS = 31
"""Bits of a token id in a key, above those of the bin."""
TYPE_MASK = (1 << TYPE_BITS) - 1
"""Mask of the token id in a key without a bin."""
SPECIAL_KEY = 1 << (BIN_BITS + TYPE_BITS)
"""Bit of a key that marks a special token."""
COMPACT_KEYS = 1 << 22
"""Number of keys in unmerged chunks after which they are merged."""
MERGE_KEYS = 1 << 18
"""Number of keys that a merge sorts at a time.

They fit into a core's cache and need little memory beside the sum.
"""


def round_strengths(values: Float32s) -> Float32s:
    """``values`` rounded to 15 bits of mantissa, half to even.

    The relative error is at most 2^-16. -0 becomes +0; values that are not finite stay the same.
    """
    bits = np.asarray(values, np.float32).view(np.uint32)
    is_odd = (bits >> 8) & 1
    rounded = (bits + np.uint32(0x7F) + is_odd) & np.uint32(0xFFFFFF00)
    recorded = np.where(np.isfinite(values), rounded, bits)
    # Adding 0 turns -0 into +0.
    return recorded.astype(np.uint32).view(np.float32) + np.float32(0)


def to_bins(values: Float32s) -> Ints:
    """Bins of rounded, finite, non-negative strengths."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return (bits >> 8).astype(np.int64)


def to_values(bins: Ints) -> Float32s:
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
        if not len(first):
            return cls(keys, counts)
        return cls(keys[first], np.add.reduceat(counts, first))

    @classmethod
    def empty(cls) -> Histogram:
        """The histogram of no keys."""
        return cls(np.empty(0, np.int64), np.empty(0, np.int64))

    @classmethod
    def merge(cls, parts: Iterable[Histogram]) -> Histogram:
        """The sum of ``parts``.

        It is made one range of keys at a time, so it needs little memory beside parts and sum.
        """
        parts = [part for part in parts if len(part.keys)]
        if not parts:
            return cls.empty()
        if len(parts) == 1:
            return parts[0]
        sums = [cls._sum(pieces) for pieces in _cut_alike(parts)]
        keys = np.concatenate([one.keys for one in sums])
        counts = np.concatenate([one.counts for one in sums])
        return cls(keys, counts)

    @classmethod
    def _sum(cls, parts: Sequence[Histogram]) -> Histogram:
        """The sum of ``parts``; keys that lie close together are counted without a sort."""
        parts = [part for part in parts if len(part.keys)]
        if len(parts) == 1:
            return parts[0]
        low = min(part.keys[0] for part in parts)
        width = int(max(part.keys[-1] for part in parts) - low) + 1
        if width > sum(len(part.keys) for part in parts):
            return cls._concatenated(parts)
        counts = np.zeros(width, np.int64)
        occurs = np.zeros(width, np.bool_)
        for part in parts:
            counts[part.keys - low] += part.counts
            occurs[part.keys - low] = True
        keys = np.flatnonzero(occurs)
        return cls(keys + low, counts[keys])

    @classmethod
    def _concatenated(cls, parts: Sequence[Histogram]) -> Histogram:
        """The sum of ``parts``, made by one sort of all their keys."""
        keys = np.concatenate([part.keys for part in parts])
        counts = np.concatenate([part.counts for part in parts])
        return cls.of(keys, counts)

    def slice(self, begin: int, end: int) -> Histogram:
        """The keys at the indices ``begin`` to ``end``, without copying them."""
        return Histogram(self.keys[begin:end], self.counts[begin:end])

    @property
    def n(self) -> int:
        """Sum of the counts."""
        return int(self.counts.sum())

    def counts_of(self, keys: Ints) -> Ints:
        """Counts of ``keys``, in any order; 0 for keys that do not occur."""
        if not len(self.keys):
            return np.zeros(len(keys), np.int64)
        last = len(self.keys) - 1
        at = np.minimum(np.searchsorted(self.keys, keys), last)
        occurs = self.keys[at] == keys
        return np.where(occurs, self.counts[at], 0)

    def quantile_key(self, numerator: int, denominator: int) -> int:
        """The exact key at the quantile ``numerator/denominator`` (inverse CDF).

        The histogram must not be empty.
        """
        return int(self.keys[quantile_index(self.counts, numerator, denominator)])

    def quartile_keys(self) -> Ints:
        """The keys at Q1, Q2 and Q3 (inverse CDF), [3]. The histogram must not be empty."""
        return np.array([self.quantile_key(i, 4) for i in (1, 2, 3)])


def order(keys: Ints, num_bits: int) -> Ints:
    """Stable order that sorts ``keys``, which are not negative and have at most ``num_bits`` bits.

    NumPy sorts numbers of 16 bits by counting, several times as fast as longer ones.
    """
    found: Ints = np.argsort(keys.astype(np.uint16), kind="stable")
    for shift in range(16, num_bits, 16):
        digits = (keys >> shift).astype(np.uint16)[found]
        found = found[np.argsort(digits, kind="stable")]
    return found


def values_by_type(types: Ints, ranks: Ints, values: Float32s) -> Histogram:
    """The histogram of tokens by type and bin.

    ``types`` are ascending keys with bin 0; ``ranks`` are the index among them of each token.
    """
    if not len(ranks):
        return Histogram.empty()
    bins = to_bins(values)
    lowest = bins.min()
    width = int(bins.max() - lowest).bit_length()  # the fewer bits, the faster the sort
    keys = (ranks << width) + (bins - lowest)
    keys = keys[order(keys, width + len(types).bit_length())]
    first = starts(keys)
    distinct = keys[first]
    found = types[distinct >> width] + (distinct & (1 << width) - 1) + lowest
    return Histogram(found, np.diff(first, append=len(keys)))


def _cut_alike(parts: Sequence[Histogram]) -> Iterator[list[Histogram]]:
    """``parts`` cut at the same keys: one piece of each, about ``MERGE_KEYS`` keys together."""
    lengths = [len(part.keys) for part in parts]
    longest = parts[int(np.argmax(lengths))].keys
    step = max(1, MERGE_KEYS * len(longest) // sum(lengths))
    limits = longest[step::step]
    cuts = [np.searchsorted(part.keys, limits).tolist() for part in parts]
    begins = [0] * len(parts)
    for ends in [*zip(*cuts, strict=True), lengths]:
        ranges = zip(parts, begins, ends, strict=True)
        yield [part.slice(begin, end) for part, begin, end in ranges]
        begins = list(ends)


def by_index(histogram: Histogram, num: int, bits: int) -> Iterator[Histogram]:
    """The histogram of each of ``num`` indices, which its keys hold above ``bits``."""
    ends = np.searchsorted(histogram.keys, np.arange(num + 1) << bits).tolist()
    for begin, end in pairwise(ends):
        part = histogram.slice(begin, end)
        yield Histogram(part.keys & ((1 << bits) - 1), part.counts)


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
    def empty(cls) -> SeriesSummary:
        """The summary of no tokens."""
        nothing = Histogram.empty()
        return cls(nothing, nothing, nothing, nothing)

    def negative(self) -> SeriesSummary:
        """The counts below zero: added, they take these tokens out of a sum."""
        parts = (self.values, self.docs, self.word_starts, self.whole_words)
        return SeriesSummary(*(Histogram(part.keys, -part.counts) for part in parts))

    def without_zeros(self) -> SeriesSummary:
        """The values and types that occur; others are left of tokens that were taken out."""
        if self.values.counts.all():
            return self
        occurs = self.values.counts != 0
        there = self.docs.counts != 0
        parts = (self.docs, self.word_starts, self.whole_words)
        values = Histogram(self.values.keys[occurs], self.values.counts[occurs])
        return SeriesSummary(
            values, *(Histogram(part.keys[there], part.counts[there]) for part in parts)
        )

    @classmethod
    def from_table(cls, table: pa.Table) -> SeriesSummary:
        """Read from the rows of one series in ``SUMMARY_SCHEMA``."""
        if not len(table):
            return cls.empty()
        table = table.combine_chunks()
        special = table["special"].to_numpy().astype(np.int64)
        token_ids = table["token_id"].to_numpy().astype(np.int64)
        types = special * SPECIAL_KEY + (token_ids << BIN_BITS)
        lists = table["bins"].chunk(0)
        num_bins = np.diff(lists.offsets.to_numpy())
        bins = lists.flatten().to_numpy().astype(np.int64)
        counts = table["counts"].chunk(0).flatten().to_numpy()
        return cls(
            Histogram(np.repeat(types, num_bins) + bins, counts),
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
        num_rows = len(keys)
        token_ids = (keys % SPECIAL_KEY) >> BIN_BITS
        ends = pa.array(np.append(first, len(types)).astype(np.int32))
        bins = pa.array((self.values.keys & BIN_MASK).astype(np.int32))
        counts = pa.array(self.values.counts)
        type_of_bins = SUMMARY_SCHEMA.field("bins").type
        type_of_counts = SUMMARY_SCHEMA.field("counts").type
        columns = [
            pa.array([series.signal] * num_rows, pa.string()),
            pa.array(np.full(num_rows, series.layer, np.int16)),
            pa.array(keys >= SPECIAL_KEY),
            pa.array(token_ids.astype(np.int32)),
            pa.array(self.docs.counts_of(keys)),
            pa.array(self.word_starts.counts_of(keys)),
            pa.array(self.whole_words.counts_of(keys)),
            pa.ListArray.from_arrays(ends, bins, type=type_of_bins),
            pa.ListArray.from_arrays(ends, counts, type=type_of_counts),
        ]
        return pa.Table.from_arrays(columns, schema=SUMMARY_SCHEMA)

    @classmethod
    def merge(cls, parts: Iterable[SeriesSummary]) -> SeriesSummary:
        """The sum of ``parts``, read one by one; the same for any order and grouping.

        Parts are collected until they are as large as the sum so far. So n parts cost n log n and
        not n squared. Peak memory is four times the result: 64 bytes for each distinct pair of a
        type and a strength.
        """
        total = cls.empty()
        waiting: list[SeriesSummary] = []
        waiting_keys = 0
        for part in parts:
            waiting.append(part)
            waiting_keys += len(part.values.keys)
            if waiting_keys > max(MERGE_KEYS, len(total.values.keys)):
                total = cls._add([total, *waiting])
                waiting, waiting_keys = [], 0
        return cls._add([total, *waiting])

    @classmethod
    def _add(cls, parts: Sequence[SeriesSummary]) -> SeriesSummary:
        return cls(
            Histogram.merge(part.values for part in parts),
            Histogram.merge(part.docs for part in parts),
            Histogram.merge(part.word_starts for part in parts),
            Histogram.merge(part.whole_words for part in parts),
        )
