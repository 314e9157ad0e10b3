"""The dated partitions of a corpus: find those that its globs match, and choose one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date

from afn_ray.errors import ConfigError, CorpusError
from afn_ray.store import series, storage, uris

LATEST = "latest"
"""The partition with the newest date."""
WILDCARD = re.compile(r"(\*+|\?|\[[^\]]+\])")
"""A wildcard in one part of a glob."""
SHOWN_PARTITIONS = 5
"""Largest number of partitions that an error names."""


@dataclass(frozen=True, slots=True)
class Partition:
    """One day of a corpus."""

    day: date
    corpus: tuple[str, ...]
    """The corpus patterns, with this day in place of the globs that match dates."""
    incomplete: date | None = None
    """A newer day that only some of the patterns have; None if there is none."""


def parse_day(text: str) -> date | None:
    """The day that ``text`` names, as in 2026-11-02; None for ``LATEST``."""
    if text == LATEST:
        return None
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise ConfigError(
            f"partition is {text!r}; expected {LATEST}, or a date as in 2026-11-02"
        ) from None


def choose(corpus: Sequence[str], wanted: str = LATEST) -> Partition:
    """The partition ``wanted`` of ``corpus``: ``LATEST`` or a date.

    A glob that matches dates is narrowed to that day; other patterns stay as they are. Every such
    glob must have the day, so that no night covers half of its corpus. Without such a glob the
    dates in the paths name the only partition.

    Raises ``ConfigError`` for a corpus without dates, ``CorpusError`` if it lacks the day.
    """
    day = parse_day(wanted)
    patterns = [uris.absolute(pattern) for pattern in corpus]
    found = [_partitions(pattern) for pattern in patterns]
    globs = [days for days in found if days]
    if not globs:
        return _only_one(corpus, day)
    common = set.intersection(*(set(days) for days in globs))
    newest = max(max(days) for days in globs)
    if not common or (day is not None and day not in common):
        raise CorpusError(_lacking(day, patterns, found))
    chosen = max(common) if day is None else day
    narrowed: list[str] = []
    for pattern, days in zip(patterns, found, strict=True):
        narrowed += days[chosen] if days else [pattern]
    if series.day_of(narrowed) != chosen:
        raise ConfigError(
            f"corpus {', '.join(narrowed)} is the partition {chosen}, but its paths have another "
            f"date, {series.day_of(narrowed)}; give the folders without it"
        )
    is_late = day is None and newest > chosen
    return Partition(chosen, tuple(narrowed), newest if is_late else None)


def _only_one(corpus: Sequence[str], day: date | None) -> Partition:
    """The partition of a ``corpus`` without a glob that matches dates."""
    its_day = series.day_of(corpus)
    if its_day is None:
        raise ConfigError(
            f"no date in corpus {', '.join(corpus[:SHOWN_PARTITIONS])}, nor in what it matches; a "
            'policy with window = "new" needs a dated corpus, as in texts/dt=*/ or '
            "texts/2026-11-02/"
        )
    if day is not None and day != its_day:
        raise ConfigError(
            f"partition is {day}, but the corpus names {its_day}; put a glob into its place, as in "
            "dt=*"
        )
    return Partition(its_day, tuple(corpus))


def _lacking(
    day: date | None, patterns: Sequence[str], found: Sequence[dict[date, list[str]]]
) -> str:
    """Reason why a day, or any, is not in all of the globs."""
    what = "no date is in all of them" if day is None else f"there is no partition {day}"
    lines = []
    for pattern, days in zip(patterns, found, strict=True):
        if days:
            newest = sorted(days, reverse=True)[:SHOWN_PARTITIONS]
            lines.append(f"\n  {pattern} has {', '.join(map(str, newest))}")
            if len(days) > SHOWN_PARTITIONS:
                lines[-1] += f" and {len(days) - SHOWN_PARTITIONS:,} older ones"
    return f"{what}:{''.join(lines)}"


def _partitions(pattern: str) -> dict[date, list[str]]:
    """The days that the first dated wildcard of ``pattern`` matches, with the patterns of each.

    It is empty if ``pattern`` has no such wildcard.
    """
    parts = pattern.split("/")
    folders = [""]
    for depth, part in enumerate(parts):
        if not WILDCARD.search(part):
            folders = [f"{folder}{part}/" for folder in folders]
            continue
        matches = _expression(part).fullmatch
        names: set[str] = set()
        matched: list[str] = []
        for folder in folders:
            for name in storage.list_names(folder):
                if matches(name) and not name.startswith((".", "_")):
                    names.add(name)
                    matched.append(f"{folder}{name}/")
        days = _by_day(part, names)
        if days:
            before = parts[:depth]
            after = parts[depth + 1 :]
            patterns: dict[date, list[str]] = {}
            for day, of_day in days.items():
                patterns[day] = ["/".join([*before, one, *after]) for one in sorted(of_day)]
            return patterns
        folders = matched
    return {}


def _by_day(part: str, names: Iterable[str]) -> dict[date, set[str]]:
    """The days in ``names``, which the glob ``part`` matches, and ``part`` narrowed to each."""
    days: dict[date, set[str]] = {}
    for name in names:
        newest = max(series.days_in(name), default=None)
        if newest is not None:
            day, start, end = newest
            days.setdefault(day, set()).add(_narrowed(part, name, start, end))
    return days


def _narrowed(part: str, name: str, start: int, end: int) -> str:
    """The glob ``part`` with the date at ``start`` to ``end`` of ``name`` in its wildcards.

    For texts-*.csv and texts-2026-11-02-a.csv it is texts-2026-11-02*.csv.
    """
    match = _expression(part).fullmatch(name)
    assert match is not None
    pieces = WILDCARD.split(part)
    for group, place in enumerate(range(1, len(pieces), 2), 1):
        first, last = match.span(group)
        if first < end and last > start:
            before = "*" if first < start else ""
            after = "*" if last > end else ""
            pieces[place] = before + name[max(first, start) : min(last, end)] + after
    return "".join(pieces)


def _expression(part: str) -> re.Pattern[str]:
    """The expression of one ``part`` of a glob, with a group for each wildcard."""
    text = ""
    for place, piece in enumerate(WILDCARD.split(part)):
        if place % 2 == 0:
            text += re.escape(piece)
        elif piece.startswith("["):
            inside = piece[1:-1].replace("\\", r"\\")
            text += f"([{'^' + inside[1:] if inside.startswith('!') else inside}])"
        else:
            text += "(.)" if piece == "?" else "(.*)"
    try:
        return re.compile(text, re.DOTALL)
    except re.error as error:
        raise CorpusError(f"corpus has the glob {part!r}, which is no glob: {error}") from error
