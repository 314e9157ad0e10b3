"""Counts of integer keys in one array, where it is not too large, and else in histograms."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from afn_ray.reduce.histogram import COMPACT_KEYS, Histogram
from afn_ray.reduce.stats import Ints

DENSE_COUNTS = 1 << 24
"""Number of counters up to which keys are counted in one array, 128 MB."""


class KeyCounter:
    """Counts of integer keys: of those below ``size`` in one array, if it is not too large."""

    def __init__(self, size: int, num: int = 1) -> None:
        """Begin with nothing; ``num`` such counters have ``DENSE_COUNTS`` between them."""
        self.is_dense = num * size <= DENSE_COUNTS
        self._counts = np.zeros(size if self.is_dense else 0, np.int64)
        self._sums = [Histogram.empty()]

    def add(self, keys: Ints, counts: Ints | None = None) -> None:
        """Count ``keys`` [n], which lie below ``size``, ``counts`` [n] times each or once."""
        if not self.is_dense:
            self.add_others(keys, counts)
        else:
            np.add.at(self._counts, keys, 1 if counts is None else counts)

    def add_others(self, keys: Ints, counts: Ints | None = None) -> None:
        """Count ``keys`` [n] of any size in a histogram, whose keys ``sums`` does not change."""
        if not len(keys):
            return
        self._sums.append(Histogram.of(keys, counts))
        if sum(len(part.keys) for part in self._sums[1:]) > COMPACT_KEYS:
            self._sums = [Histogram.merge(self._sums)]

    def sums(self, keys_of: Callable[[Ints], Ints] = np.asarray) -> Histogram:
        """The counts; of keys in the array, ``keys_of`` gives those of the histogram, in order."""
        there = np.flatnonzero(self._counts)
        return Histogram.merge([Histogram(keys_of(there), self._counts[there]), *self._sums])
