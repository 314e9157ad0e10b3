"""Statistics that several tables use."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Z_95 = 1.959963984540054
"""Two-sided 95 % point of the normal distribution, in standard deviations."""
Float64s = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Int32s = npt.NDArray[np.int32]


def wilson(k: Ints | Float64s | int, n: Ints | Float64s | int) -> tuple[Float64s, Float64s]:
    """Lower and upper end of Wilson's 95 % interval of the share ``k / n``, n > 0 (Wilson 1927).

    Of tokens that are no independent draws, ``n`` is the number of such draws, with fractions.
    """
    k = np.asarray(k, np.float64)
    n = np.asarray(n, np.float64)
    p = k / n
    z2 = Z_95**2
    scale = 1 + z2 / n
    centre = (p + z2 / (2 * n)) / scale
    half = Z_95 / scale * np.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    lower = np.where(k == 0, 0.0, np.maximum(0, centre - half))
    upper = np.where(k == n, 1.0, np.minimum(1, centre + half))
    return lower, upper


def quantile_rank(n: Any, numerator: int, denominator: int) -> Any:
    """Rank, from 1, of the quantile ``numerator/denominator`` among ``n`` values (inverse CDF).

    ``n`` is a number or an array of numbers.
    """
    return np.maximum(1, -(-n * numerator // denominator))


def quantile_index(counts: npt.NDArray[Any], numerator: int, denominator: int) -> int:
    """Index of the quantile ``numerator/denominator`` (inverse CDF) among ascending values.

    ``counts`` [n_values] says how often each value occurs; it must not be empty.
    """
    cumulative = np.cumsum(counts)
    rank = quantile_rank(cumulative[-1], numerator, denominator)
    return int(np.searchsorted(cumulative, rank))


def mean_and_variance(values: Float64s, counts: Ints) -> tuple[float, float]:
    """Mean and population variance of ``values``, each of which occurs ``counts`` times.

    There must be a value. The sums are rounded once (``fsum``): the same bits on any machine.
    """
    n = int(counts.sum())
    mean = math.fsum(values * counts) / n
    variance = math.fsum((values - mean) ** 2 * counts) / n
    return mean, variance


def auc(above: npt.NDArray[Any], below: npt.NDArray[Any]) -> Float64s:
    """Probability that a draw from ``above`` exceeds one from ``below``; ties count half.

    Arguments are counts [..., n_values] of the same ascending values; the result is [...].
    """
    smaller = np.cumsum(below, axis=-1) - below
    wins = (above * (smaller + below / 2)).sum(axis=-1)
    num_pairs = above.sum(axis=-1) * below.sum(axis=-1)
    return np.asarray(wins / num_pairs)


def midranks(values: npt.NDArray[Any], counts: npt.NDArray[Any] | None = None) -> Float64s:
    """Number of smaller values plus half the number of equal ones, for each of ``values`` [n].

    A value occurs ``counts`` times, by default once.
    """
    _, level = np.unique(values, return_inverse=True)
    size = np.bincount(level, counts)
    rank_of_level = np.cumsum(size) - size / 2
    return np.asarray(rank_of_level[level])


def spearman(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float | None:
    """Rank correlation of ``a`` and ``b`` [n], ties averaged; None where either is constant."""
    if len(np.unique(a)) < 2 or len(np.unique(b)) < 2:
        return None
    correlations = np.corrcoef(midranks(a), midranks(b))
    return float(correlations[0, 1])


def is_high(
    strengths: npt.NDArray[Any], q3: float | npt.NDArray[np.float32] | None
) -> npt.NDArray[np.bool_]:
    """True if each strength is HIGH: at or above ``q3``, the Q3 of the thresholds that label.

    With labels by group, ``q3`` has one for each strength.
    Without a Q3, as in a run without tokens, none is. ``query.expressions.is_high`` is the same
    rule in SQL.
    """
    limit = np.asarray(np.inf if q3 is None else q3, np.float32)
    return np.asarray(strengths >= limit)
