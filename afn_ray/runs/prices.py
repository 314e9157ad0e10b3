"""Prices of a run: what a price file holds, and the bill that follows from it."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from afn_ray.errors import ConfigError
from afn_ray.store import settings
from afn_ray.text import nearest


@dataclass(frozen=True, slots=True)
class Prices:
    """Prices in one ``currency``; a price of None is unknown and left out of every sum."""

    currency: str
    as_of: str  # whose prices, and their date
    worker_hour: float | None = None
    worker_hour_on_demand: float | None = None
    head_hour: float | None = None
    storage_gb_month: float | None = None
    put_million: float | None = None
    get_million: float | None = None


@dataclass(frozen=True, slots=True)
class Cost:
    """A line of a bill: ``amount`` of ``unit`` at ``price`` each; None: the price is unknown."""

    what: str
    amount: float
    unit: str
    price: float | None

    @property
    def total(self) -> float | None:
        """Price of the amount; None: unknown."""
        return None if self.price is None else self.amount * self.price


def bill(
    prices: Prices | None,
    worker_hours: float | None,
    hours: float | None,
    num_puts: int,
    num_gets: int,
    store_bytes: float,
) -> tuple[tuple[Cost, ...], Cost | None]:
    """Costs of a run line by line, and the monthly cost of its data; empty without ``prices``.

    Without hours the run has no lines: its requests alone would look like its price.
    """
    if prices is None:
        return (), None
    monthly = Cost("store", store_bytes / 1e9, "GB", prices.storage_gb_month)
    if worker_hours is None or hours is None:
        return (), monthly
    return (
        Cost("workers", worker_hours, "worker-hours", prices.worker_hour),
        Cost("head", hours, "hours", prices.head_hour),
        Cost("PUT", num_puts / 1e6, "million", prices.put_million),
        Cost("GET", num_gets / 1e6, "million", prices.get_million),
    ), monthly


def is_finite_number(value: Any) -> bool:
    """True if ``value`` is a number of 0 or more that a float can hold."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and 0 <= value <= sys.float_info.max
    )


def read_prices(path: Path) -> Prices:
    """The prices in the TOML file ``path``. Raises ``ConfigError`` for wrong keys or values."""
    value = settings.read_toml(path, "--prices")
    known = [f.name for f in fields(Prices)]
    if unknown := sorted(value.keys() - set(known)):
        raise ConfigError(
            f"--prices {path} has {', '.join(unknown)}{nearest(unknown, known)}; expected "
            f"currency, as_of and some of {', '.join(known[2:])}"
        )
    for name, what in (
        ("currency", "of all prices"),
        ("as_of", "whose prices these are, and of when"),
    ):
        if name not in value:
            raise ConfigError(f"--prices {path} lacks {name}: a text, {what}")
        if not isinstance(value[name], str) or not value[name]:
            raise ConfigError(
                f"--prices {path}: {name} is {value[name]!r}; expected a text, {what}"
            )
    for name in known[2:]:
        price = value.get(name, 0)
        if not is_finite_number(price):
            raise ConfigError(f"--prices {path}: {name} is {price!r}; expected a number, 0 or more")
    return Prices(**value)
