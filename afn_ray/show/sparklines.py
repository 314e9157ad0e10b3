"""Sparklines: the figure of a limit on the last nights, as a small drawing with its text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from afn_ray.analysis import learned
from afn_ray.analysis.audit import Audit, to_keep
from afn_ray.analysis.learned import Learned, UsualRange
from afn_ray.analysis.limits import Limit
from afn_ray.analysis.verdict import BROKEN, WARNED, Rule
from afn_ray.fingerprints import fingerprint
from afn_ray.measure import base_of
from afn_ray.reduce import history
from afn_ray.show.history_charts import MOST_NIGHTS
from afn_ray.show.history_table import night_name
from afn_ray.store import uris, verdicts
from afn_ray.store.manifest import RunFolder
from afn_ray.store.verdicts import StoredVerdict
from afn_ray.text import count

WIDTH, HEIGHT, MARGIN = 132.0, 34.0, 5.0
"""Size of a drawing, and the space around its marks, in units of its view box."""
RUNS_AT_ONCE = 4
"""Number of verdicts that are read at the same time."""
MOST_NAMES = 3
"""Number of broken nights that a text names."""
FROM_LEAST_TO_MOST = Learned(None, Fraction(1))
"""Range that holds all earlier nights: what is usual for a limit that does not learn."""


class NightFigures(NamedTuple):
    """The values that an audit of an earlier night kept."""

    name: str
    values: Mapping[str, float | None]  # by name of the limit
    broken: frozenset[str]  # names of limits
    is_usual: bool  # no limit is broken, or somebody accepted the night


class Point(NamedTuple):
    """A place in a drawing."""

    x: float
    y: float


@dataclass(frozen=True, slots=True)
class Sparkline:
    """The drawing of a limit's values by night, the oldest first."""

    lines: tuple[str, ...]
    """Points of each line as SVG; a night without a value ends one."""
    broken: tuple[Point, ...]
    """Nights on which the limit was broken, tonight among them."""
    tonight: Point | None
    """None: there is no value tonight."""
    usual: tuple[float, float] | None
    """Top and height of the usual range; None: unknown."""
    limit: float | None
    """Place of the limit from the top; None: it is outside of the drawing."""
    text: str
    """Content of the drawing, in words."""


# --- earlier nights


def earlier_nights(found: Audit, history: pa.Table) -> list[NightFigures]:
    """The audited nights of ``history`` before that of ``found``, the oldest first.

    ``history`` has rows of ``HISTORY_SCHEMA``. Nights of another base, judged layer or window
    are left out, as their values are of another kind.
    """
    base = fingerprint(base_of(found.run.info["measure"]))
    is_alike = pc.and_(pc.is_null(history["group_by"]), pc.equal(history["layer"], found.layer))
    is_alike = pc.and_(is_alike, pc.equal(history["base"], base))
    is_alike = pc.and_(is_alike, pc.not_equal(history["run"], found.run.id))
    rows = history.filter(is_alike).to_pylist()

    def read(row: Mapping[str, Any]) -> StoredVerdict | None:
        uri = uris.join(found.run.store, "runs", row["run"])
        return verdicts.read_verdict(RunFolder(uri, found.run.store, row["run"], {}))

    with ThreadPoolExecutor(RUNS_AT_ONCE) as pool:
        kept = list(pool.map(read, rows))
    nights = []
    for row, verdict in zip(rows, kept, strict=True):
        if verdict is None or (verdict.layer, verdict.window) != (found.layer, found.window):
            continue
        is_usual = not verdict.broken or row["accepted"] is not None
        broken = frozenset(verdict.broken)
        nights.append(NightFigures(night_name(row), verdict.figures, broken, is_usual))
    return nights


def usual_ranges(found: Audit) -> dict[str, UsualRange]:
    """The usual ranges of the limits of ``found`` by name, as far as earlier nights tell."""
    rows = history.of_run(found.run, to_keep(found), MOST_NIGHTS).table
    nights = earlier_nights(found, rows)
    ranges = {rule.key: usual_of(rule, nights) for rule in found.rules}
    return {key: usual for key, usual in ranges.items() if usual is not None}


def usual_of(rule: Rule, nights: Sequence[NightFigures]) -> UsualRange | None:
    """The usual range of a limit: what it learned, or else from the least to the most.

    None if fewer than ``learned.LEAST_NIGHTS`` of the ``nights`` have the value.
    """
    return rule.usual or learned.usual(FROM_LEAST_TO_MOST, usual_values(rule, nights))


def usual_values(rule: Rule, nights: Sequence[NightFigures]) -> list[float]:
    """Values of a limit on ``nights`` without those that were broken and not accepted."""
    values = (night.values.get(rule.key) for night in nights if night.is_usual)
    return [value for value in values if value is not None]


# --- the drawing


def sparkline(rule: Rule, nights: Sequence[NightFigures]) -> Sparkline | None:
    """The values of ``rule`` on ``nights`` and tonight; None with fewer than two of them."""
    values = [*(night.values.get(rule.key) for night in nights), rule.value]
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return None
    usual = usual_of(rule, nights)
    limit = _nearest_level(rule)
    ends = [*known] if usual is None else [*known, usual.low, usual.high]
    if limit is not None and rule.state in (BROKEN, WARNED):
        ends.append(limit)
    low, high = min(ends), max(ends)

    def down(value: float) -> float:
        part = (value - low) / (high - low) if high > low else 0.5
        return round(HEIGHT - MARGIN - part * (HEIGHT - 2 * MARGIN), 1)

    step = (WIDTH - 2 * MARGIN) / (len(values) - 1)
    places = [
        None if value is None else Point(round(MARGIN + at * step, 1), down(value))
        for at, value in enumerate(values)
    ]
    is_broken = [*(rule.key in night.broken for night in nights), rule.state == BROKEN]
    band = None
    if usual is not None:
        top = down(usual.high)
        band = (top, round(max(down(usual.low) - top, 1.0), 1))
    return Sparkline(
        tuple(_lines(places)),
        tuple(place for place, is_so in zip(places, is_broken, strict=True) if place and is_so),
        places[-1],
        band,
        down(limit) if limit is not None and low <= limit <= high else None,
        _text(rule, nights, known),
    )


def _nearest_level(rule: Rule) -> float | None:
    """The number that the limit is broken beyond, or else where it warns; None: not learned yet."""
    level = rule.limit.warn if rule.limit.fail is None else rule.limit.fail
    return None if level is None or isinstance(level, Learned) else float(level)


def _lines(places: Sequence[Point | None]) -> Iterator[str]:
    """The points of each line through neighbouring nights with a value."""
    line: list[str] = []
    for place in [*places, None]:
        if place is not None:
            line.append(f"{place.x:g},{place.y:g}")
        elif line:
            yield " ".join(line)
            line = []


def _text(rule: Rule, nights: Sequence[NightFigures], known: Sequence[float]) -> str:
    """Text alternative of the drawing."""
    low, high = (short_value(rule.limit, value) for value in (min(known), max(known)))
    tonight = "no value" if rule.value is None else short_value(rule.limit, rule.value)
    text = f"{rule.key} on {count(len(known), 'night')}: {low} to {high}, tonight {tonight}"
    broken = [night.name for night in nights if rule.key in night.broken]
    if not broken:
        return f"{text}; never broken before"
    more = f" and {len(broken) - MOST_NAMES} more" if len(broken) > MOST_NAMES else ""
    return f"{text}; broken on {', '.join(broken[-MOST_NAMES:])}{more}"


def short_value(limit: Limit, value: float) -> str:
    """A value of ``limit`` with about three digits."""
    return f"{value:,.0f}" if limit.is_whole or abs(value) >= 1000 else f"{value:.3g}"
