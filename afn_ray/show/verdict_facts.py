"""The verdict of an audit, for the top of the page of its night."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from afn_ray.analysis import audit, learned, verdict
from afn_ray.analysis.audit import Audit
from afn_ray.analysis.verdict import BROKEN, HELD, NOT_JUDGED, WARNED, Culprit, Rule
from afn_ray.show.page_tables import Table
from afn_ray.show.sparklines import (
    NightFigures,
    Sparkline,
    short_value,
    sparkline,
    usual_of,
    usual_values,
)
from afn_ray.text import count

MARKS = {HELD: "●", WARNED: "▲", BROKEN: "✖", NOT_JUDGED: "◆"}
"""Mark of each state, as in the charts of the history; no state is told by its colour alone."""


@dataclass(frozen=True, slots=True)
class LimitFacts:
    """One limit as a row of the page."""

    key: str
    meaning: str
    where: str  # source, group, class or files that the value belongs to; may be empty
    state: str
    mark: str
    value: str  # empty if it was not judged
    allowed: str
    usual: str
    sparkline: Sparkline | None  # None: fewer than two nights have a value


@dataclass(frozen=True, slots=True)
class VerdictFacts:
    """A verdict in the page's words."""

    state: str
    mark: str
    answer: str
    series: str
    partition: str  # empty if the run covers the whole corpus
    unjudged: tuple[str, ...]  # limits that were not judged, by reason
    limits: tuple[LimitFacts, ...]  # those that were not judged first
    culprits: Table | None  # what broke, by name; None if nothing did


def verdict_facts(found: Audit, nights: Sequence[NightFigures] = ()) -> VerdictFacts:
    """The facts of ``found``; ``nights`` are those before it, the oldest first."""
    answer = audit.state_in_words(found)
    return VerdictFacts(
        state=found.state,
        mark=MARKS[found.state],
        answer=answer[0].upper() + answer[1:],
        series=found.series,
        partition="" if found.partition is None else found.partition.isoformat(),
        unjudged=tuple(verdict.reasons(found.rules)),
        limits=tuple(_limit(rule, nights) for rule in audit.by_state(found.rules)),
        culprits=_culprits(found),
    )


def _limit(rule: Rule, nights: Sequence[NightFigures]) -> LimitFacts:
    return LimitFacts(
        rule.key,
        rule.limit.meaning,
        verdict.where_text(rule),
        rule.state,
        MARKS[rule.state],
        verdict.value_text(rule),
        verdict.limit_text(replace(rule, usual=None)),
        _usual(rule, nights),
        sparkline(rule, nights),
    )


def _usual(rule: Rule, nights: Sequence[NightFigures]) -> str:
    """The usual range of a limit, or how many nights it still lacks."""
    usual = usual_of(rule, nights)
    if usual is None:
        n = len(usual_values(rule, nights))
        return f"not known: {count(n, 'night')} of {learned.LEAST_NIGHTS}"
    low = short_value(rule.limit, usual.low)
    high = short_value(rule.limit, usual.high)
    return f"{low}–{high} over {count(usual.nights, 'night')}"


def _culprits(found: Audit) -> Table | None:
    """Culprits that the limits of ``found`` name, each once, with the limits that name it."""
    limits_of: dict[Culprit, list[str]] = {}
    for rule in audit.by_state(found.rules):
        for one in rule.culprits:
            limits_of.setdefault(one, []).append(rule.key)
    if not limits_of:
        return None
    rows = [
        (one.name, one.kind, one.reason, one.text or "", ", ".join(limits))
        for one, limits in limits_of.items()
    ]
    heads = ("name", "what", "why", "text", "limit")
    return Table("What broke, by name", heads, tuple(rows), left=5)
