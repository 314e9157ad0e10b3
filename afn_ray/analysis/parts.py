"""Limits on each source and each group of a run: the worst one, and those that are not judged."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import pyarrow.compute as pc

from afn_ray.analysis import own_parts
from afn_ray.analysis.evidence import WITHOUT_SOURCES, Evidence, Found, distance, sources_at
from afn_ray.analysis.limits import Limit
from afn_ray.analysis.policy import Policy
from afn_ray.errors import ConfigError, QueryError
from afn_ray.reduce.compare import Comparison
from afn_ray.reduce.group_drift import grouped_by
from afn_ray.reduce.groups import MAX_GROUPS, OTHERS, group_name
from afn_ray.store.manifest import RunFolder
from afn_ray.text import count

SHOWN_PARTS = 5
"""Largest number of sources or groups that a note names."""
OF_SOURCES = ("max_new_sources", "max_vanished_sources")
"""Limits on the whole run that need its table of sources."""
REMEDY = {
    "new": {
        "source": "max_new_sources limits them",
        "group": "they are judged from the next night on",
    },
    "gone": {
        "source": "max_vanished_sources limits them",
        "group": "min_tokens_ratio in [group] limits them",
    },
}
"""Advice on parts that are new or gone, for notes."""


class Parts(NamedTuple):
    """The sources or the groups of two runs at the layer that is judged."""

    kind: str  # "source" or "group"
    rows: list[dict[str, Any]]  # of ``DRIFT_SCHEMA``, with the part's ``name``
    was_read: Collection[str]  # names of those in ``rows`` that this run read, with tokens or not
    min_tokens: int
    others: int = 0  # tokens of the other groups of this run, if one not found may be among them

    @classmethod
    def of(cls, kind: str, policy: Policy, evidence: Evidence, comparison: Comparison) -> Parts:
        """The parts of the ``kind`` in ``comparison``."""
        min_tokens = policy.least_tokens(kind)
        if kind == "source":
            rows = sources_at(comparison, evidence.layer)
            named = [row | {"name": row["source"]} for row in rows]
            return cls(kind, named, _read_sources(named, evidence.sources), min_tokens)
        table = comparison.groups.drift
        rows = table.filter(pc.equal(table["layer"], evidence.layer)).to_pylist()
        named = [row | {"name": group_name(row["group"])} for row in rows]
        others = _other_tokens(rows)
        read = [row["name"] for row in named if row["n_b"] or not others]
        return cls(kind, named, read, min_tokens, others)

    def in_both(self) -> list[dict[str, Any]]:
        """Rows with enough tokens in both runs."""
        return [row for row in self.rows if min(row["n_a"], row["n_b"]) >= self.min_tokens]

    def shrinkable(self) -> list[dict[str, Any]]:
        """Rows with enough tokens in the baseline that this run read, even without a token."""
        read = set(self.was_read)
        return [row for row in self.rows if row["name"] in read and row["n_a"] >= self.min_tokens]

    def hidden(self) -> list[dict[str, Any]]:
        """Rows with enough tokens in the baseline that may be among the other groups of this run."""
        gone = [row for row in self.rows if self.others and not row["n_b"]]
        return [row for row in gone if row["n_a"] >= self.min_tokens]

    def judged(self, policy: Policy) -> list[dict[str, Any]]:
        """Rows that a limit of ``policy`` was compared with."""
        found = self.in_both()
        if any(limit.key == "min_tokens_ratio" for limit in policy.limits_of(self.kind)):
            found += self.shrinkable() + self.hidden()
        return found


def _other_tokens(rows: list[dict[str, Any]]) -> int:
    """Tokens of this run's documents that have no group of their own, though they have a value.

    There are none while so few groups have tokens that each has its own; then only documents have
    the value ``OTHERS``, which counts as one of the groups.
    """
    n_of = {row["group"]: row["n_b"] for row in rows if row["n_b"] and row["group"] is not None}
    others = n_of.pop(OTHERS, 0)
    return others if len(n_of) >= MAX_GROUPS - 1 else 0


def _read_sources(rows: list[dict[str, Any]], sources: Collection[str]) -> list[str]:
    """Names in ``rows`` that are among ``sources``, or are folders of some."""
    read = [f"{name}/" for name in sources]
    found = []
    for row in rows:
        prefix = f"{row['name']}/"
        if row["n_b"] or any(name.startswith(prefix) for name in read):
            found.append(row["name"])
    return found


def check(policy: Policy, run: RunFolder) -> None:
    """Raise ``ConfigError`` for limits on parts that ``run`` does not have."""
    if (why := lacking(policy, run)) is not None:
        raise ConfigError(why)


def lacking(policy: Policy, run: RunFolder) -> str | None:
    """Why ``run`` can never be held against the limits of ``policy`` on parts; None if it can."""
    needs_scan = any(limit.key in (*OF_SOURCES, "junk_share") for limit in policy.limits)
    if (needs_scan or policy.limits_of("source")) and "sources" not in run.info["tables"]:
        return (
            f"the policy limits sources or strange documents, but run {run.uri} has no table of "
            "them: run it with its screening (--screen)"
        )
    if not policy.limits_of("group"):
        return None
    by = grouped_by(run)
    if by is None:
        return f"the policy limits groups, but run {run.uri} has none: give run.toml a group_by"
    if policy.group_by not in (None, by):
        return (
            f"the policy limits groups by {policy.group_by}, but run {run.uri} is grouped by {by}: "
            f"name the table [group.{by}], or let run.toml group by {policy.group_by}"
        )
    return None


def worst(limit: Limit, policy: Policy, evidence: Evidence) -> Found:
    """The worst value of ``limit`` over the parts that it judges, and the part."""
    if limit.key in own_parts.FIGURES:
        return _worst_own(limit, policy, evidence.run)
    comparison = evidence.comparison
    if comparison is None:
        return Found(None, reason=evidence.baseline.lacking)
    parts = Parts.of(limit.of, policy, evidence, comparison)
    if limit.of == "group" and evidence.groups_lacking is not None:
        return Found(None, reason=evidence.groups_lacking)
    if not parts.rows:
        return WITHOUT_SOURCES if limit.of == "source" else Found(None, reason="there is no group")
    least = count(parts.min_tokens, "token")
    if limit.key == "min_tokens_ratio":
        return _worst_ratio(parts)
    distances = [(distance(row, limit.key), row["name"]) for row in parts.in_both()]
    if distances:
        return Found(*max(distances))
    return Found(None, reason=f"no {limit.of} has {least} in both runs")


def _worst_ratio(parts: Parts) -> Found:
    """The least ratio of tokens. Of a group that may be among the others, it is the largest it can
    be: beyond a limit it breaks that, and otherwise it is unknown.
    """
    hidden = parts.hidden()
    ratios = [(row["n_b"] / row["n_a"], row["name"]) for row in parts.shrinkable()]
    ratios += [(parts.others / row["n_a"], row["name"]) for row in hidden]
    if not ratios:
        least = count(parts.min_tokens, "token")
        return Found(None, reason=f"no {parts.kind} that was read has {least} in the baseline")
    if not hidden:
        return Found(*min(ratios))
    reason = (
        f"{count(len(hidden), 'group')} of the baseline may be among the other groups of this run, "
        f"which have {count(parts.others, 'token')}: {_named(hidden, 'n_a')}; raise min_tokens in "
        "[group] to judge larger groups only"
    )
    return Found(*min(ratios), reason)


def _worst_own(limit: Limit, policy: Policy, run: RunFolder) -> Found:
    """The worst value of a limit on the run alone."""
    if (lacking := own_parts.lacking(run, limit.key)) is not None:
        return Found(None, reason=lacking)
    min_tokens = 0 if limit.is_whole else policy.least_tokens(limit.of)
    try:
        of_parts = list(own_parts.FIGURES[limit.key](run, limit.of))
    except QueryError as error:
        return Found(None, reason=f"its documents could not be asked: {error}")
    found = [part for part in of_parts if part.n >= min_tokens]
    if not found:
        return Found(None, reason=f"no {limit.of} has {count(min_tokens, 'token')}")
    worst = min(found, key=own_parts.worst_first)
    return Found(worst.value, worst.name)


def notes(policy: Policy, evidence: Evidence) -> Iterator[str]:
    """Sentences on the sources and groups that no limit on them was compared with."""
    for kind in ("source", "group"):
        if policy.limits_of(kind) and evidence.comparison is not None:
            yield from _notes(Parts.of(kind, policy, evidence, evidence.comparison), policy)


def _notes(parts: Parts, policy: Policy) -> Iterator[str]:
    kind = parts.kind
    judged = {row["name"] for row in parts.judged(policy)}
    unjudged = [row for row in parts.rows if row["name"] not in judged]
    gone = [row for row in unjudged if not row["n_b"]]
    in_run = [row for row in unjudged if row["n_b"]]
    new = [row for row in in_run if not row["n_a"]]
    if new:
        yield (
            f"[{kind}] judged nothing of {count(len(new), f'new {kind}')}, which have nothing to be "
            f"held against: {_named(new, 'n_b')}; {REMEDY['new'][kind]}."
        )
    if gone:
        yield (
            f"[{kind}] judged nothing of {count(len(gone), kind)} of the baseline without a "
            f"token in this run: {_named(gone, 'n_a')}; {REMEDY['gone'][kind]}."
        )
    if small := len(in_run) - len(new):
        yield (
            f"[{kind}] judged nothing of {count(small, kind)} under min_tokens, "
            f"{parts.min_tokens:,}."
        )


def _named(rows: list[dict[str, Any]], tokens: str) -> str:
    """The first parts of ``rows`` by name, with their tokens; ``tokens`` is the column."""
    shown = rows[:SHOWN_PARTS]
    names = ", ".join(f"{row['name']} ({count(row[tokens], 'token')})" for row in shown)
    if len(rows) > SHOWN_PARTS:
        names += f" and {len(rows) - SHOWN_PARTS:,} more"
    return names
