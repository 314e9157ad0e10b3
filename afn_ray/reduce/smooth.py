"""Smooth model of how often a token is HIGH, given its controls.

In five lines: the log-odds of HIGH are a constant plus one curve for each control, the log of the
type's frequency, the position and the document's length. A curve is a cubic spline of ``SEGMENTS``
pieces of equal width from the least to the greatest value. All coefficients but the constant have a
ridge of ``RIDGE``, which is as strong as that many tokens. The model is fitted to counts of tokens
in cells by Newton's method until nothing changes. Its sums are over cells in their order, in one
thread, so equal counts give equal bits.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from afn_ray.reduce.stats import Float64s

SEGMENTS = 4
"""Pieces of each curve; few, so that one type hardly bends it where types are rare."""
RIDGE = 1.0
"""Weight of the sum of the squared coefficients, halved, against the log-likelihood in nats."""
RIDGE_OF_CONSTANT = 1e-9
"""The same of the constant: it keeps the constant finite where no token, or every one, is HIGH."""
MOST_STEPS = 200
"""Largest number of Newton steps; a fit takes about ten."""
CONVERGED = 1e-10
"""Change of a coefficient below which the fit is done, in log-odds."""
SHORTEST = 2.0**-30
"""Share of a Newton step below which no shorter one is tried."""


class Curve(NamedTuple):
    """Range of one control."""

    least: float
    greatest: float

    def basis(self, x: Float64s) -> Float64s:
        """Values of the uniform cubic B-splines at ``x`` [n], as [n, SEGMENTS + 3].

        Values beyond the range are those at its ends; all are 0 if the range is a point.
        """
        found = np.zeros((len(x), SEGMENTS + 3))
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
            found[np.arange(len(x)), piece + offset] = part / 6
        return found


class Fit(NamedTuple):
    """A fitted model of the log-odds of HIGH."""

    constant: float
    curves: tuple[Curve, ...]
    coefficients: tuple[Float64s, ...]  # of each curve, [SEGMENTS + 3]
    inverse: Float64s  # of the curvature of the loss, [n_coefficients, n_coefficients]

    def curve(self, at: int, x: Float64s) -> Float64s:
        """Log-odds that control number ``at`` adds at ``x`` [n]."""
        products = self.curves[at].basis(x) * self.coefficients[at]
        return np.asarray(products.sum(axis=1))

    def log_odds(self, controls: Float64s) -> Float64s:
        """Log-odds of HIGH at ``controls`` [n, n_controls]."""
        total = np.full(len(controls), self.constant)
        for at in range(len(self.curves)):
            total += self.curve(at, controls[:, at])
        return total


def fit(controls: Float64s, n: Float64s, n_high: Float64s) -> Fit:
    """The model of cells with ``controls`` [n_cells, n_controls], of which there is one or more.

    ``n`` and ``n_high`` are the numbers of tokens and of HIGH ones in each cell; tokens may have
    weights.
    """
    curves = tuple(Curve(float(x.min()), float(x.max())) for x in controls.T)
    bases = [curve.basis(x) for curve, x in zip(curves, controls.T, strict=True)]
    design = np.concatenate([np.ones((len(n), 1)), *bases], axis=1)
    ridge = np.full(design.shape[1], RIDGE)
    ridge[0] = RIDGE_OF_CONSTANT

    def loss(beta: Float64s) -> float:
        eta = np.einsum("ci,i->c", design, beta)
        return float((n * np.logaddexp(0, eta) - n_high * eta).sum() + (ridge * beta**2).sum() / 2)

    beta = np.zeros(len(ridge))
    for _ in range(MOST_STEPS):
        share = sigmoid(np.einsum("ci,i->c", design, beta))
        gradient = np.einsum("ci,c->i", design, n * share - n_high) + ridge * beta
        step = np.linalg.solve(_curvature(design, n, share) + np.diag(ridge), gradient)
        scale, before = 1.0, loss(beta)
        while loss(beta - scale * step) > before and scale > SHORTEST:
            scale /= 2
        beta = beta - scale * step
        if np.abs(step).max() < CONVERGED:
            break
    coefficients = np.split(beta[1:], len(curves))
    share = sigmoid(np.einsum("ci,i->c", design, beta))
    inverse = np.asarray(np.linalg.inv(_curvature(design, n, share) + np.diag(ridge)), np.float64)
    return Fit(float(beta[0]), curves, tuple(coefficients), inverse)


def _curvature(design: Float64s, n: Float64s, share: Float64s) -> Float64s:
    """Second derivatives of the loss without the ridge.

    einsum sums in one thread and in order, unlike a product of matrices.
    """
    weighted = design * (n * share * (1 - share))[:, None]
    return np.asarray(np.einsum("ci,cj->ij", weighted, design))


def sigmoid(log_odds: Float64s) -> Float64s:
    """Probability of ``log_odds``, without overflow."""
    small = np.exp(-np.abs(log_odds))
    return np.asarray(np.where(log_odds >= 0, 1, small) / (1 + small))


def deviance(log_odds: Float64s, n: Float64s, n_high: Float64s) -> Float64s:
    """Deviance of each cell, whose tokens have ``log_odds`` to be HIGH; in units of 2 nats."""
    return np.asarray(2 * (n * np.logaddexp(0, log_odds) - n_high * log_odds))
