"""The series that a run belongs to, and the days in the paths of its corpus."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import date
from typing import Any

from afn_ray.fingerprints import fingerprint
from afn_ray.run_info import RunInfo

DAY = r"(?<!\d)(?:\d{4}-\d{2}-\d{2}|\d{8})(?!\d)"
DATED = re.compile(rf"(?P<key>(?<![^/])(?:dt|date)=)(?P<value>[^/*?\[]+)(?=/|$)|{DAY}")
"""A date in a path: the value of a partition key, 2026-11-02 or 20261102."""
DATE = "<date>"
"""Text in place of a date, in the name of a series and in the names of matched sources."""
MOST_CHARS = 200
"""Longest pattern that a derived name of a series shows whole, in characters."""


def days_in(path: str) -> Iterator[tuple[date, int, int]]:
    """Each day in ``path`` with the start and the end of its text;
    dates of no calendar are none.
    """
    for match in re.finditer(DAY, path):
        try:
            yield date.fromisoformat(match[0]), match.start(), match.end()
        except ValueError:
            continue


def day_of(corpus: Sequence[str]) -> date | None:
    """The day of a dated ``corpus``; None if no path has a date.

    It is the newest date of its paths. In a path with ``dt=`` or ``date=`` only that value counts.
    """
    days: list[date] = []
    for path in corpus:
        days += _dating_days(path)
    return max(days, default=None)


def _dating_days(path: str) -> list[date]:
    """The days that date ``path``."""
    of_keys: list[date] = []
    for match in DATED.finditer(path):
        if match["key"]:
            of_keys += _every_day(match["value"])
    return of_keys or _every_day(path)


def _every_day(path: str) -> list[date]:
    return [day for day, _, _ in days_in(path)]


def undated(path: str) -> str:
    """``path`` with ``DATE`` in place of every date."""
    return DATED.sub(_in_place, path)


def _in_place(match: re.Match[str]) -> str:
    if match["key"]:
        return match["key"] + DATE
    return DATE if any(days_in(match[0])) else match[0]


def name_of(store: str, config: Mapping[str, Any]) -> str:
    """The name of the series of a run in ``store`` with the recorded ``config``.

    It is the config's ``series``. Without one it is derived from the store's name, the corpus
    patterns with their dates replaced, and the selection: a first look is no night of a series of
    whole corpora. A derived name has a colon, which a given one cannot have.
    """
    given: str | None = config.get("series")
    if given is not None:
        return given
    patterns = [undated(pattern) for pattern in config["corpus"]]
    first = patterns[0][-MOST_CHARS:] if patterns else ""
    name = f"{store.rstrip('/').rpartition('/')[2]}: {first}"
    if len(patterns) > 1:
        name += f" and {len(patterns) - 1:,} more"
    if patterns != [first]:
        name += f" ({fingerprint(patterns)[:12]})"
    if selection := selection_of(config):
        name += f", {selection}"
    return name


def selection_of(config: Mapping[str, Any]) -> str:
    """The documents that a run with the recorded ``config`` selects, in words; empty: all."""
    parts: list[str] = []
    if (limit := config.get("limit")) is not None:
        parts.append(f"the first {limit:,}")
    if (sample := config.get("sample")) is not None:
        parts.append(f"a sample of {sample}")
    if (where := config.get("where")) is not None:
        parts.append(f"where {where}")
    return ", ".join(parts)


def selection_of_run(info: RunInfo) -> str:
    """``selection_of`` the run with run.json ``info``; a limit that it did not reach is none."""
    config = info["config"]
    corpus = info.get("corpus", {})
    if not corpus.get("unread") and not corpus.get("unread_bytes"):
        config = {**config, "limit": None}
    return selection_of(config)


def matched_names(
    ours: Sequence[str], theirs: Sequence[str]
) -> tuple[Callable[[str], str], Callable[[str], str]]:
    """Functions that give the sources of two runs names to be matched by.

    ``ours`` and ``theirs`` are the corpora. If both have dates and these differ, as from night to
    night, each run's own dates are replaced by ``DATE`` in its sources. Otherwise names stay as
    they are.
    """
    our_days = {day for path in ours for day in _every_day(path)}
    their_days = {day for path in theirs for day in _every_day(path)}
    if not our_days or not their_days or our_days == their_days:
        return str, str
    return _without(our_days), _without(their_days)


def _without(days: Collection[date]) -> Callable[[str], str]:
    """A function that replaces ``days`` in a path."""

    def replaced(match: re.Match[str]) -> str:
        is_one = any(day in days for day in _every_day(match[0]))
        return _in_place(match) if is_one else match[0]

    return lambda path: DATED.sub(replaced, path)
