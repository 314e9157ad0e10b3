"""Simulate half a year of nights, and count whom each kind of limit wakes rightly, wrongly, not at
all.

Nights are histograms of strengths made by hand: two kinds of text whose shares have a weekly
rhythm, a volume that grows and is small on weekends, and luck. Seven incidents are injected at
known nights. Figures, limits and what they learn are those of the audit. Somebody who is woken
accepts the night the next morning, unless it has an incident that passes: a new normal, or a false
alarm.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from afn_ray.analysis import limits, verdict
from afn_ray.analysis.evidence import Found
from afn_ray.analysis.learned import NIGHTS as LEARNED_NIGHTS
from afn_ray.analysis.limits import Limit
from afn_ray.bench import machine
from afn_ray.reduce.distances import kolmogorov_smirnov, psi
from afn_ray.reduce.histogram import Histogram, round_strengths, to_bins, to_values

NUM_NIGHTS = 182
FIRST_COUNTED = LEARNED_NIGHTS
"""First night that is counted: before it, limits that learn have seen too little."""
STRENGTHS = round_strengths(np.linspace(6, 18, 2400).astype(np.float32))
"""Strengths that occur, [2400]."""
TOKENS = 400_000
"""Tokens of the first Monday."""
VOLUME = (1.0, 1.02, 1.03, 1.02, 0.98, 0.6, 0.45)
"""Volume of each weekday, from Monday on."""
TALK = (0.2, 0.2, 0.2, 0.21, 0.24, 0.38, 0.42)
"""Share of the second kind of text on each weekday."""
GROWTH = 0.005
"""Growth of the volume from night to night."""

Float64s = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Change:
    """Fault of one night's text."""

    junk: float = 0  # share of tokens that are junk, with low strengths
    kept: float = 1  # share of the text that arrives
    shift: float = 0  # relative change of all strengths
    new: float = 0  # share of tokens from a new source, with high strengths


@dataclass(frozen=True, slots=True)
class Incident:
    """A change from the night ``begin`` to the night before ``end``."""

    name: str
    begin: int
    end: int
    change: Change
    slope: Change | None = None  # added on every night of the incident
    stays: bool = False  # the change of its last night is the new normal
    again: int = 0  # nights after ``end`` on which the same incident may be reported again


INCIDENTS = (
    Incident("2 % junk, on a Saturday", 33, 34, Change(junk=0.02)),
    Incident("half of the text is lost", 58, 59, Change(kept=0.5)),
    Incident("10 % junk", 79, 80, Change(junk=0.1)),
    Incident("all strengths 1 % higher", 100, 101, Change(shift=0.01)),
    Incident("a quarter is lost, on a Sunday", 118, 119, Change(kept=0.75)),
    Incident("a new source stays, 4 %", 133, 134, Change(new=0.04), stays=True, again=7),
    Incident("a drift of 0.05 % a night", 150, 171, Change(), Change(shift=0.0005), True, 7),
)


class Night(NamedTuple):
    """The strengths of one night."""

    histogram: Histogram
    q3: float


def half_year(seed: int, incidents: Sequence[Incident] = INCIDENTS) -> list[Night]:
    """The nights of one half year with the luck of ``seed``."""
    dice = np.random.default_rng(seed)
    return [_night(night, _changes(night, incidents), dice) for night in range(NUM_NIGHTS)]


def _changes(night: int, incidents: Sequence[Incident]) -> list[Change]:
    """Fault of ``night``, and the faults that have become normal."""
    found = []
    for incident in incidents:
        if night < incident.begin or not (night < incident.end or incident.stays):
            continue
        found.append(incident.change)
        if incident.slope is not None:
            num_steps = min(night, incident.end - 1) - incident.begin + 1
            found.append(Change(shift=incident.slope.shift * num_steps))
    return found


def _night(night: int, changes: Sequence[Change], dice: np.random.Generator) -> Night:
    """One night: a sample of a mixture of four kinds of text, each with its own luck."""
    weekday = night % 7
    shift = 1 + sum(change.shift for change in changes)
    volume = TOKENS * VOLUME[weekday] * (1 + GROWTH) ** night * dice.lognormal(0, 0.04)
    for change in changes:
        volume *= change.kept
    talk = TALK[weekday] * dice.lognormal(0, 0.05)
    junk, new = (sum(getattr(c, name) for c in changes) for name in ("junk", "new"))
    kinds = (
        (1 - talk, 13.2, 0.9),
        (talk, 12.6, 1.1),
        (junk / (1 - junk), 9.5, 0.7),
        (new / (1 - new), 14.5, 0.8),
    )
    density = np.zeros(len(STRENGTHS))
    for share, mean, sd in kinds:
        middle = mean * shift * dice.normal(1, 0.0015)
        bell = np.exp(-(((STRENGTHS - middle) / sd) ** 2) / 2)
        density += share * bell / bell.sum()
    counts = dice.multinomial(round(volume), density / density.sum())
    occupied = counts > 0
    histogram = Histogram(to_bins(STRENGTHS[occupied]), counts[occupied].astype(np.int64))
    return Night(histogram, float(to_values(histogram.quartile_keys())[2]))


# --- policies

FIXED = {"psi": 0.1, "ks": 0.05, "q3_shift": 0.02, "min_tokens_ratio": 0.9}
"""Limits of the guide's example policy."""


def learning(text: str) -> dict[str, str]:
    return dict.fromkeys(FIXED, text)


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of limits, and what nights are held against."""

    name: str
    levels: Mapping[str, Any]
    steps: tuple[int, int]  # nights back to the first night that may be the baseline, and onwards
    median_of: int = 0  # nights whose medians stand in for Q3 and the number of tokens
    limits: tuple[Limit, ...] = field(init=False)

    def __post_init__(self) -> None:
        found = tuple(limits.parse("policy", key, value) for key, value in self.levels.items())
        object.__setattr__(self, "limits", found)


PREVIOUS, WEEKDAY = (1, 1), (7, 7)
FIRST_NIGHT = (NUM_NIGHTS, 1)


KINDS = (
    Kind("fixed, against the first night", FIXED, FIRST_NIGHT),
    Kind("fixed, previous", FIXED, PREVIOUS),
    Kind("fixed, weekday", FIXED, WEEKDAY),
    Kind("fixed, median:7", FIXED, PREVIOUS, median_of=7),
    Kind('"3 mad", previous', learning("3 mad"), PREVIOUS),
    Kind('"3 mad", weekday', learning("3 mad"), WEEKDAY),
    Kind('"6 mad", weekday', learning("6 mad"), WEEKDAY),
    Kind('"p99", previous', learning("p99"), PREVIOUS),
    Kind('"p99", weekday', learning("p99"), WEEKDAY),
)


def figures(
    nights: Sequence[Night], night: int, kind: Kind, refused: Collection[int] = ()
) -> dict[str, float]:
    """The figures of ``night`` for the limits of ``kind``; ``refused`` nights are no baselines."""
    first, step = kind.steps
    back = (n for n in range(night - first, -1, -step) if n not in refused)
    now, before = nights[night], nights[next(back, 0)]
    q3, num_tokens = before.q3, float(before.histogram.n)
    if kind.median_of:
        earlier = [n for n in range(night) if n not in refused]
        last = [nights[n] for n in earlier[-kind.median_of :]]
        q3, num_tokens = (median(n.q3 for n in last), median(n.histogram.n for n in last))
    return {
        "psi": psi(before.histogram, now.histogram),
        "ks": kolmogorov_smirnov(before.histogram, now.histogram),
        "q3_shift": abs(now.q3 / q3 - 1),
        "min_tokens_ratio": now.histogram.n / num_tokens,
    }


def broken_nights(nights: Sequence[Night], kind: Kind) -> list[int]:
    """The nights on which a limit of ``kind`` is broken."""
    passing = {n for i in INCIDENTS if not i.stays for n in range(i.begin, i.end)}
    found: list[int] = []
    past: list[dict[str, float]] = []
    for night in range(1, len(nights)):
        refused = passing.intersection(found)
        values = figures(nights, night, kind, refused)
        states = []
        for limit in kind.limits:
            usual = [earlier[limit.key] for earlier in past[-LEARNED_NIGHTS:]]
            states.append(verdict.rule_of(limit, Found(values[limit.key]), usual).state)
        if verdict.BROKEN in states:
            found.append(night)
        if verdict.BROKEN not in states or night not in passing:
            past.append(values)
    return found


class Count(NamedTuple):
    """Worth of the alarms of half a year."""

    rightly: int  # incidents that woke somebody
    missed: tuple[str, ...]  # names of those that woke nobody
    again: int  # further nights that an incident woke somebody
    wrongly: int  # nights that woke somebody for nothing


def count_alarms(broken: Sequence[int], incidents: Sequence[Incident] = INCIDENTS) -> Count:
    """Compare the ``broken`` nights, from ``FIRST_COUNTED`` on, with the ``incidents``."""
    left = {night for night in broken if night >= FIRST_COUNTED}
    missed, again = [], 0
    for incident in incidents:
        during = left & set(range(incident.begin, incident.end))
        after = left & set(range(incident.end, incident.end + incident.again))
        left -= during | after
        if not during:
            missed.append(incident.name)
            again += len(after)
        else:
            again += len(during) + len(after) - 1
    return Count(len(incidents) - len(missed), tuple(missed), again, len(left))


def measure(repeat: int, on_note: Callable[[str], None]) -> dict[str, Any]:
    """``repeat`` half years, each with its own luck, under each kind of limits."""
    found: dict[str, list[Count]] = {kind.name: [] for kind in KINDS}
    for seed in range(repeat):
        nights = half_year(seed)
        for kind in KINDS:
            found[kind.name].append(count_alarms(broken_nights(nights, kind)))
        on_note(f"{seed + 1} of {repeat} half years")
    return {
        **machine.facts("cpu"),
        "nights": NUM_NIGHTS - FIRST_COUNTED,
        "incidents": [incident.name for incident in INCIDENTS],
        "repeat": repeat,
        "kinds": {name: [count._asdict() for count in counts] for name, counts in found.items()},
    }


def render(result: dict[str, Any], console: Console) -> None:
    """Print a row for each kind of limits: means over the half years, and their range."""
    machine.print_facts(machine.facts("cpu"), console)
    console.print(
        f"\n{result['repeat']} half years of {result['nights']} nights with "
        f"{len(result['incidents'])} incidents: means, and the least and the most",
        markup=False,
    )
    table = Table(box=None, pad_edge=False)
    for heading in ("limits, baseline", "rightly", "not at all", "again", "wrongly"):
        table.add_column(heading, justify="right" if table.columns else "left", no_wrap=True)
    for name, counts in result["kinds"].items():
        columns = [[count[key] for count in counts] for key in ("rightly", "again", "wrongly")]
        not_at_all = [len(count["missed"]) for count in counts]
        rightly, again, wrongly = map(_spread, columns)
        table.add_row(name, rightly, _spread(not_at_all), again, wrongly)
    console.print(table)


def _spread(numbers: Sequence[int]) -> str:
    return f"{fmean(numbers):.1f} ({min(numbers)}-{max(numbers)})"
