"""Bins of a shard's tokens by type: kept in chunks that are grouped by type, and sorted once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from afn_ray.reduce.histogram import Float32s, Histogram, Ints, order, starts

GROUP_TOKENS = 1 << 16
"""Number of tokens that are sorted at a time: few enough for a core's cache."""
MOST_WAITING = 1 << 24
"""Number of tokens that wait to be sorted, at most, at 4 bytes each."""
COUNTERS_A_TOKEN = 4
"""Largest number of counters for each token with which counting is faster than sorting."""


@dataclass(frozen=True, slots=True)
class TypedBins:
    """Bins of the tokens of a chunk, grouped by type."""

    types: Ints  # [n_types], ascending keys with bin 0
    ends: Ints  # [n_types], index after the last token of each type
    bins: npt.NDArray[np.uint32]  # [n_tokens], in any order within a type

    @classmethod
    def of(cls, types: Ints, ends: Ints, values: Float32s, by_type: Ints) -> TypedBins:
        """From rounded, finite, non-negative ``values`` [n_tokens]; ``by_type`` orders them."""
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        return cls(types, ends, (bits >> np.uint32(8))[by_type])


class BinCounter:
    """The histogram of a series by type and bin, to which chunks are added."""

    def __init__(self) -> None:
        self._sum = Histogram.empty()
        self._waiting: list[TypedBins] = []

    def add(self, chunk: TypedBins) -> None:
        """Count the tokens of ``chunk``, now or later."""
        self._waiting.append(chunk)
        if sum(len(part.bins) for part in self._waiting) > MOST_WAITING:
            self.histogram()

    def histogram(self) -> Histogram:
        """The counts of all tokens so far."""
        waiting, self._waiting = self._waiting, []
        self._sum = Histogram.merge([self._sum, counted(waiting)])
        return self._sum


def counted(chunks: Sequence[TypedBins]) -> Histogram:
    """The histogram of the tokens of ``chunks``."""
    num_tokens = sum(len(chunk.bins) for chunk in chunks)
    keys = np.empty(num_tokens, np.int64)
    counts = np.empty(num_tokens, np.int64)
    end = 0
    for part in _in_groups(chunks):
        begin = end
        end += len(part.keys)
        keys[begin:end] = part.keys
        counts[begin:end] = part.counts
    return Histogram(keys[:end], counts[:end])


def _in_groups(chunks: Sequence[TypedBins]) -> Iterator[Histogram]:
    """Histograms of some types at a time, in their order."""
    if not chunks:
        return
    types = np.sort(np.concatenate([chunk.types for chunk in chunks]), kind="stable")
    types = types[starts(types)]
    n = np.zeros((len(chunks), len(types)), np.int64)
    for row, chunk in zip(n, chunks, strict=True):
        row[np.searchsorted(types, chunk.types)] = np.diff(chunk.ends, prepend=0)
    places = np.zeros((len(chunks), len(types) + 1), np.int64)
    np.cumsum(n, axis=1, out=places[:, 1:])
    for begin, end in pairwise(_cuts(n.sum(axis=0))):
        ranks = [np.repeat(np.arange(end - begin), row[begin:end]) for row in n]
        bins = [
            chunk.bins[place[begin] : place[end]]
            for chunk, place in zip(chunks, places, strict=True)
        ]
        yield _counted(types[begin:end], np.concatenate(ranks), np.concatenate(bins))


def _cuts(n: Ints) -> list[int]:
    """Indices that cut types with ``n`` tokens each into groups of about ``GROUP_TOKENS``.

    A type with a quarter of that is a group of its own: its tokens can be counted without a sort.
    """
    ends = np.cumsum(n)
    full = np.searchsorted(ends, np.arange(GROUP_TOKENS, ends[-1:].sum(), GROUP_TOKENS))
    alone = np.flatnonzero(n >= GROUP_TOKENS // 4)
    cuts = np.concatenate([[0, len(n)], full, alone, alone + 1])
    distinct: list[int] = np.unique(cuts).tolist()
    return distinct


def _counted(types: Ints, ranks: Ints, bins: npt.NDArray[np.uint32]) -> Histogram:
    """The histogram of tokens whose ``types`` are given by ``ranks``."""
    lowest = bins.min()
    width = int(bins.max() - lowest).bit_length()  # the fewer bits, the faster the sort
    keys = (ranks << width) + (bins - lowest)
    if len(types) << width <= COUNTERS_A_TOKEN * len(keys):
        counts = np.bincount(keys)
        distinct = np.flatnonzero(counts)
        counts = counts[distinct]
    else:
        keys = keys[order(keys, width + len(types).bit_length())]
        first = starts(keys)
        distinct = keys[first]
        counts = np.diff(first, append=len(keys))
    found = types[distinct >> width] + (distinct & (1 << width) - 1) + np.int64(lowest)
    return Histogram(found, counts)
