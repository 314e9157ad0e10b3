"""Distances of two histograms of strengths, and tests of two shares."""

from __future__ import annotations

import math
from bisect import bisect_left

import numpy as np

from afn_ray.reduce.histogram import Histogram, starts
from afn_ray.reduce.stats import Floats, Ints

NUM_BINS = 10
"""Number of bins for ``psi`` and ``jensen_shannon``."""
LEAST_EXPECTED = 5
"""Smallest expected number of tokens for which a share is approximately normal."""


def psi(a: Histogram, b: Histogram) -> float:
    """Population stability index: the sum over bins of (q - p) ln(q / p).

    p and q are the bin's shares of ``a`` and ``b``. Bins end at the deciles of ``a`` (inverse CDF,
    the end included); the last bin has no upper end. Equal deciles end one bin. A bin that is empty
    in one of the two counts there as half a token. A bin that is empty in both is left out. The
    index is not symmetric, because the bins are those of ``a``. Neither histogram may be empty.
    """
    ends = np.unique([a.quantile_key(i, NUM_BINS) for i in range(1, NUM_BINS)])
    in_a, in_b = _binned(a, ends), _binned(b, ends)
    some = (in_a > 0) | (in_b > 0)
    p, q = np.maximum(in_a[some], 0.5) / a.n, np.maximum(in_b[some], 0.5) / b.n
    return math.fsum((q - p) * np.log(q / p))


def kolmogorov_smirnov(a: Histogram, b: Histogram) -> float:
    """Largest difference of the two empirical CDFs over all recorded values, 0 to 1.

    Neither histogram may be empty.
    """
    keys = _keys_of(a, b)
    return float(np.abs(_at_or_below(a, keys) / a.n - _at_or_below(b, keys) / b.n).max())


def jensen_shannon(a: Histogram, b: Histogram) -> float:
    """Jensen-Shannon distance to base 2, 0 to 1: the square root of the divergence.

    It is symmetric and a metric. It uses ten bins that end at the deciles of the even mixture of
    the two, whatever their sizes. Without bins it would be near 1 for any two small samples,
    because small samples share hardly any value. Neither histogram may be empty.
    """
    keys, n_a, n_b = _keys_of(a, b), a.n, b.n
    below_a, below_b = _at_or_below(a, keys), _at_or_below(b, keys)

    def mixture(at: int) -> int:
        # Python integers: the product may exceed 64 bits.
        return NUM_BINS * (int(below_a[at]) * n_b + int(below_b[at]) * n_a)

    deciles = [
        bisect_left(range(len(keys)), 2 * i * n_a * n_b, key=mixture) for i in range(1, NUM_BINS)
    ]
    ends = keys[np.unique(deciles)]
    p, q = _binned(a, ends) / n_a, _binned(b, ends) / n_b
    middle = (p + q) / 2
    bits = (math.fsum(s[s > 0] * np.log2(s[s > 0] / middle[s > 0])) for s in (p, q))
    return math.sqrt(min(1.0, max(0.0, sum(bits) / 2)))


def _keys_of(a: Histogram, b: Histogram) -> Ints:
    """The distinct keys of both, ascending."""
    keys = np.sort(np.concatenate([a.keys, b.keys]), kind="stable")  # two ascending runs: a merge
    return keys[starts(keys)]


def _at_or_below(histogram: Histogram, keys: Ints) -> Ints:
    """Number of values of ``histogram`` at or below each of ``keys``."""
    cumulative = np.append(0, np.cumsum(histogram.counts))
    return cumulative[np.searchsorted(histogram.keys, keys, side="right")]


def _binned(histogram: Histogram, ends: Ints) -> Ints:
    """Number of values in each bin; ``ends`` are the inclusive ends of all bins but the last."""
    return np.diff(_at_or_below(histogram, ends), prepend=0, append=histogram.n)


def two_proportions(high_a: Ints, n_a: Ints, high_b: Ints, n_b: Ints) -> tuple[Floats, Floats]:
    """z of the share ``high_b / n_b`` against ``high_a / n_a``, and its two-sided p.

    z uses the variance of the pooled share. With fewer than ``LEAST_EXPECTED`` expected tokens of
    either kind in either run, that z is not normal. Then z is that of the log-odds ratio, with one
    token of the pooled share added to each run as a prior (Monroe, Colaresi and Quinn, 2008). If no
    token or every token of both runs is HIGH, there is no difference: z is 0 and p is 1.
    """
    pooled = (high_a + high_b) / (n_a + n_b)
    sd = np.sqrt(pooled * (1 - pooled) * (1 / n_a + 1 / n_b))
    z = np.divide(high_b / n_b - high_a / n_a, sd, out=np.zeros(len(sd)), where=sd > 0)
    few = (sd > 0) & (np.minimum(pooled, 1 - pooled) * np.minimum(n_a, n_b) < LEAST_EXPECTED)
    p, runs = pooled[few], ((high_a[few], n_a[few]), (high_b[few], n_b[few]))
    odds = [np.log(high + p) - np.log(n - high + 1 - p) for high, n in runs]
    variance = sum(1 / (high + p) + 1 / (n - high + 1 - p) for high, n in runs)
    z[few] = (odds[1] - odds[0]) / np.sqrt(variance)
    return z, np.array([math.erfc(abs(value) / math.sqrt(2)) for value in z.tolist()])


def benjamini_hochberg(p: Floats) -> Floats:
    """q of each test with the given ``p``: the lowest false discovery rate that selects it."""
    order = np.argsort(p, kind="stable")[::-1]
    q = np.empty(len(p))
    q[order] = np.minimum.accumulate(np.minimum(1.0, p[order] * len(p) / np.arange(len(p), 0, -1)))
    return q
