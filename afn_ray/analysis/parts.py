"""Limits on each source and each group of a run: the worst one, and those that are not judged."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

import pyarrow.compute as pc

from afn_ray import token_rows
from afn_ray.analysis import own_parts
from afn_ray.analysis.evidence import (
    WITHOUT_SOURCES,
    ComparedPart,
    Evidence,
    Found,
    distance,
    sources_at,
)
from afn_ray.analysis.limits import DISTANCE_LIMITS, Limit
from afn_ray.analysis.policy import Policy
from afn_ray.config import RunConfig
from afn_ray.errors import ConfigError, QueryError
from afn_ray.reduce.compare import Comparison
from afn_ray.reduce.group_drift import grouped_by
from afn_ray.reduce.groups import MAX_GROUPS, OTHERS, group_name
from afn_ray.store.manifest import RunFolder
from afn_ray.text import count

SHOWN_PARTS = 5
"""Largest number of sources or groups that a note names."""
NOT_ASKED = "its documents could not be asked"
"""Beginning of the reason why a figure was not found this time, though it may be the next."""
OF_SOURCES = ("max_new_sources", "max_vanished_sources")
"""Limits on the whole run that need its table of sources."""
RATIOS = ("min_tokens_ratio", "max_tokens_ratio")
"""Limits on the ratio of a part's tokens."""
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
    every: list[ComparedPart]
    was_read: Collection[str]  # names of those that this run read, with tokens or not
    min_tokens: int
    others: int = 0  # tokens of the other groups of this run, if one not found may be among them

    @classmethod
    def of(cls, kind: str, policy: Policy, evidence: Evidence, comparison: Comparison) -> Parts:
        """The parts of the ``kind`` in ``comparison``."""
        min_tokens = policy.least_tokens(kind)
        if kind == "source":
            sources = sources_at(comparison, evidence.layer)
            return cls(kind, sources, _read_sources(sources, evidence.sources), min_tokens)
        table = comparison.groups.drift
        at_layer = table.filter(pc.equal(table["layer"], evidence.layer)).to_pylist()
        # A group may have empty documents alone in both runs.
        rows = [row for row in at_layer if row["n_a"] or row["n_b"]]
        groups = [ComparedPart.of(group_name(row["group"]), row) for row in rows]
        others = _other_tokens(groups)
        read = [group.name for group in groups if group.n_b or not others]
        return cls(kind, groups, read, min_tokens, others)

    def in_both(self) -> list[ComparedPart]:
        """Parts with enough tokens in both runs."""
        return [part for part in self.every if min(part.n_a, part.n_b) >= self.min_tokens]

    def shrinkable(self) -> list[ComparedPart]:
        """Parts with enough tokens in the baseline that this run read, even without a token."""
        read = set(self.was_read)
        return [part for part in self.every if part.name in read and part.n_a >= self.min_tokens]

    def hidden(self) -> list[ComparedPart]:
        """Parts with enough tokens in the baseline that may be among the
        other groups of this run.
        """
        gone = [part for part in self.every if self.others and not part.n_b]
        return [part for part in gone if part.n_a >= self.min_tokens]

    def judged(self, policy: Policy) -> list[ComparedPart]:
        """Parts that a limit of ``policy`` was compared with."""
        found = self.in_both()
        if any(limit.key == "min_tokens_ratio" for limit in policy.limits_of(self.kind)):
            found += self.shrinkable() + self.hidden()
        return found


def _other_tokens(groups: Iterable[ComparedPart]) -> int:
    """Tokens of this run's documents that have no group of their own, though they have a value.

    There are none while so few groups have tokens that each has its own; then only documents have
    the value ``OTHERS``, which counts as one of the groups.
    """
    with_tokens = [part for part in groups if part.n_b and part.drift["group"] is not None]
    n_of = {part.drift["group"]: part.n_b for part in with_tokens}
    others = n_of.pop(OTHERS, 0)
    return others if len(n_of) >= MAX_GROUPS - 1 else 0


def _read_sources(parts: Iterable[ComparedPart], sources: Collection[str]) -> list[str]:
    """Names in ``parts`` that are among ``sources``, or are folders of some."""
    read = [f"{name}/" for name in sources]
    found = []
    for part in parts:
        prefix = f"{part.name}/"
        if part.n_b or any(name.startswith(prefix) for name in read):
            found.append(part.name)
    return found


def check(policy: Policy, run: RunFolder) -> None:
    """Raise ``ConfigError`` for limits on parts that ``run`` does not have."""
    if (why := lacking(policy, run)) is not None:
        raise ConfigError(why)


def lacking(policy: Policy, run: RunFolder) -> str | None:
    """Reason why ``run`` can never be held against the limits of ``policy`` on parts; None if it
    can.
    """
    has_scan = "sources" in run.info["tables"]
    record = token_rows.record_of(run.info["config"])
    return _lacking(policy, f"run {run.uri}", grouped_by(run), record, has_scan=has_scan)


def check_asked(policy: Policy, config: RunConfig) -> None:
    """Raise ``ConfigError`` for limits on parts that a run of ``config`` would not have."""
    has_scan = bool(config.screen)
    asked = "the run that run.toml asks for"
    why = _lacking(policy, asked, config.group_by, config.record, has_scan=has_scan)
    if why is not None:
        raise ConfigError(why)


def _lacking(
    policy: Policy, run: str, by: str | None, record: str, *, has_scan: bool
) -> str | None:
    """Reason why limits of ``policy`` on parts lack something in ``run``, in words, grouped ``by``
    a key.

    ``record`` are the rows that it keeps, and ``has_scan`` says whether it was screened.
    """
    needs_scan = any(limit.key in (*OF_SOURCES, "junk_share") for limit in policy.limits)
    if (needs_scan or policy.limits_of("source")) and not has_scan:
        how = "with its screening (--screen)"
        if not token_rows.is_complete(record):
            how = f"without --record {record}, which leaves its screening out"
        return (
            f"the policy limits sources or strange documents, but {run} has no table of "
            f"them: run it {how}"
        )
    if not policy.limits_of("group"):
        return None
    if by is None:
        return f"the policy limits groups, but {run} has none: give run.toml a group_by"
    if policy.group_by not in (None, by):
        return (
            f"the policy limits groups by {policy.group_by}, but {run} is grouped by {by}: "
            f"name the table [group.{by}], or let run.toml group by {policy.group_by}"
        )
    return None


class PartFigure(NamedTuple):
    """A source or a group that is large enough to be judged, with its figure."""

    name: str
    value: float
    tokens: str  # in words


def figures_of(limit: Limit, kind: str, policy: Policy, evidence: Evidence) -> list[PartFigure]:
    """The figure of ``limit`` for each part of the ``kind`` that is large enough, the worst first.

    A group that may be among the other groups has the best figure that it can have. Raises
    ``QueryError`` if the documents cannot be asked.
    """
    key, comparison = limit.key, evidence.comparison
    if key in own_parts.FIGURES:
        found = _own_figures(limit, kind, policy, evidence)
    elif comparison is None:
        found = []
    else:
        parts = Parts.of(kind, policy, evidence, comparison)
        found = [
            PartFigure(part.name, value, f"{part.n_a:,} tokens before, {part.n_b:,} now")
            for value, part in _values(limit, parts)
        ]
    sign = 1 if limit.is_minimum else -1
    return sorted(found, key=lambda part: (sign * part.value, part.name))


def _own_figures(limit: Limit, kind: str, policy: Policy, evidence: Evidence) -> list[PartFigure]:
    """The parts with their figures on the run alone."""
    run = evidence.run
    if f"{kind}s" not in run.info["tables"] or own_parts.lacking(run, limit.key) is not None:
        return []
    least = 0 if limit.is_whole else policy.least_tokens(kind)
    figures = []
    for part in evidence.own.of(limit.key, kind):
        if part.n >= least:
            figures.append(PartFigure(part.name, part.value, count(part.n, "token")))
    return figures


def _values(limit: Limit, parts: Parts) -> Iterator[tuple[float, ComparedPart]]:
    """The figure of a limit on drift for each of ``parts`` that it judges."""
    if limit.key in DISTANCE_LIMITS:
        for part in parts.in_both():
            yield distance(part.drift, limit.key), part
    elif limit.key in RATIOS:
        for part in parts.shrinkable() if limit.is_minimum else parts.in_both():
            yield part.n_b / part.n_a, part
        for part in parts.hidden() if limit.is_minimum else ():
            yield parts.others / part.n_a, part


def worst(limit: Limit, policy: Policy, evidence: Evidence) -> Found:
    """The worst value of ``limit`` over the parts that it judges, and the part."""
    if (reason := _nothing_to_judge(limit, evidence)) is not None:
        return Found(None, reason=reason)
    try:
        found = figures_of(limit, limit.of, policy, evidence)
    except QueryError as error:
        return Found(None, reason=f"{NOT_ASKED}: {error}")
    if not found:
        return Found(None, reason=_too_small(limit, policy))
    return Found(found[0].value, found[0].name, _hidden(limit, policy, evidence))


def _nothing_to_judge(limit: Limit, evidence: Evidence) -> str | None:
    """Reason why no part has a figure for ``limit``, however large it is; None if some may have."""
    if limit.key in own_parts.FIGURES:
        return own_parts.lacking(evidence.run, limit.key)
    if (comparison := evidence.comparison) is None:
        return evidence.baseline.lacking
    if limit.of == "source":
        there = sources_at(comparison, evidence.layer)
        return None if there else WITHOUT_SOURCES.reason
    if evidence.groups_lacking is not None:
        return evidence.groups_lacking
    return None if len(comparison.groups.drift) else "there is no group"


def _too_small(limit: Limit, policy: Policy) -> str:
    """The reason why no part is large enough for ``limit``."""
    least = count(policy.least_tokens(limit.of), "token")
    if limit.key in own_parts.FIGURES:
        return f"no {limit.of} has {least}"
    if limit.key in RATIOS:
        return f"no {limit.of} that was read has {least} in the baseline"
    return f"no {limit.of} has {least} in both runs"


def _hidden(limit: Limit, policy: Policy, evidence: Evidence) -> str | None:
    """Reason why the worst ratio of tokens is only a bound; None if it is not."""
    if limit.key not in RATIOS or evidence.comparison is None:
        return None
    parts = Parts.of(limit.of, policy, evidence, evidence.comparison)
    if not (hidden := parts.hidden()):
        return None
    return (
        f"{count(len(hidden), 'group')} of the baseline may be among the other groups of this run, "
        f"which have {count(parts.others, 'token')}: {_named(hidden)}; raise min_tokens in "
        "[group] to judge larger groups only"
    )


def notes(policy: Policy, evidence: Evidence) -> Iterator[str]:
    """Sentences on the sources and groups that no limit on them was compared with."""
    for kind in ("source", "group"):
        if policy.limits_of(kind) and evidence.comparison is not None:
            yield from _notes(Parts.of(kind, policy, evidence, evidence.comparison), policy)


def _notes(parts: Parts, policy: Policy) -> Iterator[str]:
    kind = parts.kind
    judged = {part.name for part in parts.judged(policy)}
    unjudged = [part for part in parts.every if part.name not in judged]
    gone = [part for part in unjudged if not part.n_b]
    in_run = [part for part in unjudged if part.n_b]
    new = [part for part in in_run if not part.n_a]
    if new:
        yield (
            f"[{kind}] judged nothing of {count(len(new), f'new {kind}')}, which have nothing to "
            f"be held against: {_named(new)}; {REMEDY['new'][kind]}."
        )
    if gone:
        yield (
            f"[{kind}] judged nothing of {count(len(gone), kind)} of the baseline without a "
            f"token in this run: {_named(gone)}; {REMEDY['gone'][kind]}."
        )
    if small := len(in_run) - len(new):
        yield (
            f"[{kind}] judged nothing of {count(small, kind)} under min_tokens, "
            f"{parts.min_tokens:,}."
        )


def _named(parts: Sequence[ComparedPart]) -> str:
    """The first of ``parts``, which one run alone has, by name and with their tokens."""
    shown = parts[:SHOWN_PARTS]
    names = ", ".join(f"{part.name} ({count(part.n_a + part.n_b, 'token')})" for part in shown)
    if len(parts) > SHOWN_PARTS:
        names += f" and {len(parts) - SHOWN_PARTS:,} more"
    return names
