"""The simulated half year: its nights, its incidents, and the counting of alarms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from afn_ray.reduce.distances import psi
from bench import half_year
from bench.half_year import INCIDENTS, KINDS, NUM_NIGHTS, Count, Kind

PAGE = Path(__file__).parents[2] / "infra" / "guide" / "audit.md"


@pytest.fixture(scope="module")
def nights() -> list[half_year.Night]:
    return half_year.half_year(0)


@pytest.fixture(scope="module")
def quiet() -> list[half_year.Night]:
    return half_year.half_year(0, ())


def test_each_incident_changes_its_nights_and_no_others(
    nights: list[half_year.Night], quiet: list[half_year.Night]
) -> None:
    """Nights of one seed are equal up to the first change; after it the numbers drawn differ."""
    same = [
        np.array_equal(a.histogram.counts, b.histogram.counts)
        for a, b in zip(nights, quiet, strict=True)
    ]
    assert same.index(False) == INCIDENTS[0].begin
    assert all(half_year._changes(n, INCIDENTS) == [] for n in (0, 32, 34, 57, 59, 119, 132))
    (stays,) = half_year._changes(140, INCIDENTS)
    assert stays == INCIDENTS[5].change
    first, last, after = (
        sum(change.shift for change in half_year._changes(n, INCIDENTS)) for n in (150, 170, 181)
    )
    assert (first, last, after) == pytest.approx((0.0005, 0.0105, 0.0105))


def test_nights_grow_and_have_a_weekly_rhythm(quiet: list[half_year.Night]) -> None:
    num_tokens = [night.histogram.n for night in quiet]
    weeks = np.reshape(num_tokens, (-1, 7)).sum(1)
    assert np.polyfit(np.arange(len(weeks)), np.log(weeks), 1)[0] == pytest.approx(
        7 * 0.005, rel=0.1
    )
    mondays, saturdays = num_tokens[0::7], num_tokens[5::7]
    assert all(s < 0.8 * m for m, s in zip(mondays, saturdays, strict=True))
    of_week = [psi(quiet[n - 7].histogram, quiet[n].histogram) for n in range(12, NUM_NIGHTS, 7)]
    of_day = [psi(quiet[n - 1].histogram, quiet[n].histogram) for n in range(12, NUM_NIGHTS, 7)]
    assert np.median(of_day) > 5 * np.median(of_week)


def test_alarms_are_counted_once_as_right_again_or_wrong() -> None:
    assert half_year.count_alarms([]) == Count(0, tuple(i.name for i in INCIDENTS), 0, 0)
    everything = half_year.count_alarms(range(NUM_NIGHTS))
    assert (everything.rightly, everything.missed, everything.again) == (7, (), 7 + 20 + 7)
    assert everything.wrongly == NUM_NIGHTS - 28 - 7 - everything.again
    some = half_year.count_alarms([5, 33, 34, 136, 155, 156])
    assert (some.rightly, some.again, some.wrongly) == (2, 2, 1)


def test_a_kind_is_judged_by_the_night_that_it_names(
    nights: list[half_year.Night], quiet: list[half_year.Night]
) -> None:
    lost = 58
    of_kind = {kind.name: half_year.figures(nights, lost, kind) for kind in KINDS}
    num_tokens = [night.histogram.n for night in nights]
    expected = {
        "fixed, against the first night": num_tokens[0],
        "fixed, previous": num_tokens[lost - 1],
        "fixed, weekday": num_tokens[lost - 7],
        "fixed, median:7": np.median(num_tokens[lost - 7 : lost]),
    }
    for name, before in expected.items():
        assert of_kind[name]["min_tokens_ratio"] == num_tokens[lost] / before
    others = half_year.figures(nights, lost + 7, KINDS[2], {lost})
    assert others["min_tokens_ratio"] == num_tokens[lost + 7] / num_tokens[lost - 7]
    only_psi = Kind("", {"psi": "p100"}, half_year.WEEKDAY)
    values = [half_year.figures(quiet, n, only_psi)["psi"] for n in range(1, NUM_NIGHTS)]
    records = []
    for night in range(9, NUM_NIGHTS):
        earlier = values[max(0, night - 29) : night - 1]
        if values[night - 1] > max(earlier):
            records.append(night)
    passing = {33, 58, 79, 100, 118}
    assert passing.isdisjoint(records)  # else they would be no baselines
    assert half_year.broken_nights(quiet, only_psi) == records


def test_the_table_of_the_guide_is_what_the_simulation_gives() -> None:
    """Its rows are those of half years that were simulated again, here of the first one alone."""
    page = PAGE.read_text("utf-8")
    for kind in KINDS:
        (row,) = (line for line in page.splitlines() if line.startswith(f"| {kind.name} |"))
        cells = [cell.strip() for cell in row.strip("|").split("|")[1:]]
        found = half_year.count_alarms(half_year.broken_nights(half_year.half_year(0), kind))
        numbers = (found.rightly, len(found.missed), found.again, found.wrongly)
        for cell, number in zip(cells, numbers, strict=True):
            least, most = (int(n) for n in cell.partition("(")[2].rstrip(")").split("-"))
            assert least <= number <= most
