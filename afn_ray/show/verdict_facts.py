"""The verdict of an audit, for the top of the page of its night."""

from __future__ import annotations

from dataclasses import dataclass

from afn_ray.analysis import audit, verdict
from afn_ray.analysis.audit import Audit
from afn_ray.show.page_tables import Table


@dataclass(frozen=True, slots=True)
class VerdictFacts:
    """A verdict in the page's words."""

    state: str
    answer: str
    series: str
    partition: str  # empty if the run covers the whole corpus
    unjudged: tuple[str, ...]  # limits that were not judged, by reason
    limits: Table
    culprits: Table | None  # what broke, by name; None if nothing did


def verdict_facts(found: Audit) -> VerdictFacts:
    """The facts of ``found``, with a table of its limits: those that were not judged first."""
    rows = []
    for rule in audit.in_order(found.rules):
        value, limit = verdict.value_text(rule), verdict.limit_text(rule)
        rows.append((rule.key, rule.state, rule.where or "", value, limit))
    names = tuple(
        (rule.key, one.kind, one.name, one.reason, one.text or "")
        for rule in audit.in_order(found.rules)
        for one in rule.culprits
    )
    of_names = ("limit", "what", "name", "why", "text")
    answer = audit.answer(found)
    heads = ("limit", "state", "where", "value", "allowed")
    return VerdictFacts(
        state=found.state,
        answer=answer[0].upper() + answer[1:],
        series=found.series,
        partition="" if found.partition is None else found.partition.isoformat(),
        unjudged=tuple(verdict.reasons(found.rules)),
        limits=Table("Limits", heads, tuple(rows), left=3),
        culprits=Table("What broke, by name", of_names, names, left=5) if names else None,
    )
