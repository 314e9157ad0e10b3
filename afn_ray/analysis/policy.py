"""The policy of an audit: limits on a run and on its drift, read from a TOML file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from afn_ray.analysis import learned, limits
from afn_ray.analysis.limits import GROUP_LIMITS, LEAST_TOKENS, PART_LIMITS, WHOLE_LIMITS, Limit
from afn_ray.errors import ConfigError
from afn_ray.store import settings
from afn_ray.text import nearest

BASELINES = {"all": ("previous", "week"), "new": ("previous", "weekday")}
"""Kinds of baseline by window; with "new" there are those of the form ``MEDIAN`` too."""
MEDIAN = re.compile(r"median:([2-9]|[1-9][0-9]{1,2})")
"""Form of the baseline that is the median of the last nights, of which there are 2 to 999."""
OPTIONS = {
    "layer": "layer that is judged; default: the deepest that both runs recorded",
    "window": "what a night covers: all, the whole corpus (default), or new, one dated partition",
    "baseline": "what a night is held against: previous, week (window all), weekday or median:7 "
    "(window new); default: previous",
    "nights": 'nights that limits as in "3 mad" learn from, at least '
    f"{learned.LEAST_NIGHTS}; default: {learned.NIGHTS}",
    "unjudged": "what a limit counts as that could not be judged: pass or fail; default: neither, "
    "and the night is not judged",
}
CHOICES = {"window": tuple(BASELINES), "unjudged": ("pass", "fail")}
"""Accepted values of the options that take one of a fixed set."""
LEAST = {"layer": 0, "nights": learned.LEAST_NIGHTS}
"""Smallest values of the options that are whole numbers."""
PART_OPTIONS = {
    "source": {
        "min_tokens": "tokens that a source needs in both runs (for min_tokens_ratio: in the "
        f"baseline) to be judged; default: {LEAST_TOKENS}"
    },
    "group": {
        "min_tokens": "tokens that a group needs in both runs (for min_tokens_ratio: in the "
        f"baseline) to be judged; default: {LEAST_TOKENS}"
    },
}
"""Options beside the limits on each part of a run."""
TABLES = (
    "\n  [source]: limits for the worst source"
    "\n  [group], or [group.KEY] where the run is grouped by KEY: limits for the worst group"
)
"""Tables that a policy may have, for errors."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Limits on a run and on its drift; shares are numbers from 0 to 1."""

    limits: tuple[Limit, ...]
    layer: int | None = None
    min_tokens: Mapping[str, int] = field(default_factory=dict)
    """Tokens that each kind of part needs to be judged, where it is not ``LEAST_TOKENS``."""
    group_by: str | None = None
    """Key by which the run must be grouped; None: any."""
    window: str = "all"
    """Part of the corpus that a night covers: "all" of it, or "new", one dated partition."""
    baseline: str = "previous"
    """Kind of the baseline, as ``check_kind`` allows it, or the URI of a run."""
    unjudged: str | None = None
    """Result of a limit that could not be judged: "pass" or "fail"; None: it is not judged."""
    nights: int = learned.NIGHTS
    """Nights that limits learn from."""

    def limits_of(self, part: str) -> tuple[Limit, ...]:
        """The limits on each part of the kind ``part``."""
        return tuple(limit for limit in self.limits if limit.of == part)

    def least_tokens(self, part: str) -> int:
        """Tokens that a part of the kind ``part`` needs to be judged, at least 1."""
        return max(1, self.min_tokens.get(part, LEAST_TOKENS))

    def terms(self, limit: Limit) -> str:
        """Settings that the figure of ``limit`` depends on beside the runs.

        Figures under equal terms can be compared.
        """
        least = f", {self.least_tokens(limit.of)} tokens" if limit.of else ""
        if limit.needs_baseline:
            return f"window {self.window}, baseline {self.baseline}{least}"
        return f"the run alone{least}"


def read_policy(file: str | Path) -> Policy:
    """Read the policy from the TOML ``file``, a path or any fsspec URL.

    Raises ``ConfigError`` for an unknown key, with the known ones, and for an invalid value.
    """
    values = settings.read_toml(file, "policy")
    tables = {part: _table(file, part, values.pop(part, {})) for part in PART_LIMITS}
    tables["group"], group_by = _group_table(file, tables["group"])
    _check_keys(file, "", values, WHOLE_LIMITS | OPTIONS)
    for part, table in tables.items():
        _check_keys(file, f"[{part}] ", table, PART_LIMITS[part] | PART_OPTIONS[part])
    options = {key: values.pop(key) for key in OPTIONS if key in values}
    layer = limits.whole(file, "layer", options["layer"]) if "layer" in options else None
    window = _choice(file, "window", options.get("window", "all"))
    unjudged = options.get("unjudged")
    if unjudged is not None:
        _choice(file, "unjudged", unjudged)
    nights = limits.whole(file, "nights", options.get("nights", learned.NIGHTS))
    if nights < LEAST["nights"]:
        raise ConfigError(
            f"policy {file}: nights is {nights}; a limit learns from {LEAST['nights']} or more"
        )
    baseline = options.get("baseline", "previous")
    try:
        check_kind(baseline, window)
    except ConfigError as error:
        raise ConfigError(f"policy {file}: {error}") from None
    min_tokens = {}
    for part, table in tables.items():
        if "min_tokens" in table:
            name = f"{part}.min_tokens"
            min_tokens[part] = limits.whole(file, name, table.pop("min_tokens"))
    found = [limits.parse(file, key, value) for key, value in values.items()]
    for part, table in tables.items():
        found += (limits.parse(file, key, value, part) for key, value in table.items())
    if not found:
        known = _listed(WHOLE_LIMITS | OPTIONS)
        raise ConfigError(
            f"policy {file} has no limit, so nothing could break it; it may have:\n{known}{TABLES}"
        )
    return Policy(tuple(found), layer, min_tokens, group_by, window, baseline, unjudged, nights)


def _table(file: str | Path, name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"policy {file}: {name} is {value!r}; expected a table, [{name}]")
    return dict(value)


def _group_table(file: str | Path, table: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """The limits in ``[group]`` or ``[group.KEY]``, and KEY.

    A table under a limit's name has that limit's levels.
    """
    known = GROUP_LIMITS.keys() | PART_OPTIONS["group"].keys()
    keys = [key for key, value in table.items() if isinstance(value, dict) and key not in known]
    if not keys:
        return dict(table), None
    if len(table) > 1:
        raise ConfigError(
            f"policy {file}: [group.{keys[0]}] stands beside {', '.join(sorted(table)[:5])} in "
            "[group]; a run is grouped by one key: give all limits in one table"
        )
    return dict(table[keys[0]]), keys[0]


def check_kind(baseline: object, window: str) -> None:
    """Raise ``ConfigError`` for a kind of ``baseline`` that ``window`` does not have."""
    if baseline in BASELINES[window]:
        return
    known = " or ".join(BASELINES[window])
    if window == "new":
        if isinstance(baseline, str) and MEDIAN.fullmatch(baseline):
            return
        known += ", or a median of 2 to 999 nights, as in median:7"
    raise ConfigError(f'baseline is {baseline!r}; with window = "{window}" expected {known}')


def _choice(file: str | Path, key: str, value: Any) -> str:
    if value not in CHOICES[key]:
        raise ConfigError(
            f"policy {file}: {key} is {value!r}; expected one of {', '.join(CHOICES[key])}"
        )
    return str(value)


def _check_keys(
    file: str | Path, table: str, values: Mapping[str, Any], known: Mapping[str, str]
) -> None:
    if unknown := sorted(values.keys() - known.keys()):
        tables = "" if table else TABLES
        raise ConfigError(
            f"policy {file}: no such {table}key: {', '.join(unknown)}"
            f"{nearest(unknown, [*known])}; there are:\n"
            f"{_listed(known)}{tables}"
        )


def _listed(known: Mapping[str, str]) -> str:
    return "\n".join(f"  {key}: {meaning}" for key, meaning in known.items())
