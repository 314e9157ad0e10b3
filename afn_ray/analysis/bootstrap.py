"""Figures with 95 % intervals, from bootstrap samples of the documents of a run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from afn_ray.errors import QueryError
from afn_ray.query.database import Run
from afn_ray.reduce.stats import Float64s, midranks
from afn_ray.text import count

GROUPS = 500
REPLICATES = 1000
SEED = 0
FEW = 20
"""Number of documents below which a bootstrap is unreliable."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One number that supports or contradicts a claim."""

    claim: str
    what: str  # the quantity measured
    of: str  # the variable or the tokens it is measured on
    layer: int | None
    value: float
    low: float
    high: float  # low and high: the 95 % interval
    n: int  # number of tokens it is computed from
    n_docs: int  # number of their documents, which the bootstrap draws
    is_control: bool


@dataclass(frozen=True, slots=True)
class Quantity:
    """Subject of a figure; the fields are those of ``Figure``."""

    claim: str
    what: str
    of: str
    layer: int | None


@dataclass(frozen=True, slots=True)
class Drawn:
    """A figure over all documents, and over those of each replicate [REPLICATES]."""

    value: float
    replicates: Float64s

    def less(self, other: Drawn) -> Drawn:
        """The difference; both figures use the same documents in each replicate."""
        return Drawn(self.value - other.value, self.replicates - other.replicates)

    def interval(self) -> tuple[float, float]:
        """The 95 % interval over replicates in which the figure exists; nan where none does."""
        there = self.replicates[np.isfinite(self.replicates)]
        if not len(there):
            return math.nan, math.nan
        low, high = np.quantile(there, [0.025, 0.975])
        return float(low), float(high)

    def figure(
        self, quantity: Quantity, n: float, n_docs: int, *, is_control: bool = False
    ) -> Figure:
        """The figure of ``quantity`` with this value, from ``n`` tokens of ``n_docs`` documents."""
        low, high = self.interval()
        return Figure(
            quantity.claim,
            quantity.what,
            quantity.of,
            quantity.layer,
            self.value,
            low,
            high,
            int(n),
            n_docs,
            is_control,
        )


def combined(statistic: Callable[..., Float64s], *drawn: Drawn) -> Drawn:
    """``statistic`` of figures that use the same documents in each replicate."""
    with np.errstate(invalid="ignore", divide="ignore"):
        value = float(statistic(*(np.float64(one.value) for one in drawn)))
        return Drawn(value, statistic(*(one.replicates for one in drawn)))


def fixed(value: float) -> Drawn:
    """A figure that does not depend on the documents drawn."""
    return Drawn(value, np.full(REPLICATES, math.nan))


class Draws:
    """Number of times each of ``num_groups`` is drawn in each replicate."""

    def __init__(self, num_groups: int) -> None:
        even = np.full(num_groups, 1 / num_groups)
        drawn = np.random.default_rng(SEED).multinomial(num_groups, even, REPLICATES)
        self._weights = drawn.astype(np.float64)  # [REPLICATES, num_groups]
        if num_groups < 2:
            self._weights[:] = math.nan  # one document does not show how far documents differ

    def draw(self, statistic: Callable[..., Float64s], *parts: Float64s) -> Drawn:
        """Apply ``statistic`` to the sums over all groups, and over those of each replicate.

        ``parts`` are sums by group, [num_groups, ...]. ``statistic`` maps their totals [n, ...] to
        [n].
        """
        totals = [part.sum(axis=0, keepdims=True) for part in parts]  # each [1, ...]
        with np.errstate(invalid="ignore", divide="ignore"):
            value = float(statistic(*totals)[0])
            redrawn = [np.tensordot(self._weights, part, axes=1) for part in parts]
            return Drawn(value, statistic(*redrawn))


class Sample:
    """Documents of a run that the figures are computed from, in groups."""

    def __init__(self, run: Run, max_tokens: int, max_s: float) -> None:
        self.run = run
        self._until = time.monotonic() + max_s
        self._max_s = max_s
        ((of_docs, of_tokens),) = run.sql(
            "SELECT count(*), coalesce(sum(n_tokens), 0)::BIGINT FROM documents WHERE n_tokens > 0"
        ).fetchall()
        wanted = -(-of_tokens // max_tokens)
        one_in = max(1, min(wanted, of_docs // GROUPS))
        self.tokens = "tokens WHERE NOT is_special"
        if one_in > 1:
            self.tokens += f" AND hash(doc) % {one_in} = 0"
        docs, sizes = self.ask(
            f"SELECT doc, count(*) FROM {self.tokens} GROUP BY "  # noqa: S608
            "1 ORDER BY 1"
        )
        if not len(docs):
            raise QueryError(
                f"{run.uri} has no token that is not special, so there is nothing to hold claims "
                "against"
            )
        self.n = int(sizes.sum())
        self.n_docs = len(docs)
        self.num_groups = min(self.n_docs, GROUPS)
        dealt = np.random.default_rng(SEED).permutation(self.n_docs) % self.num_groups
        self.group_of = by_number(docs, dealt)
        self.length_of = by_number(docs, ranks(sizes, sizes))
        self.draw = Draws(self.num_groups).draw
        self.notes = tuple(self._notes(of_docs, one_in, is_larger=wanted > one_in))

    def _notes(self, of_docs: int, one_in: int, *, is_larger: bool) -> Iterator[str]:
        """Sentences on the sample: one in ``one_in`` of ``of_docs`` documents.

        ``is_larger``: it has more tokens than were asked for.
        """
        of = f", one in {one_in} of {of_docs:,}, chosen by their hash" if one_in > 1 else ""
        groups = f" in {self.num_groups:,} groups" if self.num_groups < self.n_docs else ""
        yield (
            f"{count(self.n, 'token')} of {count(self.n_docs, 'document')}{of}; intervals by "
            f"{REPLICATES:,} bootstrap samples of documents{groups}"
        )
        if is_larger:
            yield f"Intervals want {GROUPS} documents, so no fewer are read, whatever their tokens."
        if self.num_groups < FEW:
            so = "there are no intervals" if self.num_groups < 2 else "intervals are too narrow"
            yield f"So few documents say little of how far documents differ: {so}."

    def ask(self, query: str) -> list[npt.NDArray[Any]]:
        """Run ``query`` and return the columns of its result."""
        self.check_time()
        return [column.to_numpy() for column in self.run.sql(query).to_arrow_table().columns]

    def check_time(self) -> None:
        if time.monotonic() >= self._until:
            raise QueryError(
                f"the claims took more than {self._max_s:g} s; afn claims {self.run.uri} takes the "
                "time that it needs"
            )

    def figure(
        self, quantity: Quantity, drawn: Drawn, n: float | None = None, *, is_control: bool = False
    ) -> Figure:
        """The figure of ``quantity`` from ``n`` tokens; None means all tokens of the sample."""
        num_tokens = self.n if n is None else n
        return drawn.figure(quantity, num_tokens, self.n_docs, is_control=is_control)


def ranks(by: npt.NDArray[Any], counts: npt.NDArray[Any]) -> Float64s:
    """Mid-ranks of rows in the order of ``by``, scaled to -0.5 to 0.5.

    A row stands for ``counts`` tokens. Equal values get the middle of their ranks.
    """
    share_below = midranks(by, counts) / counts.sum()
    return np.asarray(share_below - 0.5)


def by_number(keys: npt.NDArray[Any], values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A table with ``values`` at the indices ``keys`` (whole numbers) and 0 elsewhere."""
    table = np.zeros(keys.max() + 1, values.dtype)
    table[keys] = values
    return table
