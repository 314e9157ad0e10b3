"""The policy of an audit: limits on a run and on its drift, read from a TOML file."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afn_ray.errors import ConfigError
from afn_ray.store import settings

LEAST_TOKENS = 1000
"""Default of ``min_tokens``: tokens that a source needs in both runs to be judged.

Distances between fewer tokens are mostly chance: chance alone gives a PSI of 9/n_a + 9/n_b.
"""
RUN_LIMITS = {
    "quarantined_documents": "share of the rows of documents that may be quarantined; the rest of "
                             "a damaged file is one row, so limit what is lost too",
    "quarantined_shards": "share of the shards that may be missing (of those that "
                          "allow_quarantined lets pass)",
    "empty_documents": "share of the documents read that may be empty",
    "lost_bytes": "bytes of the corpus that may be lost: damaged, cut off, quarantined",
    "lost_share": "share of the bytes to be read that may be lost",
    "lost_documents": "documents that may be lost; a loss of a number that nobody can tell breaks "
                      "every limit",
    "replaced_characters": "characters that may be replaced (U+FFFD), for bytes that are no text",
    "replaced_share": "share of the characters that may be replaced",
}  # fmt: skip
"""Limits on the run alone; each key with its meaning."""
DISTANCE_LIMITS = {
    "psi": "population stability index of the strengths, at most",
    "ks": "Kolmogorov-Smirnov distance of the strengths, at most",
    "js": "Jensen-Shannon distance of the strengths, at most",
    "q1_shift": "change of Q1 relative to the baseline's, up or down, at most",
    "q2_shift": "change of the median relative to the baseline's, up or down, at most",
    "q3_shift": "change of Q3 relative to the baseline's, up or down, at most",
    "share_high_shift": "change of the share of HIGH tokens, at most (says something where "
    "thresholds are frozen)",
}
"""Limits on two runs and, in ``[source]``, on each source in both; each key with its meaning."""
DRIFT_LIMITS = {
    **DISTANCE_LIMITS,
    "class_share_shift": "change of any class's share of the tokens, at most",
    "class_high_shift": "change of the HIGH share of any class in both runs, at most",
    "max_moved_types": "types whose HIGH share moved (q < 0.05), at most",
    "max_new_types": "types that the baseline has not, at most",
    "max_vanished_types": "types that only the baseline has, at most",
    "max_new_sources": "sources that the baseline has not, at most",
    "max_vanished_sources": "sources that only the baseline has, at most",
    "min_tokens_ratio": "tokens of this run over the baseline's, at least",
    "max_tokens_ratio": "tokens of this run over the baseline's, at most",
}
SOURCE_LIMITS = {
    **DISTANCE_LIMITS,
    "min_tokens_ratio": "tokens of a source in this run over those in the baseline, at least",
}
"""Limits in ``[source]`` on the worst source; ``max_vanished_sources`` limits vanished ones."""
BASELINES = {"all": ("previous", "week"), "new": ("previous", "weekday")}
"""Kinds of baseline by window; with "new" there are those of the form ``MEDIAN`` too."""
MEDIAN = re.compile(r"median:([2-9]|[1-9][0-9]{1,2})")
"""Form of the baseline that is the median of the last nights, of which there are 2 to 999."""
WHOLE = ("lost_bytes", "lost_documents", "replaced_characters")
"""Limits on the run alone that are counts, not shares."""
OPTIONS = {
    "layer": "layer that is judged; default: the deepest that both runs recorded",
    "window": "what a night covers: all, the whole corpus, or new, one dated partition; default: all",
    "baseline": "what a night is held against: previous, week (window all), weekday or median:7 "
                "(window new); default: previous",
    "unjudged": "what a limit counts as that could not be judged: pass or fail; default: neither, "
                "and the night is not judged",
}  # fmt: skip
CHOICES = {"window": tuple(BASELINES), "unjudged": ("pass", "fail")}
"""Accepted values of the options that take one of a fixed set."""
SOURCE_OPTIONS = {
    "min_tokens": "tokens that a source needs in both runs (for min_tokens_ratio: in the "
                  f"baseline) to be judged; default: {LEAST_TOKENS}"
}  # fmt: skip
IN_SOURCE = "\n  [source]: limits for the worst source"
SHARES = (
    *(key for key in RUN_LIMITS if key not in WHOLE),
    "ks",
    "js",
    "share_high_shift",
    "class_share_shift",
    "class_high_shift",
)
"""Limits that are shares: a value above 1 is an error."""
PERCENT = re.compile(r"(\d+(?:\.\d+)?)\s*%")


@dataclass(frozen=True, slots=True)
class Policy:
    """Limits on a run and on its drift, by key; shares are numbers from 0 to 1."""

    limits: Mapping[str, float]
    source_limits: Mapping[str, float]
    layer: int | None
    min_tokens: int
    window: str = "all"
    """Part of the corpus that a night covers: "all" of it, or "new", one dated partition."""
    baseline: str = "previous"
    """Kind of the baseline, as ``check_kind`` allows it."""
    unjudged: str | None = None
    """Result of a limit that could not be judged: "pass" or "fail"; None: it is not judged."""


def read_policy(file: str | Path) -> Policy:
    """Read the policy from the TOML ``file``, a path or any fsspec URL.

    Raises ``ConfigError`` for an unknown key, with the known ones, and for an invalid value.
    """
    values = settings.read_toml(file, "policy")
    source = values.pop("source", {})
    if not isinstance(source, dict):
        raise ConfigError(f"policy {file}: source is {source!r}; expected a table, [source]")
    _check_keys(file, "", values, RUN_LIMITS | DRIFT_LIMITS | OPTIONS)
    _check_keys(file, "[source] ", source, SOURCE_LIMITS | SOURCE_OPTIONS)
    layer = _whole(file, "layer", values.pop("layer")) if "layer" in values else None
    window = _choice(file, "window", values.pop("window", "all"))
    unjudged = values.pop("unjudged", None)
    if unjudged is not None:
        _choice(file, "unjudged", unjudged)
    baseline = values.pop("baseline", "previous")
    try:
        check_kind(baseline, window)
    except ConfigError as error:
        raise ConfigError(f"policy {file}: {error}") from None
    min_tokens = _whole(file, "min_tokens", source.pop("min_tokens", LEAST_TOKENS))
    limits = {key: _limit(file, key, value) for key, value in values.items()}
    source_limits = {key: _limit(file, f"source.{key}", value) for key, value in source.items()}
    if not limits and not source_limits:
        known = _listed(RUN_LIMITS | DRIFT_LIMITS | OPTIONS)
        raise ConfigError(
            f"policy {file} has no limit, so nothing could break it; it may have:\n"
            f"{known}{IN_SOURCE}"
        )
    return Policy(limits, source_limits, layer, min_tokens, window, baseline, unjudged)


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
        tables = "" if table else IN_SOURCE
        raise ConfigError(
            f"policy {file}: no such {table}key: {', '.join(unknown)}; there are:\n"
            f"{_listed(known)}{tables}"
        )


def _listed(known: Mapping[str, str]) -> str:
    return "\n".join(f"  {key}: {meaning}" for key, meaning in known.items())


def _limit(file: str | Path, key: str, value: object) -> float:
    """Parse a limit; 0.02 and "2%" are the same."""
    if key in WHOLE or (key.startswith("max_") and not key.endswith("_ratio")):
        return _whole(file, key, value)
    if isinstance(value, int | float) and value > 1 and key.removeprefix("source.") in SHARES:
        raise ConfigError(
            f'policy {file}: {key} is {value!r}, and a share is at most 1; is it "{value:g}%"?'
        )
    if isinstance(value, str) and (percent := PERCENT.fullmatch(value.strip())):
        return float(percent[1]) / 100
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf:
        return float(value)
    raise ConfigError(
        f'policy {file}: {key} is {value!r}; expected a number from 0, or a share as in "2%"'
    )


def _whole(file: str | Path, key: str, value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ConfigError(f"policy {file}: {key} is {value!r}; expected a whole number from 0")
