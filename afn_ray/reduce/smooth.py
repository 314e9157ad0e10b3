"""Smooth model of how often a token is HIGH, given its controls.

In five lines: the log-odds of HIGH are a constant plus one curve for each control, the log of the
type's frequency, the position and the document's length. A curve is a cubic spline of ``SEGMENTS``
pieces of equal width from the least to the greatest value. All coefficients but the constant have a
ridge of ``RIDGE``, which is as strong as that many tokens. The model is fitted to counts of tokens
in cells by Newton's method until nothing changes. Equal counts give equal bits on any machine:
the operations are those of ``arithmetic``, and their order is that of the cells.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from afn_ray.reduce.arithmetic import (
    cholesky,
    exp,
    gram,
    inverse,
    softplus,
    solved,
    total,
    weighted_sum,
)
from afn_ray.reduce.stats import Float64s

SEGMENTS = 4
"""Pieces of each curve; few, so that one type hardly bends it where types are rare."""
RIDGE = 1.0
"""Weight of the sum of the squared coefficients, halved, against the log-likelihood in nats."""
RIDGE_OF_CONSTANT = 1e-9
"""The same of the constant: it keeps the constant finite where no token, or every one, is HIGH."""
MOST_STEPS = 200
"""Largest number of Newton steps; a fit takes about ten."""
CONVERGED = 1e-7
"""Size of a Newton step, in log-odds, that is the last; about its square is left of the error."""
SHORTEST = 2.0**-30
"""Share of a Newton step below which no shorter one is tried."""


class Curve(NamedTuple):
    """Range of one control."""

    least: float
    greatest: float

    def basis(self, x: Float64s) -> Float64s:
        """Values of the uniform cubic B-splines at ``x`` [n], as [SEGMENTS + 3, n].

        Values beyond the range are those at its ends; all are 0 if the range is a point.
        """
        found = np.zeros((SEGMENTS + 3, len(x)))
        if self.greatest <= self.least:
            return found
        at = np.clip((x - self.least) / (self.greatest - self.least), 0, 1) * SEGMENTS
        piece = np.minimum(at.astype(np.int64), SEGMENTS - 1)
        t = at - piece
        u = 1 - t
        parts = (
            u * u * u,
            3 * t * t * t - 6 * t * t + 4,
            3 * u * u * u - 6 * u * u + 4,
            t * t * t,
        )
        for offset, part in enumerate(parts):
            found[piece + offset, np.arange(len(x))] = part / 6
        return found


class Fit(NamedTuple):
    """A fitted model of the log-odds of HIGH."""

    constant: float
    curves: tuple[Curve, ...]
    coefficients: tuple[Float64s, ...]  # of each curve, [SEGMENTS + 3]
    inverse: Float64s  # of the curvature of the loss, [n_coefficients, n_coefficients]

    def curve(self, at: int, x: Float64s) -> Float64s:
        """Log-odds that control number ``at`` adds at ``x`` [n]."""
        return weighted_sum(self.curves[at].basis(x), self.coefficients[at])

    def log_odds(self, controls: Float64s) -> Float64s:
        """Log-odds of HIGH at ``controls`` [n, n_controls]."""
        found = np.full(len(controls), self.constant)
        for at in range(len(self.curves)):
            found += self.curve(at, controls[:, at])
        return found


def fit(controls: Float64s, n: Float64s, n_high: Float64s) -> Fit:
    """The model of cells with ``controls`` [n_cells, n_controls], of which there is one or more.

    ``n`` and ``n_high`` are the numbers of tokens and of HIGH ones in each cell; tokens may have
    weights.
    """
    curves = tuple(Curve(float(x.min()), float(x.max())) for x in controls.T)
    bases = [curve.basis(x) for curve, x in zip(curves, controls.T, strict=True)]
    design = np.concatenate([np.ones((1, len(n))), *bases])
    ridge = np.full(len(design), RIDGE)
    ridge[0] = RIDGE_OF_CONSTANT

    def loss(beta: Float64s) -> float:
        of_cells = deviance(weighted_sum(design, beta), n, n_high)
        return float(total(of_cells) + total(ridge * beta * beta)) / 2

    def derivatives(beta: Float64s) -> tuple[Float64s, Float64s]:
        """The gradient of the loss, and the root, by Cholesky, of its second derivatives."""
        eta = weighted_sum(design, beta)
        share, others = sigmoid(eta), sigmoid(-eta)  # 1 - share would lose what is small
        residuals = (n - n_high) * share - n_high * others
        curvature = gram(design, n * share * others) + np.diag(ridge)
        return total(design * residuals) + ridge * beta, cholesky(curvature)

    beta = np.zeros(len(ridge))
    for _ in range(MOST_STEPS):
        gradient, root = derivatives(beta)
        step = solved(root, gradient)
        if np.abs(step).max() < CONVERGED:
            beta = beta - step
            break
        scale, before = 1.0, loss(beta)
        while loss(beta - scale * step) > before and scale > SHORTEST:
            scale /= 2
        beta = beta - scale * step
    coefficients = np.split(beta[1:], len(curves))
    _, root = derivatives(beta)
    return Fit(float(beta[0]), curves, tuple(coefficients), inverse(root))


def sigmoid(log_odds: Float64s) -> Float64s:
    """Probability of ``log_odds``, without overflow."""
    small = exp(-np.abs(log_odds))
    return np.asarray(np.where(log_odds >= 0, 1, small) / (1 + small))


def deviance(log_odds: Float64s, n: Float64s, n_high: Float64s) -> Float64s:
    """Deviance of each cell, whose tokens have ``log_odds`` to be HIGH; in units of 2 nats."""
    of_high = np.maximum(-log_odds, 0)
    of_low = np.maximum(log_odds, 0)
    of_both = softplus(-np.abs(log_odds))  # apart, so that what is small is not lost
    return np.asarray(2 * (n * of_both + n_high * of_high + (n - n_high) * of_low))
