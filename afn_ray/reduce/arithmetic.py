"""Arithmetic that gives the same bits on every machine.

The exponentials and logarithms of numpy and of the C library, products of matrices (BLAS) and
solvers (LAPACK) have code of their own for each kind of CPU, and their last bits differ. Everything
here consists of +, -, *, / and square roots of float64, which IEEE 754 defines to the last bit, and
of whole numbers. numpy and Python compute these one at a time, and this module fixes their order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from afn_ray.reduce.stats import Float64s

LARGEST = 700.0
"""Largest absolute argument of ``exp``; arguments beyond it count as this one."""
_LN_2 = (0.6931471805598903, 5.497923018708371e-14)
"""Natural logarithm of 2, in two parts; the first has 42 bits, so ``exp`` multiplies it exactly."""
_EXP_TERMS = 13
_LOG_TERMS = 17
_BLOCK = 1 << 13
"""Number of columns that are computed at a time, so that they stay in the cache."""


def exp(x: Float64s) -> Float64s:
    """e to the power of each of ``x``; the relative error is below 1e-15."""
    x = np.clip(x, -LARGEST, LARGEST)
    power = np.rint(x / math.fsum(_LN_2))
    rest = (x - power * _LN_2[0]) - power * _LN_2[1]  # at most half of ln 2
    found = np.ones_like(rest)
    for term in range(_EXP_TERMS, 0, -1):  # of the Taylor series, from the last
        found = 1 + found * rest / term
    bits_of_power = (power.astype(np.int64) + 1023) << 52
    return np.asarray(found * bits_of_power.view(np.float64))


def log2(x: Float64s) -> Float64s:
    """Logarithm to base 2 of each of ``x``, which are above 0; exact for powers of 2."""
    mantissa, exponent = np.frexp(x)
    is_small = mantissa < math.sqrt(0.5)
    mantissa = np.where(is_small, 2 * mantissa, mantissa)
    natural = _log_of_ratio((mantissa - 1) / (mantissa + 1))
    return np.asarray((exponent - is_small) + natural / math.fsum(_LN_2))


def softplus(x: Float64s) -> Float64s:
    """log(1 + e^x) for each of ``x``."""
    small = exp(-np.abs(x))
    return np.asarray(np.maximum(x, 0) + _log_of_ratio(small / (2 + small)))


def _log_of_ratio(s: Float64s) -> Float64s:
    """Natural logarithm of (1 + s) / (1 - s), for ``s`` of at most 1/3 in absolute value."""
    square = s * s
    found = np.zeros_like(s)
    for term in range(_LOG_TERMS, -1, -1):
        found = found * square + 1 / (2 * term + 1)
    return np.asarray(2 * s * found)


def total(values: Float64s) -> Float64s:
    """Sum over the last axis of ``values`` [..., n], by halves: value i is added to n // 2 + i."""
    if not values.shape[-1]:
        return np.zeros(values.shape[:-1])
    while (n := values.shape[-1]) > 1:
        half = n // 2
        sums = values[..., :half] + values[..., half : 2 * half]
        if n % 2:
            sums[..., 0] += values[..., -1]
        values = sums
    return np.asarray(values[..., 0])


def weighted_sum(rows: Float64s, weights: Float64s) -> Float64s:
    """Sum of ``rows`` [n_rows, n] in their order, each times its ``weights`` [n_rows]."""
    found = np.zeros(rows.shape[1])
    for row, weight in zip(rows, weights.tolist(), strict=True):
        found += row * weight
    return found


def gram(rows: Float64s, weights: Float64s) -> Float64s:
    """Matrix of the products of any two of ``rows`` [n_rows, n], summed with ``weights`` [n].

    Sums of blocks are added in their order.
    """
    found = np.zeros((len(rows), len(rows)))
    for begin in range(0, len(weights), _BLOCK):
        block = rows[:, begin : begin + _BLOCK]
        for at, row in enumerate(block * weights[begin : begin + _BLOCK]):
            found[at, at:] += total(block[at:] * row)
    for at in range(len(rows)):
        found[at:, at] = found[at, at:]
    return found


def quadratic(rows: Float64s, matrix: Float64s) -> Float64s:
    """x' M x for each column x of ``rows`` [n_rows, n], with the symmetric ``matrix`` M."""
    found = np.zeros(rows.shape[1])
    for begin in range(0, len(found), _BLOCK):
        block = rows[:, begin : begin + _BLOCK]
        for at, row in enumerate(block):
            others = weighted_sum(block[at + 1 :], matrix[at, at + 1 :])
            found[begin : begin + _BLOCK] += row * (row * matrix[at, at] + 2 * others)
    return found


def multiplied(a: Float64s, b: Float64s) -> Float64s:
    """Product of the small matrices ``a`` [n, k] and ``b`` [k, m]."""
    return np.stack([weighted_sum(b, row) for row in a])


def cholesky(matrix: Float64s) -> Float64s:
    """Lower triangular matrix whose product with its transpose is the small ``matrix``.

    ``matrix`` is symmetric and positive definite.
    """
    found: list[list[float]] = []
    for at, row in enumerate(matrix.tolist()):
        ours: list[float] = []
        for column in range(at):
            rest = row[column] - _dot(ours, found[column])
            ours.append(rest / found[column][column])
        ours.append(math.sqrt(row[at] - _dot(ours, ours)))
        found.append(ours)
    return np.array([row + [0.0] * (len(found) - len(row)) for row in found])


def solved(lower: Float64s, right: Float64s) -> Float64s:
    """Solution x [n] of L L' x = ``right`` [n], where L is ``lower``, of ``cholesky``."""
    rows = lower.tolist()
    columns = lower.T.tolist()
    x = right.tolist()
    for at, row in enumerate(rows):
        x[at] = (x[at] - _dot(row[:at], x)) / row[at]
    for at in reversed(range(len(x))):
        x[at] = (x[at] - _dot(columns[at][at + 1 :], x[at + 1 :])) / columns[at][at]
    return np.array(x)


def inverse(lower: Float64s) -> Float64s:
    """Inverse of the matrix L L', where L is ``lower``, of ``cholesky``; it is symmetric."""
    found = np.stack([solved(lower, unit) for unit in np.eye(len(lower))])
    return np.asarray((found + found.T) / 2)


def _dot(a: Iterable[float], b: Iterable[float]) -> float:
    """Sum of the products of ``a`` and ``b``, as far as the shorter of the two, in order.

    Not ``sum``, which adds more exactly from Python 3.12 on.
    """
    found = 0.0
    for one, other in zip(a, b, strict=False):
        found += one * other
    return found
