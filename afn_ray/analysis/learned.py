"""Limits that learn: their form in a policy, and the range that earlier nights make usual."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import median

LEAST_NIGHTS = 8
"""Nights with the figure that a limit needs to be judged."""
NIGHTS = 28
"""Default number of nights that a limit learns from: four of each weekday."""
FORM = re.compile(r"(?P<mads>\d{1,3}(\.\d{1,3})?)\s*mad|p(?P<percent>\d{2,3}(\.\d{1,3})?)")
"""Form of a limit that learns: "3 mad" or "p99"."""


@dataclass(frozen=True, slots=True)
class Learned:
    """A limit that follows the same figure of earlier nights."""

    mads: float | None
    """Median absolute deviations around the median; None: ``share`` is set."""
    share: Fraction | None
    """Share of the nights that do not go beyond the limit, from 1/2; None: ``mads`` is set."""

    def __str__(self) -> str:
        if self.share is not None:
            return f"p{float(100 * self.share):g}"
        return f"{self.mads:g} mad"

    def is_within(self, other: Learned) -> bool:
        """True if this range lies within that of ``other``; False if the forms differ."""
        if self.share is not None and other.share is not None:
            return self.share < other.share
        if self.mads is not None and other.mads is not None:
            return self.mads < other.mads
        return False


@dataclass(frozen=True, slots=True)
class UsualRange:
    """The range of a figure over earlier nights, both ends included."""

    low: float
    high: float
    nights: int


def parse(value: object) -> Learned | None:
    """The limit in ``value``, as a policy has it; None for anything that is no such limit."""
    match = FORM.fullmatch(value.strip().lower()) if isinstance(value, str) else None
    if match is None:
        return None
    if match["mads"] is not None:
        mads = float(match["mads"])
        return Learned(mads, None) if mads else None
    share = Fraction(match["percent"]) / 100
    return Learned(None, share) if Fraction(1, 2) <= share <= 1 else None


def usual(limit: Learned, values: Sequence[float]) -> UsualRange | None:
    """The range that ``limit`` makes of the ``values`` of earlier nights; None if they are few.

    With ``mads`` it is the median and that many median absolute deviations (not scaled) to both
    sides, from 0 on, as no figure is negative. If the deviation is 0, as most nights are equal, it
    goes from the least to the most of the nights. With ``share`` its ends are two quantiles, by the
    inverse CDF: for "p99" those of 1 % and of 99 %.
    """
    n = len(values)
    if n < LEAST_NIGHTS:
        return None
    if limit.share is None:
        assert limit.mads is not None
        middle = median(values)
        spread = limit.mads * median(abs(value - middle) for value in values)
        if not spread:
            return UsualRange(min(values), max(values), n)
        return UsualRange(max(0.0, middle - spread), middle + spread, n)
    in_order = sorted(values)
    low = max(1, math.ceil((1 - limit.share) * n))
    high = math.ceil(limit.share * n)
    return UsualRange(in_order[low - 1], in_order[high - 1], n)


def reason(limit: Learned, values: Sequence[float]) -> str:
    """Reason why ``limit`` could not be judged by ``values``: they are few, or reach down to 0."""
    if len(values) < LEAST_NIGHTS:
        return (
            f'"{limit}" needs the figure of {LEAST_NIGHTS} earlier nights; there are {len(values)}'
        )
    return (
        f'"{limit}" of {len(values)} earlier nights reaches down to 0, and nothing is below that; '
        "give a number"
    )
