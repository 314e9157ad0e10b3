"""Distances of two histograms of strengths, and tests of two shares."""

from __future__ import annotations

import math
from bisect import bisect_left

import numpy as np

from afn_ray.reduce.histogram import Histogram, starts
from afn_ray.reduce.stats import Float64s, Ints

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
    in_a = _binned(a, ends)
    in_b = _binned(b, ends)
    occupied = (in_a > 0) | (in_b > 0)
    p = np.maximum(in_a[occupied], 0.5) / a.n
    q = np.maximum(in_b[occupied], 0.5) / b.n
    return math.fsum((q - p) * np.log(q / p))


def kolmogorov_smirnov(a: Histogram, b: Histogram) -> float:
    """Largest difference of the two empirical CDFs over all recorded values, 0 to 1.

    Neither histogram may be empty.
    """
    keys = _keys_of(a, b)
    cdf_a = _at_or_below(a, keys) / a.n
    cdf_b = _at_or_below(b, keys) / b.n
    return float(np.abs(cdf_a - cdf_b).max())


def jensen_shannon(a: Histogram, b: Histogram) -> float:
    """Jensen-Shannon distance to base 2, 0 to 1: the square root of the divergence.

    It is symmetric and a metric. It uses ten bins that end at the deciles of the even mixture of
    the two, whatever their sizes. Without bins it would be near 1 for any two small samples,
    because small samples share hardly any value. Neither histogram may be empty.
    """
    ends = _deciles_of_mixture(a, b)
    p = _binned(a, ends) / a.n
    q = _binned(b, ends) / b.n
    middle = (p + q) / 2
    bits = _divergence(p, middle) + _divergence(q, middle)
    return math.sqrt(min(1.0, max(0.0, bits / 2)))


def _deciles_of_mixture(a: Histogram, b: Histogram) -> Ints:
    """Distinct deciles of the even mixture of ``a`` and ``b``, whatever their sizes; ascending."""
    keys = _keys_of(a, b)
    n_a = a.n
    n_b = b.n
    below_a = _at_or_below(a, keys)
    below_b = _at_or_below(b, keys)

    def mixture(at: int) -> int:
        # Python integers: the product may exceed 64 bits.
        return NUM_BINS * (int(below_a[at]) * n_b + int(below_b[at]) * n_a)

    indices = range(len(keys))
    ranks = (2 * i * n_a * n_b for i in range(1, NUM_BINS))
    deciles = [bisect_left(indices, rank, key=mixture) for rank in ranks]
    return keys[np.unique(deciles)]


def _divergence(p: Float64s, q: Float64s) -> float:
    """Kullback-Leibler divergence of ``p`` from ``q``, in bits."""
    occupied = p > 0
    p, q = p[occupied], q[occupied]
    return math.fsum(p * np.log2(p / q))


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


def two_proportions(high_a: Ints, n_a: Ints, high_b: Ints, n_b: Ints) -> tuple[Float64s, Float64s]:
    """z of the share ``high_b / n_b`` against ``high_a / n_a``, and its two-sided p.

    z uses the variance of the pooled share. With fewer than ``LEAST_EXPECTED`` expected tokens of
    either kind in either run, that z is not normal. Then z is that of the log-odds ratio, with one
    token of the pooled share added to each run as a prior (Monroe, Colaresi and Quinn, 2008). If no
    token or every token of both runs is HIGH, there is no difference: z is 0 and p is 1.
    """
    pooled = (high_a + high_b) / (n_a + n_b)
    sd = np.sqrt(pooled * (1 - pooled) * (1 / n_a + 1 / n_b))
    z = np.zeros(len(sd))
    difference = high_b / n_b - high_a / n_a
    np.divide(difference, sd, out=z, where=sd > 0)
    least_expected = np.minimum(pooled, 1 - pooled) * np.minimum(n_a, n_b)
    few = (sd > 0) & (least_expected < LEAST_EXPECTED)
    prior = pooled[few]
    odds_a, variance_a = _log_odds(high_a[few], n_a[few], prior)
    odds_b, variance_b = _log_odds(high_b[few], n_b[few], prior)
    z[few] = (odds_b - odds_a) / np.sqrt(variance_a + variance_b)
    p = [math.erfc(abs(value) / math.sqrt(2)) for value in z.tolist()]
    return z, np.array(p)


def _log_odds(high: Ints, n: Ints, prior: Float64s) -> tuple[Float64s, Float64s]:
    """Log odds of being HIGH and their variance, with one token of the share ``prior`` added."""
    high_and_prior = high + prior
    low_and_prior = n - high + 1 - prior
    odds = np.log(high_and_prior) - np.log(low_and_prior)
    return odds, 1 / high_and_prior + 1 / low_and_prior


def benjamini_hochberg(p: Float64s) -> Float64s:
    """q of each test with the given ``p``: the lowest false discovery rate that selects it."""
    descending = np.argsort(p, kind="stable")[::-1]
    ranks = np.arange(len(p), 0, -1)
    rates = np.minimum(1.0, p[descending] * len(p) / ranks)
    q = np.empty(len(p))
    q[descending] = np.minimum.accumulate(rates)
    return q
