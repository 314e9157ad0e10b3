"""The limits that a policy may set: on a run, on its drift, and on each source or group in it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from afn_ray.analysis import learned
from afn_ray.analysis.learned import Learned
from afn_ray.errors import ConfigError

Level = float | Learned
"""One level of a limit: a number, or one that is learned from earlier nights."""
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
    "junk_share": "share of the tokens that may be in documents which screening ranks as strange",
    "duplicate_share": "share of the documents with tokens that may be copies of others",
    "near_duplicate_share": "share of the documents with tokens that may be near-copies of others",
    "repeated_ids": "ids that several documents may have",
}
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
    "junk_share": "share of a source's tokens that may be in documents which screening ranks as "
    "strange",
    "duplicate_share": "share of a source's documents with tokens that may be copies of others",
    "near_duplicate_share": "share of a source's documents with tokens that may be near-copies",
    "lost_bytes": "bytes of a source that may be lost: damaged, cut off, quarantined",
    "min_tokens_ratio": "tokens of a source in this run over those in the baseline, at least",
}
"""Limits in ``[source]`` on the worst source; ``max_vanished_sources`` limits vanished ones.

Those that are not distances, but figures of the run alone, are in ``own_parts.FIGURES``.
"""
GROUP_LIMITS = {
    **DISTANCE_LIMITS,
    "junk_share": "share of a group's tokens that may be in documents which screening ranks as "
    "strange",
    "duplicate_share": "share of a group's documents with tokens that may be copies of others",
    "near_duplicate_share": "share of a group's documents with tokens that may be near-copies",
    "lost_bytes": "bytes of a group that may be lost: damaged, cut off, quarantined",
    "min_tokens_ratio": "tokens of a group in this run over those in the baseline, at least; "
    "0 for one that vanished",
}
"""Limits in ``[group]`` on the worst group."""
WHOLE_LIMITS = RUN_LIMITS | DRIFT_LIMITS
"""Limits on the whole run and its drift."""
PART_LIMITS = {"source": SOURCE_LIMITS, "group": GROUP_LIMITS}
"""Limits on each part of a run, by the kind of part."""
WHOLE = ("lost_bytes", "lost_documents", "replaced_characters", "repeated_ids")
"""Limits on the run alone that are counts, not shares."""
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
"""Form of a number as a percentage."""
AT_MOST_ALL = re.compile(r"0*(?:100(?:\.0+)?|\d{1,2}(?:\.\d+)?)\s*%")
"""The same for ``SHARES``: up to 100 %."""


@dataclass(frozen=True, slots=True)
class Limit:
    """One limit of a policy; at least one of its levels is set."""

    key: str  # of ``RUN_LIMITS`` or ``DRIFT_LIMITS``; with ``of``, of ``PART_LIMITS``
    fail: Level | None  # a value beyond it breaks the night
    warn: Level | None = None  # a value beyond it is a warning
    of: str = ""  # the part that it judges: each source or group; empty: the whole run

    @property
    def name(self) -> str:
        """Name in a verdict: psi, or source.psi in ``[source]``."""
        return f"{self.of}.{self.key}" if self.of else self.key

    @property
    def meaning(self) -> str:
        """Meaning of the value, in words."""
        return PART_LIMITS[self.of][self.key] if self.of else WHOLE_LIMITS[self.key]

    @property
    def is_minimum(self) -> bool:
        """True if the value must be at least the limit, not at most."""
        return self.key.startswith("min_")

    @property
    def needs_baseline(self) -> bool:
        """True if the value compares the run with another one."""
        return self.key in DRIFT_LIMITS

    @property
    def is_whole(self) -> bool:
        """True if the value is a whole number."""
        is_number_of = self.key.startswith("max_") and not self.key.endswith("_ratio")
        return is_number_of or self.key in WHOLE

    @property
    def learns(self) -> bool:
        """True if a level is learned from earlier nights."""
        return isinstance(self.fail, Learned) or isinstance(self.warn, Learned)

    def is_beyond(self, value: float, limit: Level | None) -> bool:
        """True if ``value`` is beyond ``limit``, a level that is a number."""
        if limit is None:
            return False
        assert not isinstance(limit, Learned)
        return value < limit if self.is_minimum else value > limit


def parse(file: str | Path, key: str, value: object, of: str = "") -> Limit:
    """The limit ``key`` of the policy ``file``: one level or both.

    A level is a number, a share as in "2%", or one that learns, as in "3 mad" or "p99".

    Raises ``ConfigError`` for anything else, and for a warning that could not come first.
    """
    blank = Limit(key, None, None, of)
    if not isinstance(value, dict):
        return Limit(key, _level(file, blank, blank.name, value), None, of)
    if not value or not value.keys() <= {"warn", "fail"}:
        raise ConfigError(
            f"policy {file}: {blank.name} is {value!r}; expected a number, or one or both of "
            f"{{warn = ..., fail = ...}}"
        )
    levels = {
        level: _level(file, blank, f"{blank.name}.{level}", number)
        for level, number in value.items()
    }
    warn = levels.get("warn")
    fail = levels.get("fail")
    if warn is not None and fail is not None and not _may_come_first(blank, warn, fail):
        before = "above" if blank.is_minimum else "below"
        raise ConfigError(
            f"policy {file}: {blank.name} warns at {warn} and fails at {fail}, so no value is "
            f"a warning alone; expected warn {before} fail"
        )
    return Limit(key, fail, warn, of)


def _may_come_first(limit: Limit, warn: Level, fail: Level) -> bool:
    """True if a value may be beyond ``warn`` and not beyond ``fail``.

    Nobody knows before the night if one of them learns and the other does not.
    """
    if isinstance(warn, Learned) and isinstance(fail, Learned):
        return not fail.is_within(warn) and fail != warn
    if isinstance(warn, Learned) or isinstance(fail, Learned):
        return True
    return limit.is_beyond(fail, warn)


def _level(file: str | Path, limit: Limit, name: str, value: object) -> Level:
    """Parse one level of ``limit``; 0.02 and "2%" are the same."""
    if (learns := learned.parse(value)) is not None:
        return learns
    if limit.is_whole:
        return whole(file, name, value)
    if isinstance(value, int | float) and value > 1 and limit.key in SHARES:
        raise ConfigError(
            f'policy {file}: {name} is {value!r}, and a share is at most 1; is it "{value:g}%"?'
        )
    if isinstance(value, str) and (percent := PERCENT.fullmatch(value.strip())):
        if limit.key in SHARES and not AT_MOST_ALL.fullmatch(value.strip()):
            raise ConfigError(
                f"policy {file}: {name} is {value!r}; a share is at most 100%, so nothing would "
                "break it"
            )
        return float(percent[1]) / 100
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf:
        return float(value)
    raise ConfigError(
        f'policy {file}: {name} is {value!r}; expected a number from 0, a share as in "2%", or '
        'what is usual, as in "3 mad" or "p99"'
    )


def whole(file: str | Path, name: str, value: object) -> int:
    """``value`` as a whole number from 0; raises ``ConfigError`` for anything else."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ConfigError(f"policy {file}: {name} is {value!r}; expected a whole number from 0")
