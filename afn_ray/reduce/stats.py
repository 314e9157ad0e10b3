"""Statistics that several tables use."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Z_95 = 1.959963984540054
"""Two-sided 95 % point of the normal distribution, in standard deviations."""
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def wilson(k: Ints | int, n: Ints | int) -> tuple[Floats, Floats]:
    """Lower and upper end of Wilson's 95 % interval of the share ``k / n``, n > 0 (Wilson 1927)."""
    k, n = np.asarray(k, np.float64), np.asarray(n, np.float64)
    p, z2 = k / n, Z_95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 / (1 + z2 / n) * np.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return np.where(k == 0, 0.0, np.maximum(0, centre - half)), np.where(
        k == n, 1.0, np.minimum(1, centre + half)
    )
